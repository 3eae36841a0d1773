"""GPUs, as NVML sees them: utilization, memory, power, clocks, energy. Loads nvidia-ml-py when it is asked for.

Upstream: https://docs.nvidia.com/deploy/nvml-api. A `GpuSampler` looks once a second, from a thread of its own. What
NVML gives is the device's, whoever uses it: also the processes of vLLM, also another container's.

What a device does not support is None, never 0. Energy and utilization are kept as meters that only go up, so that
chunks whose times overlap can each say what the meters showed when they began and ended, and `gpu_totals` counts
nothing twice.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, TypeVar

from flyte_batch.errors import BadInput
from flyte_batch.monitoring import clock

logger = logging.getLogger(__name__)

N = TypeVar("N", int, float)

EnergySource = Literal["counter", "power"]
"""Where energy comes from: the device's own counter, or its power, integrated over the samples."""

_PATIENCE_S = 2.0

# Bits of nvmlClocksEventReasons; https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
_THROTTLE_REASONS = {
    0x001: "idle",
    0x002: "application_clocks",
    0x004: "power_cap",
    0x008: "hardware_slowdown",
    0x010: "sync_boost",
    0x020: "software_thermal",
    0x040: "hardware_thermal",
    0x080: "power_brake",
    0x100: "display_clocks",
}


@dataclass(frozen=True, slots=True)
class GpuSample:
    """What a device did around one moment; a field is None where the device does not tell.

    Attributes:
        at: Unix time in seconds.
        index: NVML's number of the device, of a MIG instance that of the device it is a part of.
        uuid: ``GPU-...`` or ``MIG-...``.
        name: the product's.
        utilization: share of the time in which a kernel ran, 0 to 1.
        memory_utilization: share of the time in which device memory was read or written, 0 to 1.
        memory_used_bytes: by everybody, the driver included.
        memory_total_bytes: of the device, or of the MIG instance.
        power_w: watts.
        temperature_c: of the chip, degrees Celsius.
        sm_clock_mhz: of the processors.
        memory_clock_mhz: of the memory.
        energy_j: joules since the driver was loaded (``counter``) or the sampler was started (``power``).
        energy_source: which of the two.
        throttle_reasons: why the clocks are not higher: ``idle``, ``power_cap``, ``software_thermal``, ...
    """

    at: float
    index: int
    uuid: str
    name: str
    utilization: float | None
    memory_utilization: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_w: float | None
    temperature_c: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    energy_j: float | None
    energy_source: EnergySource | None
    throttle_reasons: tuple[str, ...] | None


@dataclass(frozen=True)
class GpuUse:
    """What one device did between two moments, as plain data for a report; several are summed up by `gpu_totals`.

    Attributes:
        uuid: of the device.
        name: the product's.
        sampler: who looked; meters of different samplers have nothing to do with each other.
        start: Unix time in seconds.
        end: Unix time in seconds.
        busy_start_s: the sampler's integral of the utilization at ``start``; None where utilization is not supported.
        busy_end_s: the same at ``end``.
        energy_start_j: the energy meter at ``start``; None where neither energy nor power is supported.
        energy_end_j: the same at ``end``.
        energy_source: ``counter``, ``power`` or None.
        peak_memory_bytes: most memory used, by everybody.
        memory_total_bytes: what there is.
        max_temperature_c: of the chip.
        throttle_reasons: all that occurred.
    """

    uuid: str
    name: str
    sampler: str
    start: float
    end: float
    busy_start_s: float | None
    busy_end_s: float | None
    energy_start_j: float | None
    energy_end_j: float | None
    energy_source: EnergySource | None
    peak_memory_bytes: int | None
    memory_total_bytes: int | None
    max_temperature_c: float | None
    throttle_reasons: tuple[str, ...]


