"""OpenTelemetry spans over the wire: what they say adds up to the records, and each run has a trace of its own."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra monitoring")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import flyte_batch as fb
from flyte_batch.monitoring import events, hooks, otel, scope
from flyte_batch.monitoring.otel import OtelHook
from flyte_batch.monitoring.scope import new_scope, scope_entered
from tests.helpers import ENVIRONMENT, ROOT
from tests.monitoring.otlp_collector import Collector, Span, collecting, tracing


def batcher_of(kind: str, **engine: Any) -> Any:
    if kind == "continuous":
        return fb.ContinuousBatcher(fb.FakeContinuousEngine(**engine))
    return fb.EngineBatcher(fb.FakeEngine(**engine), batch_timeout_s=0.01, isolate_failures=True)


BATCHERS = pytest.mark.parametrize("kind", ["static", "continuous"])


async def answer(batcher: Any, texts: list[str]) -> list[Any]:
    return await batcher.map([batcher.engine.prepare(fb.Prompt(text)) for text in texts], return_exceptions=True)


@asynccontextmanager
async def chunk_entered(name: str, index: int = 0, rows: int = 1) -> AsyncIterator[events.Scope]:
    """What a worker tells of a chunk."""
    mine = new_scope(name, index)
    hooks.emit(events.ChunkStarted(time.time(), mine, rows))
    try:
        with scope_entered(mine):
            yield mine
        for batcher in hooks.live_batchers():
            batcher.tell()
    except BaseException as error:
        hooks.emit(events.ChunkFailed(time.time(), mine, type(error).__name__, str(error), 0.1))
        raise
    hooks.emit(events.ChunkDone(time.time(), mine, rows, 0, 10 * rows, 20 * rows, 0.1))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """Names of run and action by task of asyncio: Flyte's context, without Flyte."""
    names: dict[str, tuple[str, str]] = {}

    def action_source() -> tuple[str, str]:
        task = asyncio.current_task()
        return names.get(task.get_name() if task else "", ("", ""))

    monkeypatch.setattr(scope, "action_source", action_source)
    return names


def total(spans: list[Span], name: str) -> float:
    return sum(span.attributes[name] for span in spans)


@BATCHERS
async def test_two_runs_that_share_a_batcher_have_a_complete_trace_each_with_links_to_the_other(
    kind: str, runs: dict[str, tuple[str, str]]
) -> None:
    counts = {"anna": 30, "bob": 20}
    for name in counts:
        runs[name] = (f"run-{name}", f"action-{name}")

    with tracing(sample_records=1) as (collector, provider):
        tracer = provider.get_tracer("flyte")

        async def work(name: str, batcher: Any) -> None:
            with tracer.start_as_current_span(f"task {name}"):
                async with chunk_entered(f"chunk-{name}", 1, counts[name]):
                    await answer(batcher, [f"{name} {i}" for i in range(counts[name])])

        async with batcher_of(kind) as batcher, asyncio.TaskGroup() as group:
            for name in counts:
                group.create_task(work(name, batcher), name=name)

    chunks = {name: next(c for c in collector.named("chunk") if c.attributes["flyte_batch.chunk.id"] == f"chunk-{name}")
              for name in counts}  # fmt: skip
    assert chunks["anna"].trace_id != chunks["bob"].trace_id
    for name, count in counts.items():
        chunk = chunks[name]
        task = collector.one(f"task {name}")
        assert chunk.parent_id == task.span_id
        assert chunk.attributes["flyte.run_name"] == f"run-{name}"
        assert chunk.attributes["flyte.action_name"] == f"action-{name}"
        batches = collector.named("batch", chunk.trace_id)
        assert total(batches, "flyte_batch.records") == count
        assert chunk.attributes["flyte_batch.records"] == count
        assert {batch.attributes["flyte.run_name"] for batch in batches} == {f"run-{name}"}
        records = collector.named("record", chunk.trace_id)
        assert len(records) == count
        assert {tuple(collector.path(r)) for r in records} == {(f"task {name}", "chunk", "batch", "record")}
        for batch in batches:
            assert sum(record.parent_id == batch.span_id for record in records) == batch.attributes[
                "flyte_batch.records"]  # fmt: skip
            assert chunk.span_id in {link.span_id for link in batch.links}
    shared = [batch for batch in collector.named("batch", chunks["anna"].trace_id) if len(batch.links) == 2]
    assert shared, "no batch was shared"
    for batch in shared:
        other = next(link for link in batch.links if link.trace_id != batch.trace_id)
        assert other.span_id == chunks["bob"].span_id
        assert sum(link.attributes["flyte_batch.records"] for link in batch.links) == batch.attributes[
            "flyte_batch.batch.records"]  # fmt: skip


