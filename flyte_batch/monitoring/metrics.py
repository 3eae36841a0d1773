"""Every metric, defined once: what Prometheus gets, what dashboard and alert rules ask for, what the docs list.

Names follow Prometheus' conventions: base units, counters end in ``_total``. Labels have few values on purpose, because
each combination is a time series that the server keeps for weeks: there is none for run, action, chunk or batcher, of
which there are ever more (traces and logs carry those), and causes of failures beyond the first
`flyte_batch.errors.MOST_CAUSES` are ``other``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "ratio", "seconds", "bytes", "watts", "joules", "celsius"]
"""What a value is of; "" for a number of things."""


@dataclass(frozen=True, eq=False, slots=True)
class Metric:
    """One metric. Two are the same only if they are one object, which makes them quick to look up.

    Attributes:
        name: as Prometheus stores it, a histogram's without ``_bucket``.
        kind: what may be done with it.
        help: what it counts or measures.
        labels: names of its labels.
        unit: of its values.
        buckets: a histogram's upper bounds, without infinity.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: Unit = ""
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str, unit: Unit = "") -> Metric:
    return Metric(f"flyte_batch_{name}_total", "counter", help, labels, unit)


def _gauge(name: str, help: str, *labels: str, unit: Unit = "") -> Metric:
    return Metric(f"flyte_batch_{name}", "gauge", help, labels, unit)


def _histogram(name: str, help: str, *labels: str, buckets: tuple[float, ...], unit: Unit = "") -> Metric:
    return Metric(f"flyte_batch_{name}", "histogram", help, labels, unit, buckets)


_MINUTES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

# -- Rows and chunks: what a replica committed ----------------------------------------------------------------------

ROWS = _counter("rows", "Rows of committed parts; outcome is ok or failed.", "outcome")
ROW_FAILURES = _counter("row_failures", "Failed rows of committed parts by cause, the error's class.", "cause")
TOKENS = _counter("tokens", "Tokens of committed rows; kind is prompt or response.", "kind")
CHUNKS = _counter("chunks", "Attempts at a chunk; outcome is done or failed.", "outcome")
CHUNKS_RUNNING = _gauge("chunks_running", "Chunks that the process works on.")
CHUNK_SECONDS = _histogram(
    "chunk_seconds", "Seconds from reading a chunk to the commit of its part.", buckets=_MINUTES, unit="seconds"
)

# -- Batchers and their device ---------------------------------------------------------------------------------------

RECORDS_SUBMITTED = _counter("records_submitted", "Records that batchers accepted.", "engine")
RECORDS = _counter(
    "records",
    "Records that left batchers; outcome is ok, failed, lost: the engine died (a chunk asks its next one again), or "
    "abandoned: taken back, because the caller gave up.",
    "engine",
    "outcome",
)
RECORDS_EXPIRED = _counter("records_expired", "Records that had no result when their timeout_s was over.", "engine")
RECORD_FAILURES = _counter(
    "record_failures",
    "Records that failed in stage prepare, infer or finish, by cause, the error's class. Those that a dead engine lost "
    "are not among them.",
    "stage",
    "cause",
)
RECORDS_QUEUED = _gauge("records_queued", "Records that wait for the device.", "engine")
RECORDS_RUNNING = _gauge("records_running", "Records on the device.", "engine")
RECORD_LATENCY = _histogram(
    "record_latency_seconds",
    "Seconds from a record's arrival in the queue to its outcome; caller is chunk, or direct for any other.",
    "engine",
    "caller",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600, 1800),
    unit="seconds",
)
BATCHES = _counter(
    "batches",
    "Batches that came back from the device, in a ContinuousBatcher what the engine gave back in one step; outcome is "
    "ok, failed (every record of it) or split (its records are tried again in smaller batches).",
    "engine",
    "outcome",
)
BATCH_RECORDS = _histogram(
    "batch_records", "Records a batch.", "engine", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
)
BATCH_FILL = _histogram(
    "batch_fill_ratio",
    "Share of the budget or of the most records that a batch took, whichever is larger; in a ContinuousBatcher what "
    "was in flight.",
    "engine",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    unit="ratio",
)
BATCH_SECONDS = _histogram(
    "batch_seconds",
    "Seconds that a batch took on the device.",
    "engine",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    unit="seconds",
)
OUT_OF_MEMORY = _counter("batches_out_of_memory", "Batches that did not fit the device.", "engine")
DEVICE_SECONDS = _counter(
    "device_seconds",
    "Seconds of the batchers' devices; state is busy, starved (free, nothing waits), assembling (free, a batch fills) "
    "or late (free, the event loop has not come to it).",
    "engine",
    "state",
    unit="seconds",
)

# -- Engines and the event loop ----------------------------------------------------------------------------------------

BATCHERS_RUNNING = _gauge("batchers_running", "Batchers that take records.", "engine")
ENGINE_STARTS = _counter("engine_starts", "Batchers that began to take records.", "engine")
ENGINE_DEATHS = _counter("engine_deaths", "Batchers that could not go on.", "engine")
ENGINES_LOADING = _gauge("engines_loading", "Engines that are being loaded.")
ENGINE_LOAD_SECONDS = _histogram(
    "engine_load_seconds",
    "Seconds that it took to load an engine; outcome is ok or failed.",
    "outcome",
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600),
    unit="seconds",
)
LOOP_BLOCKED = _histogram(
    "loop_blocked_seconds",
    "Seconds for which the event loop stood still, counted when it turned again.",
    buckets=(2, 3, 5, 10, 20, 30, 60, 120, 300, 600),
    unit="seconds",
)

# -- Runs: what a driver sees ------------------------------------------------------------------------------------------

RUNS = _counter("runs", "Runs that ended; outcome is done or failed.", "outcome")
RUNS_RUNNING = _gauge("runs_running", "Runs under way.")
RUN_ROWS = _gauge("run_rows", "Rows of the runs under way; of the last one, if there is none.")
RUN_ROWS_DONE = _gauge("run_rows_done", "Those of run_rows whose part is committed, by an earlier run or this one.")
RUN_ROWS_FAILED = _gauge("run_rows_failed", "Those of run_rows_done that this run committed without a response.")

# -- GPUs --------------------------------------------------------------------------------------------------------------

GPU_UTILIZATION = _gauge(
    "gpu_utilization_ratio", "Share of the time in which a kernel ran on the GPU.", "gpu", "name", unit="ratio"
)
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Memory of the GPU in use.", "gpu", "name", unit="bytes")
GPU_MEMORY_SIZE = _gauge("gpu_memory_size_bytes", "Memory of the GPU.", "gpu", "name", unit="bytes")
GPU_POWER = _gauge("gpu_power_watts", "Power that the GPU draws.", "gpu", "name", unit="watts")
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", "Temperature of the GPU.", "gpu", "name", unit="celsius")
GPU_ENERGY = _counter("gpu_energy_joules", "Energy that the GPU took.", "gpu", "name", unit="joules")

BUILD_INFO = _gauge("build_info", "Always 1; its labels say what runs.", "version", "python")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


def page() -> str:
    """All metrics as a page in Markdown."""
    lines = [
        "# Metrics",
        "",
        "What each process tells Prometheus. Written by `flyte batch dashboards`, which knows them from the code.",
        "",
        "| metric | kind | labels | what it says |",
        "|---|---|---|---|",
        *(f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {each.help} |" for each in METRICS),
    ]
    return "\n".join(lines) + "\n"
