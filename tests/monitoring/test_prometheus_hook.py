"""What happens is what Prometheus' own parser reads, and it agrees with what the batchers say of themselves."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES, BadInput
from flyte_batch.monitoring import events as ev
from flyte_batch.monitoring import gpu, hooks, metrics
from tests.monitoring.tools import Series, parsed, promtool, scraped, value

prometheus_client = pytest.importorskip("prometheus_client")

from prometheus_client.openmetrics import exposition as openmetrics  # noqa: E402
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families  # noqa: E402

from flyte_batch.monitoring.prometheus import PrometheusHook  # noqa: E402

Registry = prometheus_client.CollectorRegistry


@pytest.fixture(autouse=True)
def _no_other_batchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_batchers", weakref.WeakSet())


@pytest.fixture
def registry() -> Iterator[Any]:
    """A registry with a hook that hears of everything."""
    registry = Registry()
    hook = PrometheusHook(registry)
    unsubscribe = hooks.subscribe(hook)
    yield registry
    unsubscribe()


def emit(*events: ev.Event) -> None:
    for event in events:
        hooks.emit(event)


CHUNK = ev.Scope(run="r", action="a", chunk="c1", chunk_index=0)
DIRECT = ev.Scope()


def chunk_done(rows: int = 10, failures: int = 0, causes: dict[str, int] | None = None) -> ev.ChunkDone:
    return ev.ChunkDone(0, CHUNK, rows, failures, prompt_tokens=30, response_tokens=20, seconds=7, causes=causes or {})


def batch_done(*shares: ev.Share, at: float = 0.3, started_at: float = 0.0, **changes: Any) -> ev.BatchDone:
    records, failed = sum(share.records for share in shares), sum(share.failed for share in shares)
    done = ev.BatchDone(at, "gone", 1, started_at, records, failed, 100.0, 0.5, False, shares)
    return replace(done, **changes)


class Doubler:
    """A process_fn that refuses negative numbers and can be told to wait."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: list[int]) -> list[Any]:
        self.gate.wait(30)
        return [ValueError("negative") if number < 0 else 2 * number for number in numbers]


def batcher(**options: Any) -> fb.DynamicBatcher[int, int]:
    return fb.DynamicBatcher(Doubler(), batch_timeout_s=0, **options)


# -- Rows and chunks -----------------------------------------------------------------------------------------------


def test_rows_tokens_and_causes_are_those_of_the_committed_parts(registry: Any) -> None:
    emit(chunk_done(rows=10), chunk_done(rows=6, failures=4, causes={"BadRecord": 3, "ValueError": 1}))
    series = scraped(registry)
    assert value(series, "flyte_batch_rows_total", outcome="ok") == 12
    assert value(series, "flyte_batch_rows_total", outcome="failed") == 4
    assert value(series, "flyte_batch_row_failures_total", cause="BadRecord") == 3
    assert value(series, "flyte_batch_row_failures_total", cause="ValueError") == 1
    assert value(series, "flyte_batch_tokens_total", kind="prompt") == 60
    assert value(series, "flyte_batch_tokens_total", kind="response") == 40
    assert value(series, "flyte_batch_chunks_total", outcome="done") == 2
    assert value(series, "flyte_batch_chunk_seconds_sum") == 14
    assert value(series, "flyte_batch_chunk_seconds_bucket", le="10.0") == 2
    assert value(series, "flyte_batch_chunk_seconds_bucket", le="5.0") == 0


def test_chunks_run_from_their_start_to_their_end_however_it_comes(registry: Any) -> None:
    other = ev.Scope(chunk="c1", chunk_index=0)  # another attempt at the same chunk
    emit(ev.ChunkStarted(0, CHUNK, 10), ev.ChunkStarted(0, other, 10))
    assert value(scraped(registry), "flyte_batch_chunks_running") == 2
    emit(chunk_done(), ev.ChunkFailed(0, other, "EngineDead", "it is gone", 3))
    series = scraped(registry)
    assert value(series, "flyte_batch_chunks_running") == 0
    assert value(series, "flyte_batch_chunks_total", outcome="failed") == 1