@BATCHERS
async def test_times_are_those_of_the_batch_and_of_each_record_from_queue_to_outcome(kind: str) -> None:
    before = time.time()
    delay = {"seconds_per_step": 0.01} if kind == "continuous" else {"seconds_per_batch": 0.05}
    with tracing(sample_records=1) as (collector, _):
        async with batcher_of(kind, **delay) as batcher, chunk_entered("c"):
            await answer(batcher, ["one two three four"])
    after = time.time()
    batch, record, chunk = collector.one("batch"), collector.one("record"), collector.one("chunk")
    assert before <= chunk.start <= record.start <= batch.start + 0.001
    assert batch.end - batch.start > 0.02
    assert record.end == batch.end <= chunk.end <= after


async def test_chunks_of_one_run_share_a_batch_span_below_the_one_that_has_most_of_it() -> None:
    with tracing(sample_records=1) as (collector, provider):
        async with batcher_of("static") as batcher:

            async def work(name: str, count: int) -> None:
                async with chunk_entered(name):
                    await answer(batcher, [f"{name} {i}" for i in range(count)])

            with provider.get_tracer("flyte").start_as_current_span("driver"):
                await asyncio.gather(work("small", 5), work("big", 9))
    by_name = {chunk.attributes["flyte_batch.chunk.id"]: chunk for chunk in collector.named("chunk")}
    batch = collector.one("batch")
    assert batch.parent_id == by_name["big"].span_id
    assert batch.attributes["flyte_batch.records"] == 14
    assert {link.span_id: link.attributes["flyte_batch.records"] for link in batch.links} == {
        by_name["small"].span_id: 5, by_name["big"].span_id: 9,
    }  # fmt: skip
    of_chunks = [record.attributes["flyte_batch.chunk.id"] for record in collector.named("record")]
    assert (of_chunks.count("small"), of_chunks.count("big")) == (5, 9)


async def test_records_outside_of_chunks_are_their_callers() -> None:
    with tracing(sample_records=1) as (collector, provider):
        async with batcher_of("static") as batcher:
            with provider.get_tracer("web").start_as_current_span("POST /answer"):
                await answer(batcher, ["one", "two"])
            await answer(batcher, ["nobody's"])
    request = collector.one("POST /answer")
    (batch,) = collector.named("batch", request.trace_id)
    assert collector.path(batch) == ["POST /answer", "batch"]
    assert [link.span_id for link in batch.links] == [request.span_id]
    (alone,) = [each for each in collector.named("batch") if each is not batch]
    assert (alone.parent_id, alone.links, alone.attributes["flyte_batch.records"]) == ("", [], 1)
    assert len(collector.named("record")) == 3


async def test_records_of_two_runs_that_are_in_no_trace_are_a_batch_each(runs: dict[str, tuple[str, str]]) -> None:
    runs.update(anna=("run-anna", "a"), bob=("run-bob", "b"))
    with tracing() as (collector, _):
        async with batcher_of("static") as batcher, asyncio.TaskGroup() as group:
            for name, count in (("anna", 3), ("bob", 2)):
                group.create_task(answer(batcher, [f"{name} {i}" for i in range(count)]), name=name)
    found = {span.attributes["flyte.run_name"]: span.attributes["flyte_batch.records"]
             for span in collector.named("batch")}  # fmt: skip
    assert found == {"run-anna": 3, "run-bob": 2}