@dataclass(frozen=True)
class GpuTotal:
    """One device's figures over `GpuUse` of it: time that several cover counts once, time that none covers not at all.

    Attributes:
        uuid: of the device.
        name: the product's.
        seconds: that were looked at.
        energy_j: joules; None where unknown.
        energy_source: ``counter``, ``power`` or None.
        mean_utilization: 0 to 1; None where unknown.
        mean_power_w: watts; None where unknown.
        peak_memory_bytes: most memory used, by everybody.
        memory_total_bytes: what there is.
        max_temperature_c: of the chip.
        throttle_reasons: all that occurred.
    """

    uuid: str
    name: str
    seconds: float
    energy_j: float | None
    energy_source: EnergySource | None
    mean_utilization: float | None
    mean_power_w: float | None
    peak_memory_bytes: int | None
    memory_total_bytes: int | None
    max_temperature_c: float | None
    throttle_reasons: tuple[str, ...]


class GpuSampler:
    """Looks at the GPUs until it is closed. Blocks for some tenths of a second when it is made: NVML starts.

    Args:
        interval_s: seconds between two looks.
        devices: NVML's numbers, or UUIDs; by default those that CUDA would use: ``CUDA_VISIBLE_DEVICES``, with its
            numbers, UUIDs and MIG instances, or all. Numbers count as with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, which
            makes a difference only where a machine has GPUs of several kinds.
        most_samples: for each device; with more, neighbours are merged, so that a day takes a few megabytes.

    Raises:
        BadInput: there is no GPU, no driver, no nvidia-ml-py, or no such device.
        ValueError: ``interval_s`` is not positive, or ``most_samples`` below 2.
    """

    def __init__(
        self, interval_s: float = 1.0, devices: Sequence[int | str] | None = None, *, most_samples: int = 8192
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s must be positive, got {interval_s}")
        if most_samples < 2:
            raise ValueError(f"most_samples must be at least 2, got {most_samples}")
        self._interval_s = interval_s
        self._nvml = _start_nvml()
        try:
            found = _chosen(self._nvml, devices)
            name = f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
            self._devices = [_Device(self._nvml, each, name, most_samples) for each in found]
        except BaseException:
            self._nvml.nvmlShutdown()
            raise
        self._turn = threading.Condition()
        self._asked = self._answered = 0
        self._closed = False
        for device in self._devices:
            device.look()
        self._thread = threading.Thread(target=self._run, name="flyte-batch-gpu", daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """Look now, beside the regular looks, which takes NVML some milliseconds.

        A sick device can hold NVML for long: then this returns after two seconds, without a sample.
        """
        with self._turn:
            self._asked += 1
            asked = self._asked
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._answered >= asked or self._closed, _PATIENCE_S)

    def latest(self) -> tuple[GpuSample, ...]:
        """The newest sample of each device that is still there."""
        return tuple(device.newest for device in self._devices if device.newest and not device.lost)

    def samples(self) -> dict[str, tuple[GpuSample, ...]]:
        """All samples by UUID, the oldest first.

        One that stands for several has their means, the most memory and the highest temperature, and the time and the
        energy of the last of them.
        """
        return {device.uuid: device.samples() for device in self._devices}

    def use_between(self, start: float, end: float) -> tuple[GpuUse, ...]:
        """What each device did between two Unix times, as far as it was looked at.

        Where ``end`` is later than the last sample it looks once more, as `sample` does.
        """
        if any(device.newest and device.newest.at < end for device in self._devices):
            self.sample()
        uses = [device.use_between(start, end) for device in self._devices]
        return tuple(use for use in uses if use is not None)

    def totals(self) -> tuple[GpuTotal, ...]:
        """The figures of each device over the sampler's whole time, a last look now included."""
        return gpu_totals(self.use_between(0, math.inf))

    def close(self) -> None:
        """Stop looking; what was seen can still be read. Closing twice is fine."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self._turn.notify_all()
        self._thread.join(_PATIENCE_S)
        if not self._thread.is_alive():
            self._nvml.nvmlShutdown()

    def __enter__(self) -> GpuSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has stopped looking."""
        return self._closed

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._answered or self._closed, self._interval_s)
                if self._closed:
                    return
                asked = self._asked
            for device in self._devices:
                device.look()
            with self._turn:
                self._answered = asked
                self._turn.notify_all()


