"""OpenTelemetry metrics over the wire say what Prometheus' own say, under names that become the same there."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra monitoring")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

import flyte_batch as fb
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES
from flyte_batch.monitoring import events, hooks, metrics
from flyte_batch.monitoring.events import Scope, Share
from flyte_batch.monitoring.otel import OtelHook
from flyte_batch.monitoring.prometheus import PrometheusHook
from flyte_batch.monitoring.scope import new_scope, scope_entered
from tests.monitoring.otlp_collector import Point, tracing


def in_prometheus(point: Point) -> str:
    """The name that a collector gives a metric there: the unit is added, and ``_total`` to counters."""
    name = point.name.replace(".", "_") + {"s": "_seconds", "": ""}[point.unit]
    return name + "_total" if point.is_counter else name


class OnlyHere(fb.FakeEngine):
    """Tells the batchers of a test from what others have left: metrics name the engine's class."""


async def test_values_are_those_that_prometheus_gets() -> None:
    registry = CollectorRegistry()
    prometheus = PrometheusHook(registry)
    unsubscribe = hooks.subscribe(prometheus)
    try:
        with tracing() as (collector, _):
            batcher = fb.EngineBatcher(OnlyHere(poison={"p 3"}), isolate_failures=True, batch_timeout_s=0.01)
            async with batcher:
                chunk = new_scope("c", 0)
                hooks.emit(events.ChunkStarted(time.time(), chunk, 10))
                with scope_entered(chunk):
                    records = [batcher.engine.prepare(fb.Prompt(f"p {i}")) for i in range(8)]
                    await batcher.map(records, return_exceptions=True)
                hooks.emit(events.RecordFailed(time.time(), chunk, "prepare", "KeyError", "x"))
                hooks.emit(events.ChunkDone(time.time(), chunk, 11, 2, 70, 90, 0.3, {"RuntimeError": 1, "KeyError": 1}))
                hooks.emit(events.ChunkFailed(time.time(), Scope(), "OSError", "disk", 0.1))
                hooks.emit(events.LoopBlocked(time.time(), 2.5, "f"))
            dead: Any = fb.EngineBatcher(OnlyHere(dies_after=0), max_batch_size=1)
            await dead.start()
            texts = ("dies with it", "waits")
            lost = await dead.map([dead.engine.prepare(fb.Prompt(text)) for text in texts], return_exceptions=True)
            assert [type(error) for error in lost] == [fb.EngineDead, fb.BatcherDied]
            await dead.stop()
    finally:
        unsubscribe()
    compared = set()
    for point in collector.points:
        name = in_prometheus(point)
        labels = {key: str(value) for key, value in point.attributes.items()}
        if name == metrics.DEVICE_SECONDS.name:
            continue  # goes on while it is compared, and is told by batcher: see below
        if point.bounds:
            assert registry.get_sample_value(f"{name}_count", labels) == point.count, (name, labels)
            assert registry.get_sample_value(f"{name}_sum", labels) == pytest.approx(point.value), (name, labels)
        else:
            assert registry.get_sample_value(name, labels) == point.value, (name, labels)
        compared.add(name)
    assert compared == {
        metric.name
        for metric in (
            metrics.ROWS, metrics.ROW_FAILURES, metrics.TOKENS, metrics.CHUNKS, metrics.CHUNK_SECONDS, metrics.RECORDS,
            metrics.RECORD_FAILURES, metrics.RECORD_LATENCY, metrics.BATCH_RECORDS, metrics.BATCH_SECONDS,
            metrics.ENGINE_DEATHS, metrics.LOOP_BLOCKED, metrics.RECORDS_QUEUED,
        )
    }  # fmt: skip


async def test_labels_and_buckets_are_those_of_the_definitions() -> None:
    by_name = {metric.name: metric for metric in metrics.METRICS}
    with tracing() as (collector, _):
        async with fb.EngineBatcher(fb.FakeEngine()) as batcher:
            await batcher.map([batcher.engine.prepare(fb.Prompt("p"))])
            hooks.emit(events.LoopBlocked(time.time(), 2.5, "f"))
    assert collector.points
    for point in collector.points:
        metric = by_name[in_prometheus(point)]
        assert set(point.attributes) - {"batcher"} == set(metric.labels)
        assert point.bounds == metric.buckets
        assert point.is_counter == (metric.kind == "counter")