async def test_what_the_callers_own_code_traces_in_a_chunk_nests_in_it_and_what_comes_after_does_not() -> None:
    with tracing() as (collector, provider):
        tracer = provider.get_tracer("own")
        with tracer.start_as_current_span("task"):
            async with chunk_entered("c"):
                await asyncio.to_thread(lambda: tracer.start_span("read").end())
            with pytest.raises(OSError):
                async with chunk_entered("d"):
                    raise OSError("disk")
            tracer.start_span("after").end()
    assert collector.path(collector.one("read")) == ["task", "chunk", "read"]
    assert collector.path(collector.one("after")) == ["task", "after"]


@BATCHERS
async def test_failed_records_are_exceptions_on_their_batch_and_a_batch_of_only_those_has_failed(kind: str) -> None:
    fail = {f"p {i}" for i in range(4)} | {"long"}
    with tracing(message_chars=30) as (collector, _):
        async with batcher_of(kind, fail_on=fail) as batcher:
            async with chunk_entered("mixed"):
                await answer(batcher, [f"p {i}" for i in range(10)])
                await answer(batcher, ["p 3", "p 8"])
            async with chunk_entered("lost"):
                await answer(batcher, ["long"])
    mixed, lost = (next(c for c in collector.named("chunk") if c.attributes["flyte_batch.chunk.id"] == name)
                   for name in ("mixed", "lost"))  # fmt: skip
    batches = [span for span in collector.named("batch") if span.parent_id == mixed.span_id]
    assert total(batches, "flyte_batch.failed") == 5
    for each in batches:
        assert each.failed is (each.attributes["flyte_batch.failed"] == each.attributes["flyte_batch.records"])
    exceptions = [event for batch in batches for event in batch.events]
    assert [event.name for event in exceptions] == ["exception"] * 5
    assert {event.attributes["exception.type"] for event in exceptions} == {"BadRecord"}
    assert all(0 < len(event.attributes["exception.message"]) <= 30 for event in exceptions)
    (batch,) = [span for span in collector.named("batch") if span.parent_id == lost.span_id]
    assert batch.failed
    assert batch.attributes["error.type"] == "BadRecord"
    assert not mixed.failed, "rows that fail are no failure of the chunk"


async def test_a_batch_of_another_batcher_in_between_does_not_take_the_exceptions() -> None:
    with tracing() as (collector, _):
        async with chunk_entered("c") as mine:
            hooks.emit(events.RecordFailed(time.time(), mine, "infer", "BadRecord", "", "b1"))
            for batcher, failed in (("b2", 0), ("b1", 1)):
                share = events.Share(mine, 2, failed, 1.0, ())
                now = time.time()
                hooks.emit(events.BatchDone(now, batcher, 1, now, 2, failed, 1.0, 1.0, False, (share,)))
    told = {batch.attributes["flyte_batch.batcher.id"]: len(batch.events) for batch in collector.named("batch")}
    assert told == {"b1": 1, "b2": 0}


async def test_a_batch_that_is_split_and_tried_again_is_in_the_trace_with_its_parts_only() -> None:
    with tracing(sample_records=1) as (collector, _):
        async with batcher_of("static", poison={"p 3"}) as batcher, chunk_entered("c"):
            await answer(batcher, [f"p {i}" for i in range(8)])
    batches = collector.named("batch")
    assert total(batches, "flyte_batch.records") == 8
    assert total(batches, "flyte_batch.failed") == 1
    assert len(collector.named("record")) == 8


async def test_rows_that_fail_before_or_after_the_batcher_are_exceptions_on_the_chunk() -> None:
    with tracing(message_chars=0) as (collector, _):
        async with chunk_entered("c") as mine:
            hooks.emit(events.RecordFailed(time.time(), mine, "finish", "ValueError", "no number in 'secret'"))
    (event,) = collector.one("chunk").events
    assert event.name == "exception"
    assert event.attributes == {"exception.type": "ValueError", "flyte_batch.stage": "finish"}