_numbers = count(1)
_process_lock = threading.Lock()
_process_sampler: GpuSampler | None = None
_looked_for_gpus = False


def start_sampler(interval_s: float = 1.0) -> GpuSampler | None:
    """The process's sampler, started if it is not there yet; the first call blocks for some tenths of a second.

    Returns:
        None where there is no GPU, no driver or no nvidia-ml-py, which is said once, at debug level.
    """
    global _process_sampler, _looked_for_gpus
    with _process_lock:
        if _process_sampler is not None and not _process_sampler.is_closed:
            return _process_sampler
        if _looked_for_gpus and _process_sampler is None:
            return None
        _looked_for_gpus = True
        try:
            _process_sampler = GpuSampler(interval_s)
        except BadInput as error:
            _process_sampler = None
            logger.debug("GPUs are not monitored: %s", error)
        return _process_sampler


def latest() -> tuple[GpuSample, ...]:
    """The newest sample of each device, from the process's sampler; none where `start_sampler` started none."""
    sampler = _process_sampler
    return () if sampler is None or sampler.is_closed else sampler.latest()


def gpu_totals(uses: Iterable[GpuUse]) -> tuple[GpuTotal, ...]:
    """The figures of each device, from the uses of any number of chunks and replicas.

    Uses that overlap, as those of chunks that share a replica do, count once: energy and utilization are the length of
    what the meters' spans cover together. Two replicas that share a device share its counter; where energy is
    integrated from power instead, both count.
    """
    devices: dict[str, list[GpuUse]] = {}
    for use in uses:
        devices.setdefault(use.uuid, []).append(use)
    return tuple(_total(each) for each in devices.values())


def merged(uses: Iterable[GpuUse]) -> tuple[GpuUse, ...]:
    """One use for each device and sampler, from the earliest start to the latest end: bounded, however many chunks.

    What the device did between two chunks is then in it, too: a replica that waits takes energy.
    """
    found: dict[tuple[str, str], GpuUse] = {}
    for use in uses:
        known = found.setdefault((use.sampler, use.uuid), use)
        first, last = min(known, use, key=lambda each: each.start), max(known, use, key=lambda each: each.end)
        found[use.sampler, use.uuid] = replace(
            last,
            start=first.start,
            busy_start_s=first.busy_start_s,
            energy_start_j=first.energy_start_j,
            peak_memory_bytes=_most((known.peak_memory_bytes, use.peak_memory_bytes)),
            max_temperature_c=_most((known.max_temperature_c, use.max_temperature_c)),
            throttle_reasons=_together((known.throttle_reasons, use.throttle_reasons)),
        )
    return tuple(found.values())


def energy_j(totals: Iterable[GpuTotal]) -> float | None:
    """Joules of all devices together; None if there is none, or one whose energy is unknown."""
    energies = [total.energy_j for total in totals]
    known = [energy for energy in energies if energy is not None]
    return sum(known) if known and len(known) == len(energies) else None


def wh_per_million_tokens(energy_j: float | None, tokens: int) -> float | None:
    """Watt-hours for a million tokens; None if the energy is unknown, or there is no token."""
    return None if energy_j is None or tokens <= 0 else energy_j / 3600 / tokens * 1e6