def test_what_will_be_counted_for_sure_begins_at_zero(registry: Any) -> None:
    """The rate of a series that begins with its first count misses that count."""
    series = scraped(registry)
    zeros: list[tuple[str, dict[str, str]]] = [
        ("flyte_batch_rows_total", {"outcome": "failed"}),
        ("flyte_batch_chunks_total", {"outcome": "failed"}),
        ("flyte_batch_tokens_total", {"kind": "response"}),
        ("flyte_batch_runs_total", {"outcome": "failed"}),
        ("flyte_batch_loop_blocked_seconds_sum", {}),
        ("flyte_batch_engines_loading", {}),
    ]
    assert [value(series, name, **labels) for name, labels in zeros] == [0] * len(zeros)


def test_causes_beyond_the_first_so_many_are_others(registry: Any) -> None:
    causes = {f"Error{number}": 1 for number in range(1000)}
    emit(chunk_done(rows=1000, failures=1000, causes=causes))
    emit(*(ev.RecordFailed(0, CHUNK, "infer", f"Error{number}", "") for number in range(1000)))
    series = scraped(registry)
    for name in ("flyte_batch_row_failures_total", "flyte_batch_record_failures_total"):
        found = {dict(labels)["cause"]: number for (each, labels), number in series.items() if each == name}
        assert len(found) == MOST_CAUSES + 1
        assert found[OTHER_CAUSES] == 1000 - MOST_CAUSES
        assert sum(found.values()) == 1000


def test_failures_are_counted_where_they_happen(registry: Any) -> None:
    failed = [("prepare", "BadRecord"), ("infer", "ValueError"), ("infer", "ValueError"), ("finish", "KeyError")]
    emit(*(ev.RecordFailed(0, CHUNK, stage, error, "its text") for stage, error in failed))  # type: ignore[arg-type]
    series = scraped(registry)
    assert value(series, "flyte_batch_record_failures_total", stage="prepare", cause="BadRecord") == 1
    assert value(series, "flyte_batch_record_failures_total", stage="infer", cause="ValueError") == 2
    assert value(series, "flyte_batch_record_failures_total", stage="finish", cause="KeyError") == 1


# -- Batches -------------------------------------------------------------------------------------------------------


def test_a_batch_is_in_its_buckets(registry: Any) -> None:
    emit(batch_done(ev.Share(CHUNK, 3, 0, 60, ((0.4, 2), (40.0, 1))), ev.Share(DIRECT, 2, 0, 40, ((0.02, 2),))))
    series = scraped(registry)
    for name, below, above, total in [
        ("flyte_batch_batch_records", "4.0", "8.0", 5),
        ("flyte_batch_batch_fill_ratio", "0.4", "0.5", 0.5),
        ("flyte_batch_batch_seconds", "0.25", "0.5", 0.3),
    ]:
        assert value(series, f"{name}_bucket", engine="unknown", le=below) == 0
        assert value(series, f"{name}_bucket", engine="unknown", le=above) == 1
        assert value(series, f"{name}_bucket", engine="unknown", le="+Inf") == 1
        assert value(series, f"{name}_count", engine="unknown") == 1
        assert value(series, f"{name}_sum", engine="unknown") == total

    def latencies(le: str, caller: str) -> float | None:
        return value(series, "flyte_batch_record_latency_seconds_bucket", engine="unknown", caller=caller, le=le)

    assert [latencies(le, "chunk") for le in ("0.25", "0.5", "30.0", "60.0", "+Inf")] == [0, 2, 2, 3, 3]
    assert [latencies(le, "direct") for le in ("0.01", "0.025", "+Inf")] == [0, 2, 2]
    assert value(series, "flyte_batch_record_latency_seconds_sum", engine="unknown", caller="chunk") == 40.8


def test_a_million_equal_latencies_cost_what_one_does(registry: Any) -> None:
    emit(batch_done(ev.Share(DIRECT, 10**9, 0, 1, ((0.5, 10**9),))))
    name = "flyte_batch_record_latency_seconds"
    series = scraped(registry)
    assert value(series, f"{name}_bucket", engine="unknown", caller="direct", le="0.5") == 10**9
    assert value(series, f"{name}_sum", engine="unknown", caller="direct") == 5 * 10**8