async def test_a_message_that_has_no_encoding_is_escaped() -> None:
    with tracing() as (collector, _):
        async with chunk_entered("c") as mine:
            hooks.emit(events.RecordFailed(time.time(), mine, "finish", "ValueError", "no number in '\ud83d'"))
    (event,) = collector.one("chunk").events
    assert event.attributes["exception.message"] == "no number in '\\ud83d'"


async def test_a_chunk_that_fails_says_why_and_one_that_is_done_says_what_it_used() -> None:
    with tracing() as (collector, _):
        async with chunk_entered("good", 3, 7):
            pass
        with pytest.raises(OSError):
            async with chunk_entered("bad", 4):
                raise OSError("disk full")
    good, bad = sorted(collector.named("chunk"), key=lambda chunk: chunk.failed)
    assert (good.failed, good.attributes["flyte_batch.chunk.index"]) == (False, 3)
    assert good.attributes["flyte_batch.chunk.rows"] == 7
    assert good.attributes["gen_ai.usage.input_tokens"] == 70
    assert good.attributes["gen_ai.usage.output_tokens"] == 140
    assert good.attributes["flyte_batch.replica"] == scope.process_name()
    assert (bad.failed, bad.attributes["error.type"]) == (True, "OSError")
    assert bad.events[0].attributes == {"exception.type": "OSError", "exception.message": "disk full"}


@BATCHERS
async def test_an_engine_that_dies_is_told_of_on_the_chunks_that_it_was_working_for(kind: str) -> None:
    with tracing() as (collector, _):
        async with chunk_entered("elsewhere"), chunk_entered("here"):
            batcher = batcher_of(kind, dies_after=0)
            await batcher.start()
            results = await asyncio.gather(answer(batcher, ["one"]), return_exceptions=True)
            await batcher.stop()
    assert results
    chunks = {chunk.attributes["flyte_batch.chunk.id"]: chunk for chunk in collector.named("chunk")}
    died = [event for event in chunks["here"].events if "flyte_batch.lost" in event.attributes]
    assert [event.attributes["exception.type"] for event in died] == ["EngineDead"]
    assert died[0].attributes["flyte_batch.batcher.id"] == batcher.id
    assert chunks["elsewhere"].events == []


async def test_a_blocked_loop_is_told_of_on_every_chunk_under_way_from_whatever_thread() -> None:
    with tracing() as (collector, _):
        async with chunk_entered("c"):
            blocked = events.LoopBlocked(time.time(), 1.5, "work (mine.py)")
            await asyncio.to_thread(hooks.emit, blocked)
    (event,) = collector.one("chunk").events
    assert event.name == "flyte_batch.loop.blocked"
    assert event.attributes == {"flyte_batch.seconds": 1.5, "flyte_batch.code": "work (mine.py)"}


async def test_a_model_load_is_a_span_below_the_chunk_that_waits_for_it_with_links_to_the_others() -> None:
    with tracing() as (collector, _):
        hooks.emit(events.EngineLoaded(time.time(), "warm", 2.0))
        async with chunk_entered("a"), chunk_entered("b"):
            hooks.emit(events.EngineLoaded(time.time(), "solver", 2.0, "OSError"))
    load, warm = sorted(collector.named("load"), key=lambda span: span.attributes["flyte_batch.engine.factory"])
    chunks = {chunk.attributes["flyte_batch.chunk.id"]: chunk for chunk in collector.named("chunk")}
    assert load.parent_id == chunks["a"].span_id
    assert [link.span_id for link in load.links] == [chunks["b"].span_id]
    assert load.end - load.start == pytest.approx(2.0, abs=1e-5)
    assert (load.failed, load.attributes["error.type"]) == (True, "OSError")
    assert (warm.parent_id, warm.failed) == ("", False)