def test_causes_beyond_the_first_so_many_are_others() -> None:
    causes = {f"Error{number}": 1 for number in range(100)}
    with tracing() as (collector, _):
        hooks.emit(events.ChunkDone(time.time(), Scope(), 100, 100, 0, 0, 0.1, causes))
        for cause in causes:
            hooks.emit(events.RecordFailed(time.time(), Scope(), "prepare", cause, ""))
    for name in ("flyte_batch.row_failures", "flyte_batch.record_failures"):
        found = {point.attributes["cause"]: point.value for point in collector.metric(name)}
        assert len(found) == MOST_CAUSES + 1
        assert found[OTHER_CAUSES] == 100 - MOST_CAUSES


async def test_the_time_of_the_device_is_told_by_state_and_the_queue_by_engine() -> None:
    gate = asyncio.Event()

    async def answer(text: str) -> str:
        await gate.wait()
        return text

    engine = OnlyHere(answer)
    batcher = fb.EngineBatcher(engine, max_batch_size=1, batch_timeout_s=0)
    await batcher.start()
    asking = asyncio.ensure_future(batcher.map([engine.prepare(fb.Prompt(f"p {i}")) for i in range(3)]))
    with tracing() as (collector, _):
        async with asyncio.timeout(10):
            while not engine.running or batcher.stats.queued != 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
    gate.set()
    await asking
    await batcher.stop()
    mine = {point.attributes["state"]: point.value for point in collector.points
            if point.attributes.get("batcher") == batcher.id}  # fmt: skip
    assert set(mine) == {"busy", "starved", "assembling", "late"}
    assert mine["busy"] > 0
    assert [point.value for point in collector.metric("flyte_batch.records_queued", engine="OnlyHere")] == [2]


async def test_the_latencies_of_a_large_batch_are_sampled_evenly() -> None:
    latencies = tuple((float(seconds), 10) for seconds in range(1, 41))  # 400 records, 1 s to 40 s
    with tracing() as (collector, _):
        share = Share(Scope(), 400, 0, 1.0, latencies)
        hooks.emit(events.BatchDone(time.time(), "b", 1, time.time(), 400, 0, 1.0, 1.0, False, (share,)))
    (latency,) = collector.metric("flyte_batch.record_latency")
    assert latency.count == 8
    assert latency.value / latency.count == pytest.approx(20.5, abs=1)
    (records,) = collector.metric("flyte_batch.records", outcome="ok")
    assert records.value == 400


async def test_a_batcher_that_started_before_anybody_listened_is_known_by_its_engine() -> None:
    async with fb.EngineBatcher(OnlyHere()) as batcher:
        with tracing() as (collector, _):
            await batcher.map([batcher.engine.prepare(fb.Prompt("p"))])
    (records,) = collector.metric("flyte_batch.records", engine="OnlyHere")
    assert records.value == 1


class Told:
    """A batcher that says what a test wants."""

    id, engine_name, is_running = "told", "Told", True

    def __init__(self) -> None:
        self.stats = fb.BatchStats(busy_time_s=5.0)

    def stats_source(self) -> fb.BatchStats:
        return self.stats


def test_the_device_time_never_falls_when_busy_seconds_turn_out_to_have_been_late_ones_and_ends_with_the_hook() -> None:
    def busy() -> list[float]:
        found = reader.get_metrics_data()
        return [
            point.value
            for resource in (found.resource_metrics if found else ())
            for library in resource.scope_metrics
            for metric in library.metrics
            if metric.name == "flyte_batch.device"
            for point in metric.data.data_points
            if point.attributes == {"engine": "Told", "state": "busy", "batcher": "told"}
        ]

    reader = InMemoryMetricReader()
    hook = OtelHook(meter_provider=MeterProvider([reader]))
    batcher = Told()
    hooks.register_batcher(batcher)
    try:
        assert busy() == [5.0]
        batcher.stats = fb.BatchStats(busy_time_s=4.0, late_time_s=1.0)
        assert busy() == [5.0]
        batcher.stats = fb.BatchStats(busy_time_s=6.0, late_time_s=1.0)
        assert busy() == [6.0]
    finally:
        hook.close()
    batcher.stats = fb.BatchStats(busy_time_s=9.0)
    assert busy() in ([], [6.0])