def test_batches_end_well_badly_or_in_halves(registry: Any) -> None:
    emit(
        batch_done(ev.Share(CHUNK, 3, 1, 60, ((0.4, 3),))),
        batch_done(ev.Share(CHUNK, 3, 3, 60, ((0.4, 3),))),
        batch_done(records=4, failed=4),
        batch_done(records=4, failed=4, out_of_memory=True),
    )
    series = scraped(registry)
    found = [value(series, "flyte_batch_batches_total", engine="unknown", outcome=each) for each in OUTCOMES]
    assert found == [1, 1, 2]


OUTCOMES = ("ok", "failed", "split")


def test_a_clock_that_was_set_back_takes_nothing_from_a_sum(registry: Any) -> None:
    emit(batch_done(ev.Share(DIRECT, 1, 0, 1, ()), at=10, started_at=3600))
    assert value(scraped(registry), "flyte_batch_batch_seconds_sum", engine="unknown") == 0


# -- Engines, the event loop ---------------------------------------------------------------------------------------


def test_engines_load_start_and_die(registry: Any) -> None:
    emit(ev.EngineLoading(0, "solver"), ev.EngineLoading(0, "judge"))
    assert value(scraped(registry), "flyte_batch_engines_loading") == 2
    emit(ev.EngineLoaded(0, "solver", 40), ev.EngineLoaded(0, "judge", 2, error="OSError"))
    emit(ev.EngineStarted(0, "b", "VLLMEngine"))
    assert value(scraped(registry), "flyte_batch_engine_deaths_total", engine="VLLMEngine") == 0
    emit(ev.EngineDied(0, "b", "VLLMEngine", "EngineDead", "", 3))
    series = scraped(registry)
    assert value(series, "flyte_batch_engines_loading") == 0
    assert value(series, "flyte_batch_engine_load_seconds_sum", outcome="ok") == 40
    assert value(series, "flyte_batch_engine_load_seconds_sum", outcome="failed") == 2
    assert value(series, "flyte_batch_engine_starts_total", engine="VLLMEngine") == 1
    assert value(series, "flyte_batch_engine_deaths_total", engine="VLLMEngine") == 1


def test_a_blocked_loop_is_counted_in_seconds(registry: Any) -> None:
    emit(ev.LoopBlocked(0, 1.5, "f (a/b.py)"), ev.LoopBlocked(0, 90, "f (a/b.py)"))
    series = scraped(registry)
    assert value(series, "flyte_batch_loop_blocked_seconds_sum") == 91.5
    assert value(series, "flyte_batch_loop_blocked_seconds_bucket", le="2.0") == 1
    assert value(series, "flyte_batch_loop_blocked_seconds_bucket", le="120.0") == 2


# -- Runs ----------------------------------------------------------------------------------------------------------


def run_gauges(registry: Any) -> list[float | None]:
    names = ("runs_running", "run_rows", "run_rows_done", "run_rows_failed")
    series = scraped(registry)
    return [value(series, f"flyte_batch_{name}") for name in names]


def test_a_run_is_seen_from_its_plan_to_its_end_and_until_the_next(registry: Any) -> None:
    first, second = ev.Scope(run="1"), ev.Scope(run="2")
    emit(ev.RunStarted(0, first, "out", rows=100, rows_reused=20, chunks=10, chunks_reused=2))
    assert run_gauges(registry) == [1, 100, 20, 0]
    emit(ev.ChunkReported(0, first, "c", 2, rows=10, failures=3), ev.ChunkReported(0, first, "d", 3, 10, error="Oh"))
    assert run_gauges(registry) == [1, 100, 30, 3]
    emit(ev.RunEnded(0, first, "out", 30, 3, 5, error="ChunkFailed"))
    assert run_gauges(registry) == [0, 100, 30, 3]
    emit(ev.RunStarted(0, second, "out2", rows=7, rows_reused=0, chunks=1, chunks_reused=0))
    assert run_gauges(registry) == [1, 7, 0, 0]
    emit(ev.RunEnded(0, second, "out2", 7, 0, 5))
    series = scraped(registry)
    assert value(series, "flyte_batch_runs_total", outcome="done") == 1
    assert value(series, "flyte_batch_runs_total", outcome="failed") == 1