def run_events(mine: events.Scope, error: str = "") -> tuple[events.RunStarted, events.RunEnded]:
    started = events.RunStarted(time.time(), mine, "out", 100, 10, 10, 1)
    return started, events.RunEnded(time.time(), mine, "out", 100, 3, 0.5, error)


async def test_a_run_without_flyte_is_the_root_of_its_chunks() -> None:
    with tracing() as (collector, _):
        mine = new_scope()
        started, ended = run_events(mine)
        hooks.emit(started)
        async with batcher_of("static") as batcher:

            async def work(name: str) -> None:
                async with chunk_entered(name):
                    await answer(batcher, [name])

            await asyncio.gather(work("a"), work("b"))
        hooks.emit(events.ChunkReported(time.time(), mine, "b", 1, 10, error="EngineDead"))
        hooks.emit(ended)
        async with chunk_entered("of nobody"):
            pass
    run = collector.one("run")
    assert run.attributes["flyte_batch.run.rows_planned"] == 100
    assert run.attributes["flyte_batch.run.rows"] == 100
    assert run.attributes["flyte_batch.run.failures"] == 3
    assert (run.parent_id, run.failed) == ("", False)
    assert {tuple(collector.path(batch)) for batch in collector.named("batch")} == {("run", "chunk", "batch")}
    (event,) = run.events
    assert event.attributes == {
        "error.type": "EngineDead", "flyte_batch.chunk.id": "b", "flyte_batch.chunk.index": 1
    }  # fmt: skip
    roots = [chunk for chunk in collector.named("chunk") if not chunk.parent_id]
    assert [chunk.attributes["flyte_batch.chunk.id"] for chunk in roots] == ["of nobody"]


async def test_actions_know_the_runs_span_from_its_start_to_its_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}

    @contextmanager
    def action_context(**texts: str) -> Iterator[None]:
        known.update(texts)
        yield
        known.clear()

    monkeypatch.setattr(scope, "action_context", action_context)
    with tracing() as (collector, _):
        started, ended = run_events(new_scope())
        hooks.emit(started)
        during = dict(known)
        hooks.emit(ended)
    run = collector.one("run")
    assert during["traceparent"].split("-")[1:3] == [run.trace_id, run.span_id]
    assert known == {}


async def test_a_run_that_gives_up_has_failed() -> None:
    with tracing() as (collector, _):
        for event in run_events(new_scope(), "ChunkFailed"):
            hooks.emit(event)
    run = collector.one("run")
    assert (run.failed, run.attributes["error.type"]) == (True, "ChunkFailed")


async def test_so_many_records_get_a_span_as_the_sample_says_and_every_one_has_the_same_chance() -> None:
    with tracing(sample_records=0.1, rng=random.Random(7)) as (collector, _):
        async with batcher_of("static") as batcher, chunk_entered("c"):
            await answer(batcher, [f"p {i}" for i in range(5_000)])
    first = len(collector.named("record"))
    assert 400 < first < 600  # 500, give or take 21
    assert total(collector.named("batch"), "flyte_batch.records") == 5_000
    with tracing(sample_records=0.1, rng=random.Random(7)) as (again, _):
        for _ in range(5):  # however they are grouped, the same draws
            share = events.Share(events.Scope(), 1_000, 0, 1.0, ((0.1, 400), (0.2, 600)))
            hooks.emit(events.BatchDone(time.time(), "b", 1, time.time(), 1_000, 0, 1.0, 1.0, False, (share,)))
    assert len(again.named("record")) == first
    with tracing(sample_records=0) as (none, _):
        async with batcher_of("static") as batcher, chunk_entered("c"):
            await answer(batcher, ["p"])
    assert none.named("record") == []


async def test_a_chunk_of_very_many_batches_has_spans_for_the_first_and_for_those_with_sampled_records() -> None:
    with tracing(batches_per_chunk=3, sample_records=0) as (collector, _):
        async with batcher_of("static") as batcher, chunk_entered("c"):
            for i in range(8):
                await answer(batcher, [f"p {i}"])
    assert len(collector.named("batch")) == 3
    chunk = collector.one("chunk")
    assert (chunk.attributes["flyte_batch.records"], chunk.attributes["flyte_batch.batches"]) == (8, 8)
    with tracing(batches_per_chunk=0, sample_records=1) as (collector, _):
        async with batcher_of("static") as batcher, chunk_entered("c"):
            await answer(batcher, ["p"])
    assert collector.path(collector.one("record")) == ["chunk", "batch", "record"]


