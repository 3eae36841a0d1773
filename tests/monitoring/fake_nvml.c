/* A stand-in for libnvidia-ml.so.1, for tests of flyte_batch.monitoring.gpu through the real nvidia-ml-py.

The environment variable FAKE_NVML names a file, read anew for every call, with a line for each value:

    DEVICE NAME VALUE

where DEVICE is a number, or P.I for MIG instance I of device P, or - for what is nobody's. A value that is not there is
"not supported" on that device. Names: count (of -); uuid, name, utilization, memory_utilization, memory_used,
memory_total, power_mw, temperature, sm_clock, memory_clock, energy_mj, event_reasons, throttle_reasons, mig_mode,
mig_places (of devices); lost, which fails every call; error, the code of every call that reads a value; hang, which
holds every such call until it is taken out of the file. Without FAKE_NVML there is no driver.

Signatures: https://docs.nvidia.com/deploy/nvml-api
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
};

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilisation;

/* A handle is 1 + the device's number, and 1000 x (1 + the place) for a MIG instance. */
static void *handle_of(long device, long place) { return (void *)(1 + device + 1000 * (1 + place)); }

static int text(const char *device, const char *name, char *value, size_t size) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512], of[32], key[64], rest[256];
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file))
        if (sscanf(line, "%31s %63s %255[^\n]", of, key, rest) == 3 && !strcmp(of, device) && !strcmp(key, name)) {
            snprintf(value, size, "%s", rest);
            found = 1;
        }
    fclose(file);
    return found;
}

static void label(void *handle, char *device) {
    long number = (long)handle - 1, place = number / 1000 - 1;
    if (place < 0)
        sprintf(device, "%ld", number % 1000);
    else
        sprintf(device, "%ld.%ld", number % 1000, place);
}

static int read_value(void *handle, const char *name, unsigned long long *value) {
    char device[32], found[256];
    label(handle, device);
    if (text(device, "lost", found, sizeof found)) return GPU_IS_LOST;
    while (text(device, "hang", found, sizeof found)) usleep(5000);
    if (text(device, "error", found, sizeof found)) return atoi(found);
    if (!text(device, name, found, sizeof found)) return NOT_SUPPORTED;
    *value = strtoull(found, NULL, 0);
    return SUCCESS;
}

static int read_unsigned(void *handle, const char *name, unsigned int *value) {
    unsigned long long found;
    int code = read_value(handle, name, &found);
    if (code == SUCCESS) *value = (unsigned int)found;
    return code;
}

static int read_text(void *handle, const char *name, char *value, unsigned int size) {
    char device[32], found[256];
    label(handle, device);
    if (text(device, "lost", found, sizeof found)) return GPU_IS_LOST;
    return text(device, name, value, size) ? SUCCESS : NOT_FOUND;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    return getenv("FAKE_NVML") ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    char found[256];
    *count = text("-", "count", found, sizeof found) ? (unsigned int)atoi(found) : 0;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
    *handle = (void *)(1L + index);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
    int code = read_unsigned(handle, "mig_mode", current);
    *pending = *current;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned int *count) {
    return read_unsigned(handle, "mig_places", count);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned int place, void **instance) {
    char uuid[96];
    *instance = handle_of((long)handle - 1, place);
    return read_text(*instance, "uuid", uuid, sizeof uuid);
}

int nvmlDeviceGetName(void *handle, char *name, unsigned int size) { return read_text(handle, "name", name, size); }

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned int size) { return read_text(handle, "uuid", uuid, size); }

int nvmlDeviceGetUtilizationRates(void *handle, Utilisation *rates) {
    int code = read_unsigned(handle, "utilization", &rates->gpu);
    return code == SUCCESS ? read_unsigned(handle, "memory_utilization", &rates->memory) : code;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    int code = read_value(handle, "memory_used", &memory->used);
    if (code == SUCCESS) code = read_value(handle, "memory_total", &memory->total);
    memory->free = memory->total - memory->used;
    return code;
}

/* What belongs to a whole GPU is said of an instance, too: no caller may take it for the instance's own. */
static void *whole(void *handle) { return (void *)(1 + ((long)handle - 1) % 1000); }

int nvmlDeviceGetPowerUsage(void *handle, unsigned int *milliwatts) {
    return read_unsigned(whole(handle), "power_mw", milliwatts);
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    return read_value(whole(handle), "energy_mj", millijoules);
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned int *celsius) {
    return sensor == 0 ? read_unsigned(handle, "temperature", celsius) : INVALID_ARGUMENT;
}

int nvmlDeviceGetClockInfo(void *handle, int type, unsigned int *megahertz) {
    return read_unsigned(handle, type == 1 ? "sm_clock" : type == 2 ? "memory_clock" : "", megahertz);
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
    return read_value(handle, "event_reasons", reasons);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    return read_value(handle, "throttle_reasons", reasons);
}