def test_runs_side_by_side_are_added_up(registry: Any) -> None:
    for name, rows in (("1", 100), ("2", 7)):
        emit(ev.RunStarted(0, ev.Scope(run=name), "out", rows=rows, rows_reused=0, chunks=1, chunks_reused=0))
    assert run_gauges(registry) == [2, 107, 0, 0]


# -- What batchers count themselves ----------------------------------------------------------------------------------


def of_batchers(series: Series, engine: str = "DynamicBatcher") -> dict[str, float | None]:
    """What there is of a batcher's stats, by its names."""

    def read(name: str, **labels: str) -> float | None:
        return value(series, f"flyte_batch_{name}", engine=engine, **labels)

    ok, failed, lost = (read("records_total", outcome=outcome) for outcome in ("ok", "failed", "lost"))
    assert ok is not None
    assert failed is not None
    assert lost is not None
    return {
        "total_submitted": read("records_submitted_total"),
        "total_completed": ok + failed + lost,
        "total_failed": failed + lost,
        "total_lost": lost,
        "total_abandoned": read("records_total", outcome="abandoned"),
        "total_expired": read("records_expired_total"),
        "out_of_memory": read("batches_out_of_memory_total"),
        "queued": read("records_queued"),
        "running": read("records_running"),
    }


def in_stats(stats: Any) -> dict[str, float]:
    names = ("submitted", "completed", "failed", "lost", "abandoned", "expired")
    found = {f"total_{name}": getattr(stats, f"total_{name}") for name in names}
    return found | {name: getattr(stats, name) for name in ("out_of_memory", "queued", "running")}


def device_seconds(series: Series, state: str, engine: str = "DynamicBatcher") -> float:
    found = value(series, "flyte_batch_device_seconds_total", engine=engine, state=state)
    assert found is not None
    return found


async def test_a_batchers_figures_are_its_stats(registry: Any) -> None:
    async with batcher(max_batch_size=8) as doubler:
        await doubler.map(range(-5, 50), return_exceptions=True)
        found = of_batchers(scraped(registry))
        assert found == in_stats(doubler.stats)
        assert (found["total_completed"], found["total_failed"]) == (55, 5)
        series = scraped(registry)
        assert value(series, "flyte_batch_record_failures_total", stage="infer", cause="ValueError") == 5
        assert value(series, "flyte_batch_batch_records_sum", engine="DynamicBatcher") == 55
        assert value(series, "flyte_batch_record_latency_seconds_count", engine="DynamicBatcher", caller="direct") == 55
        assert value(series, "flyte_batch_batchers_running", engine="DynamicBatcher") == 1
    stats = doubler.stats
    series = scraped(registry)
    for state in ("busy", "starved", "assembling", "late"):
        assert math.isclose(device_seconds(series, state), getattr(stats, f"{state}_time_s"), abs_tol=1e-9)
    assert value(series, "flyte_batch_batchers_running", engine="DynamicBatcher") == 0


async def test_the_queue_and_the_device_are_seen_at_the_moment_of_a_scrape(registry: Any) -> None:
    process = Doubler()
    process.gate.clear()
    async with fb.DynamicBatcher(process, max_batch_size=2, batch_timeout_s=0) as doubler:
        calls = asyncio.create_task(doubler.map(range(5)))
        while not doubler.stats.running:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0)
        found = of_batchers(scraped(registry))
        assert (found["running"], found["total_completed"]) == (2, 0)
        assert found["queued"] == doubler.stats.queued > 0
        process.gate.set()
        await calls
    found = of_batchers(scraped(registry))
    assert (found["running"], found["queued"], found["total_completed"]) == (0, 0, 5)


async def test_two_batchers_of_a_kind_are_added_up_and_other_engines_stand_apart(registry: Any) -> None:
    async with batcher() as one, batcher() as two, fb.EngineBatcher(fb.FakeEngine()) as third:
        await asyncio.gather(one.map(range(3)), two.map(range(4)))
        await third.map([third.engine.prepare(fb.Prompt("hello"))])
        series = scraped(registry)
        assert of_batchers(series) == in_stats(one.stats + two.stats)
        assert of_batchers(series, "FakeEngine") == in_stats(third.stats)
        assert value(series, "flyte_batch_batchers_running", engine="DynamicBatcher") == 2