async def test_what_an_unsampled_trace_holds_is_not_traced_either() -> None:
    with tracing(sample_records=1) as (collector, _):
        unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("flyte")
        async with batcher_of("static") as batcher:
            with unsampled.start_as_current_span("task"):
                async with chunk_entered("c"):
                    await answer(batcher, ["one"])
    assert collector.spans == []


async def test_a_batch_of_very_many_callers_has_a_bounded_number_of_links() -> None:
    with tracing() as (collector, provider):
        tracer = provider.get_tracer("web")
        async with batcher_of("static") as batcher:

            async def request(number: int) -> None:
                with tracer.start_as_current_span("request"):
                    await answer(batcher, [f"p {number}"])

            await asyncio.gather(*(request(i) for i in range(100)))
    batches = collector.named("batch")
    assert total(batches, "flyte_batch.records") == 100
    assert len({batch.trace_id for batch in batches}) == 100
    assert {len(batch.links) for batch in batches} == {64}
    assert all(batch.parent_id in {link.span_id for link in batch.links} for batch in batches)


async def test_chunks_whose_end_never_comes_are_ended_when_there_are_too_many() -> None:
    with tracing() as (collector, provider):
        for number in range(1_005):
            hooks.emit(events.ChunkStarted(time.time(), events.Scope("r", "a", f"c{number}", number), 1))
        async with asyncio.timeout(20):
            while len(collector.named("chunk")) < 5:
                await asyncio.to_thread(provider.force_flush)
        oldest = collector.named("chunk")
    assert [chunk.attributes["flyte_batch.chunk.index"] for chunk in oldest] == [0, 1, 2, 3, 4]
    assert sum(chunk.attributes["flyte_batch.unfinished"] for chunk in collector.named("chunk")) == 1_005


async def test_closing_ends_what_is_open_and_gives_the_trace_source_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> object:
        return None

    monkeypatch.setattr(scope, "trace_source", other)
    with tracing() as (collector, provider), provider.get_tracer("t").start_as_current_span("task") as span:
        mine = new_scope("c")
        assert mine.trace == span.get_span_context()
        hooks.emit(events.ChunkStarted(time.time(), mine, 1))
        hooks.emit(run_events(events.Scope())[0])
    assert scope.trace_source is other
    assert collector.one("chunk").attributes["flyte_batch.unfinished"] is True
    assert collector.one("run").attributes["flyte_batch.unfinished"] is True


async def test_an_event_of_a_chunk_that_nobody_started_does_no_harm() -> None:
    with tracing() as (collector, _):
        stray = events.Scope("run", "action", "chunk", 1)
        hooks.emit(events.RecordsSubmitted(time.time(), "b", stray, 1, 1.0, 0))
        hooks.emit(events.RecordFailed(time.time(), stray, "prepare", "ValueError", ""))
        hooks.emit(events.ChunkDone(time.time(), stray, 1, 0, 1, 1, 0.1))
        hooks.emit(events.RunEnded(time.time(), stray, "out", 1, 0, 0.1))
    assert collector.spans == []


async def test_without_a_provider_nothing_is_traced_and_nothing_breaks() -> None:
    hook = OtelHook(trace.NoOpTracerProvider())
    unsubscribe = hooks.subscribe(hook)
    try:
        async with batcher_of("static") as batcher, chunk_entered("c"):
            (result,) = await answer(batcher, ["one"])
    finally:
        unsubscribe()
        hook.close()
    assert result.text == "echo: one"
    assert not trace.get_current_span().get_span_context().is_valid