def _total(uses: Sequence[GpuUse]) -> GpuTotal:
    """Of one device."""
    # A device's counter shows the same to all who read it; every other meter is one sampler's own.
    energy = _covered(
        (use.energy_start_j, use.energy_end_j, use.uuid if use.energy_source == "counter" else use.sampler)
        for use in uses
    )
    busy_s = _covered((use.busy_start_s, use.busy_end_s, use.sampler) for use in uses)
    looked_s = _covered((use.start, use.end, use.sampler) for use in uses)
    seconds = _covered((use.start, use.end, use.uuid) for use in uses)
    sources = {use.energy_source for use in uses}
    return GpuTotal(
        uuid=uses[0].uuid,
        name=uses[0].name,
        seconds=seconds or 0.0,
        energy_j=energy,
        energy_source=next(iter(sources)) if len(sources) == 1 else None,
        mean_utilization=min(busy_s / looked_s, 1.0) if busy_s is not None and looked_s else None,
        mean_power_w=energy / seconds if energy is not None and seconds else None,
        peak_memory_bytes=_most(use.peak_memory_bytes for use in uses),
        memory_total_bytes=_most(use.memory_total_bytes for use in uses),
        max_temperature_c=_most(use.max_temperature_c for use in uses),
        throttle_reasons=_together(use.throttle_reasons for use in uses),
    )


def _covered(spans: Iterable[tuple[float | None, float | None, str]]) -> float | None:
    """How much of each meter (the third value) the spans cover together; None if one of them is unknown."""
    found = sorted(spans, key=lambda span: (span[2], span[0] or 0.0))
    length, meter, reached = 0.0, "", 0.0
    for start, end, of in found:
        if start is None or end is None:
            return None
        if of != meter:
            meter, reached = of, start
        length += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return length


@dataclass(frozen=True, slots=True)
class _Found:
    """A device that NVML knows."""

    handle: Any
    index: int
    uuid: str
    name: str
    is_mig: bool


@dataclass(frozen=True, slots=True)
class _Point:
    """Samples in a row as one, and the integral of the utilization up to the last of them."""

    sample: GpuSample
    samples: int
    busy_s: float | None

    def merged(self, later: _Point) -> _Point:
        """This and the next point as one."""
        a, b = self.sample, later.sample

        def mean(first: float | None, second: float | None) -> float | None:
            if first is None or second is None:
                return first if second is None else second
            return (first * self.samples + second * later.samples) / (self.samples + later.samples)

        def whole(value: float | None) -> int | None:
            return None if value is None else round(value)

        sample = replace(
            b,
            utilization=mean(a.utilization, b.utilization),
            memory_utilization=mean(a.memory_utilization, b.memory_utilization),
            memory_used_bytes=_most((a.memory_used_bytes, b.memory_used_bytes)),
            memory_total_bytes=_most((a.memory_total_bytes, b.memory_total_bytes)),
            power_w=mean(a.power_w, b.power_w),
            temperature_c=_most((a.temperature_c, b.temperature_c)),
            sm_clock_mhz=whole(mean(a.sm_clock_mhz, b.sm_clock_mhz)),
            memory_clock_mhz=whole(mean(a.memory_clock_mhz, b.memory_clock_mhz)),
            energy_j=b.energy_j if b.energy_j is not None else a.energy_j,
            throttle_reasons=_together((a.throttle_reasons or (), b.throttle_reasons or ())),
        )
        return _Point(sample, self.samples + later.samples, later.busy_s)