async def test_records_that_a_dead_engine_took_with_it_are_lost_ones(registry: Any) -> None:
    doubler = fb.EngineBatcher(fb.FakeEngine(dies_after=0))
    await doubler.start()
    record = doubler.engine.prepare(fb.Prompt("hello"))
    with pytest.raises(fb.FlyteBatchError):
        await doubler.map([record] * 5)
    series = scraped(registry)
    assert of_batchers(series, "FakeEngine") == in_stats(doubler.stats)
    assert value(series, "flyte_batch_records_total", engine="FakeEngine", outcome="lost") == 5
    assert value(series, "flyte_batch_records_total", engine="FakeEngine", outcome="failed") == 0
    assert not [labels for name, labels in series if name == "flyte_batch_record_failures_total"]
    await doubler.aclose()
    assert value(scraped(registry), "flyte_batch_engine_deaths_total", engine="FakeEngine") == 1


async def test_nothing_is_lost_when_a_batcher_is_garbage_collected(registry: Any) -> None:
    last = fb.BatchStats()
    for count in (3, 4):
        async with batcher() as doubler:  # nobody scrapes while it lives
            await doubler.map(range(count))
        last += doubler.stats
        del doubler
    gc.collect()
    assert not hooks.live_batchers()
    series = scraped(registry)
    assert of_batchers(series) == in_stats(last)
    assert math.isclose(device_seconds(series, "busy"), last.busy_time_s, abs_tol=1e-9)
    assert math.isclose(device_seconds(series, "starved"), last.starved_time_s, abs_tol=1e-9)
    assert scraped(registry) == series


async def test_a_hook_does_not_keep_a_batcher_or_its_engine_alive(registry: Any) -> None:
    async with fb.EngineBatcher(fb.FakeEngine()) as doubler:
        scraped(registry)
    kept = weakref.ref(doubler), weakref.ref(doubler.engine)
    del doubler
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_a_batcher_whose_loop_was_closed_keeps_its_counts(registry: Any) -> None:
    async def work() -> None:
        doubler = batcher()
        await doubler.start()
        await doubler.map(range(3))

    def work_and_forget() -> None:
        asyncio.run(work())
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed DynamicBatcher"):
        work_and_forget()
    assert not hooks.live_batchers()
    assert of_batchers(scraped(registry))["total_completed"] == 3


class Told:
    """A batcher of which a test says the stats."""

    engine_name = "Told"
    is_running = True

    def __init__(self) -> None:
        self.id = "told"
        self.stats = fb.BatchStats()
        self.stats_source = fb.BatchStats


async def test_busy_seconds_that_turn_out_late_do_not_turn_a_counter_back(registry: Any) -> None:
    """A counter that shrinks is a restart to Prometheus, which would count all of it again."""
    told = Told()
    hooks.register_batcher(told)
    seen = []
    for busy, late in [(10.0, 0.0), (9.9, 0.1), (12.0, 0.1)]:
        told.stats = fb.BatchStats(busy_time_s=busy, late_time_s=late)
        series = scraped(registry)
        seen.append([device_seconds(series, state, "Told") for state in ("busy", "late")])
    assert seen == [[10, 0], [10, 0.1], [12, 0.1]]


async def test_a_batcher_that_began_before_the_hook_is_counted_from_its_start() -> None:
    async with batcher() as doubler:
        await doubler.map(range(3))
        registry = Registry()
        PrometheusHook(registry)
        assert of_batchers(scraped(registry)) == in_stats(doubler.stats)


async def test_scrapes_from_other_threads_see_counters_that_only_grow(registry: Any) -> None:
    """Batchers come, work and go, while two threads scrape."""
    stop = threading.Event()
    sequences: list[list[Series]] = [[], []]

    def scrape(into: list[Series]) -> None:
        while not stop.is_set():
            into.append(scraped(registry))

    threads = [threading.Thread(target=scrape, args=(into,)) for into in sequences]
    for thread in threads:
        thread.start()
    try:
        total = fb.BatchStats()
        for _ in range(30):
            async with batcher(max_batch_size=16) as doubler:
                await doubler.map(range(-10, 100), return_exceptions=True)
            total += doubler.stats
            del doubler
            gc.collect()
    finally:
        stop.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    for series in sequences:
        assert len(series) > 3
        for earlier, later in itertools.pairwise(series):
            shrunk = [key for key, number in earlier.items() if is_counter(key[0]) and later[key] < number]
            assert not shrunk
    assert of_batchers(scraped(registry)) == in_stats(total)