def a_batch(number: int) -> events.BatchDone:
    share = events.Share(events.Scope(), 1, 0, 1.0, ((0.1, 1),))
    return events.BatchDone(time.time(), "b", number, time.time(), 1, 0, 1.0, 1.0, False, (share,))


class Held(SpanProcessor):
    """Keeps whoever ends a span until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ended: list[str] = []

    def on_end(self, span: ReadableSpan) -> None:
        assert self.go.wait(20)
        self.ended.append(span.name)


def test_a_provider_that_stands_still_holds_up_nobody_and_what_is_too_much_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "_MOST_QUEUED", 100)
    held = Held()
    provider = TracerProvider()
    provider.add_span_processor(held)
    hook = OtelHook(provider, sample_records=0)
    for number in range(120):
        hook.on_event(a_batch(number))
    copy_context().run(hook.on_event, events.ChunkStarted(time.time(), new_scope("c"), 1))
    assert held.ended == []
    held.go.set()
    hook.close()
    assert held.ended.count("batch") in range(100, 103)
    assert [record.message for record in caplog.records if record.name == "flyte_batch.monitoring.otel"] == [
        "more happens than OpenTelemetry can be told: its spans and metrics miss some of it"
    ]


class Broken(SpanProcessor):
    """Fails on the first spans that end."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        if self.left:
            self.left -= 1
            raise OSError("broken")
        self.ended += 1


def test_a_provider_that_fails_is_asked_again_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken(2)
    provider = TracerProvider()
    provider.add_span_processor(broken)
    hook = OtelHook(provider, sample_records=0)
    for number in range(5):
        hook.on_event(a_batch(number))
    hook.close()
    assert broken.ended == 3
    assert len([record for record in caplog.records if record.name == "flyte_batch.monitoring.otel"]) == 1


LEFT_OPEN = """
import time
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from flyte_batch.monitoring import events
from flyte_batch.monitoring.otel import OtelHook

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter({url!r})))
hook = OtelHook(provider, sample_records=0)
chunk = events.Scope("run", "action", "chunk", 1)
hook.on_event(events.ChunkStarted(time.time(), chunk, 1))
share = events.Share(chunk, 1, 0, 1.0, ((0.1, 1),))
hook.on_event(events.BatchDone(time.time(), "b", 1, time.time(), 1, 0, 1.0, 1.0, False, (share,)))
"""


def test_a_program_that_ends_without_closing_loses_nothing() -> None:
    with collecting() as collector:
        program = LEFT_OPEN.format(url=f"{collector.url}/v1/traces")
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=60)
    assert collector.path(collector.one("batch")) == ["chunk", "batch"]
    assert collector.one("chunk").attributes["flyte_batch.records"] == 1
    assert collector.one("chunk").attributes["flyte_batch.unfinished"] is True


async def test_batchers_on_several_loops_can_be_told_of_at_once() -> None:
    with tracing(sample_records=1) as (collector, _):

        async def work(name: str) -> None:
            async with batcher_of("static") as batcher, chunk_entered(name):
                await asyncio.gather(*(answer(batcher, [f"{name} {i}"] * 20) for i in range(20)))

        threads = [threading.Thread(target=asyncio.run, args=(work(f"t{i}"),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    for chunk in collector.named("chunk"):
        assert len(collector.named("record", chunk.trace_id)) == 400
        assert chunk.attributes["flyte_batch.records"] == 400


@pytest.mark.parametrize(
    ("option", "value"), [("sample_records", 1.5), ("batches_per_chunk", -1), ("message_chars", -1)]
)
def test_an_option_that_cannot_work_is_refused(option: str, value: float) -> None:
    before = scope.trace_source
    with pytest.raises(fb.BadInput, match=option):
        OtelHook(**{option: value})  # type: ignore[arg-type]
    assert scope.trace_source is before


def test_the_collector_refuses_a_trace_with_a_hole() -> None:
    span = Span("a", "t", "s", "missing", 0, 0, {}, [], [], False, "", "")
    with pytest.raises(KeyError):
        Collector("", [span]).path(span)