class _Device:
    """One device, and what was seen of it."""

    def __init__(self, nvml: Any, found: _Found, sampler: str, most_samples: int) -> None:
        self.uuid = found.uuid
        self.newest: GpuSample | None = None
        self.lost = False
        self._nvml = nvml
        self._found = found
        self._sampler = sampler
        self._most = most_samples
        self._lock = threading.Lock()  # for the points; never held while NVML is asked
        self._points: list[_Point] = []
        self._stride = 1
        self._busy_s: float | None = None
        self._energy_j: float | None = None
        self._source: EnergySource | None = None
        self._silent: set[str] = set()

    def look(self) -> None:
        """Take a sample, unless the device is lost."""
        if self.lost:
            return
        try:
            sample = self._sample()
        except self._nvml.NVMLError as error:
            self.lost = True
            logger.warning(
                "GPU %d (%s, %s) is lost and not monitored any more: %s. It works again after a reset of the GPU or a "
                "restart of its machine",
                *(self._found.index, self._found.name, self.uuid, error),
            )
            return
        with self._lock:
            self.newest = sample
            self._keep(_Point(sample, 1, self._busy_s))

    def samples(self) -> tuple[GpuSample, ...]:
        with self._lock:
            return tuple(point.sample for point in self._points)

    def use_between(self, start: float, end: float) -> GpuUse | None:
        """See `GpuSampler.use_between`; None if there was no look in that time."""
        with self._lock:
            points = tuple(self._points)
        times = [point.sample.at for point in points]
        if not times:
            return None
        start, end = max(start, times[0]), min(end, times[-1])
        if end < start:
            return None
        seen = [point.sample for point in points[bisect_left(times, start) : bisect_left(times, end) + 1]]
        busy = [(point.sample.at, point.busy_s) for point in points]
        energy = [(point.sample.at, point.sample.energy_j) for point in points]
        return GpuUse(
            uuid=self.uuid,
            name=self._found.name,
            sampler=self._sampler,
            start=start,
            end=end,
            busy_start_s=_meter_at(start, busy),
            busy_end_s=_meter_at(end, busy),
            energy_start_j=_meter_at(start, energy),
            energy_end_j=_meter_at(end, energy),
            energy_source=self._source,
            peak_memory_bytes=_most(sample.memory_used_bytes for sample in seen),
            memory_total_bytes=_most(sample.memory_total_bytes for sample in seen),
            max_temperature_c=_most(sample.temperature_c for sample in seen),
            throttle_reasons=_together(sample.throttle_reasons or () for sample in seen),
        )

    def _sample(self) -> GpuSample:
        """Raises:
        NVMLError: the device is lost.
        """
        nvml = self._nvml
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        # What a MIG instance takes of its device's power, nobody knows.
        power_mw = None if self._found.is_mig else self._ask("nvmlDeviceGetPowerUsage")
        counter_mj = None if self._found.is_mig else self._ask("nvmlDeviceGetTotalEnergyConsumption")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name in drivers before 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        at = clock.now()
        utilization = None if rates is None else rates.gpu / 100
        power_w = None if power_mw is None else power_mw / 1000
        self._advance(at, utilization, power_w, None if counter_mj is None else counter_mj / 1000)
        return GpuSample(
            at=at,
            index=self._found.index,
            uuid=self.uuid,
            name=self._found.name,
            utilization=utilization,
            memory_utilization=None if rates is None else rates.memory / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_w=power_w,
            temperature_c=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            energy_j=self._energy_j,
            energy_source=self._source,
            throttle_reasons=None
            if reasons is None
            else tuple(name for bit, name in _THROTTLE_REASONS.items() if reasons & bit),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What NVML says; None where it does not.

        Raises:
            NVMLError: the device is lost.
        """
        nvml = self._nvml
        try:
            return getattr(nvml, function)(self._found.handle, *arguments)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if function not in self._silent:
                self._silent.add(function)
                logger.debug("GPU %d: %s: %s", self._found.index, function, error)
            return None

    def _advance(self, at: float, utilization: float | None, power_w: float | None, counter_j: float | None) -> None:
        """Move the meters on to a new sample; what is unknown leaves them where they are."""
        if self._source is None:
            self._source = "counter" if counter_j is not None else "power" if power_w is not None else None
        before = self.newest
        seconds = at - before.at if before is not None else 0.0
        if utilization is not None:
            last = before.utilization if before is not None else None
            self._busy_s = (self._busy_s or 0.0) + seconds * _between(last, utilization)
        if self._source == "counter" and counter_j is not None:
            self._energy_j = counter_j
        elif self._source == "power" and power_w is not None:
            last = before.power_w if before is not None else None
            self._energy_j = (self._energy_j or 0.0) + seconds * _between(last, power_w)

    def _keep(self, point: _Point) -> None:
        """Append; the first point stays as it is, because the meters count from there."""
        points = self._points
        if len(points) > 1 and points[-1].samples < self._stride:
            points[-1] = points[-1].merged(point)
            return
        points.append(point)
        if len(points) > self._most:
            pairs = (points[i : i + 2] for i in range(1, len(points), 2))
            points[1:] = [pair[0].merged(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
            self._stride *= 2


def _between(before: float | None, now: float) -> float:
    """The mean of two samples; a sample that follows an unknown one stands for the time before it, too."""
    return now if before is None else (before + now) / 2


def _meter_at(at: float, readings: Iterable[tuple[float, float | None]]) -> float | None:
    """What a meter showed at a time, from readings before and after it."""
    known = [(when, value) for when, value in readings if value is not None]
    if not known:
        return None
    after = bisect_left(known, (at,))
    if after == 0 or after == len(known):
        return known[min(after, len(known) - 1)][1]
    (left, low), (right, high) = known[after - 1], known[after]
    return low + (high - low) * (at - left) / (right - left)


def _most(values: Iterable[N | None]) -> N | None:
    return max((value for value in values if value is not None), default=None)


def _together(reasons: Iterable[Iterable[str]]) -> tuple[str, ...]:
    found = {reason for each in reasons for reason in each}
    return tuple(name for name in _THROTTLE_REASONS.values() if name in found)


def _start_nvml() -> Any:
    """The module pynvml, with NVML initialised.

    Raises:
        BadInput: one of the two is not there.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise BadInput("nvidia-ml-py is not installed: install flyte-batch with its extra 'monitoring'") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise BadInput(f"NVML does not start ({error}): there is no NVIDIA GPU here, or no driver") from error
    return nvml


def _chosen(nvml: Any, devices: Sequence[int | str] | None) -> list[_Found]:
    """The devices to look at.

    Raises:
        BadInput: there is none, or one that was named is not there.
    """
    everything = _all_devices(nvml)
    if devices is not None:
        found = [_named(everything, str(each)) for each in devices]
        missing = [each for each, device in zip(devices, found, strict=True) if device is None]
        if missing:
            there = ", ".join(f"{device.index} ({device.uuid})" for device in everything)
            raise BadInput(f"there is no GPU {missing[0]!r}: NVML knows {there or 'none'}")
        chosen = [device for i, device in enumerate(found) if device is not None and device not in found[:i]]
    else:
        chosen = _visible(everything, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not chosen:
        raise BadInput("there is no GPU to monitor: NVML knows none, or CUDA_VISIBLE_DEVICES hides them")
    return chosen


def _visible(everything: Sequence[_Found], names: str | None) -> list[_Found]:
    """Those that CUDA would use. https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables"""
    if names is None:
        instances = [device for device in everything if device.is_mig]
        split = {device.index for device in instances}
        return [device for device in everything if device.is_mig or device.index not in split]
    chosen: list[_Found] = []
    for name in names.split(","):
        device = _named(everything, name.strip())
        if device is None or device in chosen:  # CUDA, too, ignores what follows one that is not there
            break
        chosen.append(device)
    return chosen


def _named(everything: Sequence[_Found], name: str) -> _Found | None:
    """By number, or by UUID, of which the beginning is enough where only one device's begins so."""
    if name.isdigit():
        return next((device for device in everything if device.index == int(name) and not device.is_mig), None)
    found = [device for device in everything if name.startswith(("GPU-", "MIG-")) and device.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _all_devices(nvml: Any) -> list[_Found]:
    """Devices, each followed by its MIG instances."""
    found: list[_Found] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            device = _Found(handle, index, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), False)
        except nvml.NVMLError as error:  # lost already, or not this container's
            logger.debug("GPU %d cannot be monitored: %s", index, error)
            continue
        found.append(device)
        found += _mig_instances(nvml, device)
    return found


def _mig_instances(nvml: Any, device: _Found) -> list[_Found]:
    found: list[_Found] = []
    try:
        if nvml.nvmlDeviceGetMigMode(device.handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return found
        places = nvml.nvmlDeviceGetMaxMigDeviceCount(device.handle)
    except nvml.NVMLError:  # a device without MIG
        return found
    for place in range(places):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, place)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError:  # nobody made an instance in this place
            continue
        found.append(_Found(handle, device.index, uuid, name, True))
    return found