def test_events_of_many_threads_are_all_counted_and_a_scrape_sees_whole_ones(
    registry: Any,
) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=emit, args=[chunk_done(10, 1)] * 2000) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            series = scraped(registry)
            chunks, ok, failed = (value(series, f"flyte_batch_{name}_total", outcome=outcome) for name, outcome in ROWS)
            assert (ok, failed) == (9 * (chunks or 0), chunks)
    finally:
        sys.setswitchinterval(before)
    assert value(scraped(registry), "flyte_batch_chunks_total", outcome="done") == 8000


ROWS = (("chunks", "done"), ("rows", "ok"), ("rows", "failed"))


def is_counter(name: str) -> bool:
    return name.endswith(("_total", "_count", "_sum", "_bucket"))


# -- The exposition ------------------------------------------------------------------------------------------------


async def everything(registry: Any) -> None:
    """Let something of each metric happen that needs no GPU."""
    async with batcher() as doubler:
        await doubler.map(range(-2, 5), return_exceptions=True)
    emit(chunk_done(failures=1, causes={'Bad"\n\\Error': 1}), ev.EngineLoaded(0, "f", 1))


async def test_every_metric_is_exposed_as_it_is_defined(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "latest", lambda: (GPU,))
    await everything(registry)
    families = {family.name: family for family in registry.collect()}
    for metric in metrics.METRICS:
        family = families.pop(metric.name.removesuffix("_total"))
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert not families


async def test_both_formats_are_read_back_by_their_parsers(registry: Any) -> None:
    await everything(registry)
    text = prometheus_client.generate_latest(registry).decode()
    series = parsed(text)
    assert value(series, "flyte_batch_row_failures_total", cause='Bad"\n\\Error') == 1
    families = openmetrics_families(openmetrics.generate_latest(registry).decode())
    read = {sample.name: sample.value for family in families for sample in family.samples}
    assert set(read) == {name for name, _ in series}


async def test_promtools_linter_has_nothing_to_say(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "latest", lambda: (GPU,))
    await everything(registry)
    assert promtool("check", "metrics", text=prometheus_client.generate_latest(registry).decode()) == ""


GPU = gpu.GpuSample(
    at=0, index=1, uuid="GPU-1", name="NVIDIA A10G", utilization=0.75, memory_utilization=0.5, memory_used_bytes=2**30,
    memory_total_bytes=2**34, power_w=180.5, temperature_c=60, sm_clock_mhz=1000, memory_clock_mhz=5000, energy_j=900.0,
    energy_source="counter", throttle_reasons=(),
)  # fmt: skip


def test_gpus_are_what_the_sampler_saw_last(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "latest", lambda: (GPU, replace(GPU, index=2, utilization=None)))
    series = scraped(registry)
    found = {
        name: value(series, f"flyte_batch_gpu_{name}", gpu="1", name="NVIDIA A10G")
        for name in (
            "utilization_ratio", "memory_used_bytes", "memory_size_bytes", "power_watts", "temperature_celsius",
            "energy_joules_total",
        )
    }  # fmt: skip
    assert list(found.values()) == [0.75, 2**30, 2**34, 180.5, 60, 900]
    assert value(series, "flyte_batch_gpu_utilization_ratio", gpu="2", name="NVIDIA A10G") is None


def test_a_registry_takes_one_hook_and_another_when_that_is_closed() -> None:
    registry = Registry()
    hook = PrometheusHook(registry)
    with pytest.raises(BadInput, match="another registry"):
        PrometheusHook(registry)
    hook.close()
    PrometheusHook(registry)


def test_other_metrics_of_the_registry_stand_beside_ours(registry: Any) -> None:
    prometheus_client.Gauge("vllm:num_requests_running", "As vLLM has it.", registry=registry).set(3)
    series = scraped(registry)
    assert value(series, "vllm:num_requests_running") == 3
    assert value(series, "flyte_batch_chunks_running") == 0
