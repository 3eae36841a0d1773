"""What batchers, workers, drivers, singletons and the guard tell, and that telling never costs anybody a batch."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flyte_batch as fb
from flyte_batch import guard
from flyte_batch.data.chunks import Chunk, plan_chunks
from flyte_batch.data.sources import open_source
from flyte_batch.errors import EngineOutOfMemory
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.details import ChunkDetails
from flyte_batch.monitoring.events import BatchDone, Event
from flyte_batch.monitoring.scope import new_scope, scope_entered, scope_of
from flyte_batch.report.run_log import logs_from_json
from tests.helpers import questions


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def by_scope(self) -> Counter[Any]:
        counts: Counter[Any] = Counter()
        for event in self.of(BatchDone):
            for share in event.shares:
                counts[share.scope] += share.records
        return counts


@contextmanager
def listening() -> Iterator[Listener]:
    listener = Listener()
    unsubscribe = hooks.subscribe(listener)
    try:
        yield listener
    finally:
        unsubscribe()


@pytest.fixture
def heard() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


def batchers(**options: Any) -> list[Callable[[], Any]]:
    return [
        lambda: fb.EngineBatcher(fb.FakeEngine(**options), max_batch_size=8, batch_timeout_s=0.001),
        lambda: fb.ContinuousBatcher(fb.FakeContinuousEngine(**options), max_in_flight=8),
    ]


BOTH = pytest.mark.parametrize("kind", [0, 1], ids=["batches", "continuous"])


# -- Batchers ---------------------------------------------------------------


@BOTH
async def test_each_record_is_told_of_once_with_its_own_callers_scope(kind: int, heard: Listener) -> None:
    async with batchers()[kind]() as batcher:
        scopes = [events.Scope(run="r", action=f"a{number}", chunk=f"c{number}") for number in range(3)]

        async def call(scope: events.Scope, number: int) -> None:
            records = [batcher.engine.prepare(fb.Prompt(f"one {i}")) for i in range(number)]
            with scope_entered(scope):
                await batcher.map(records[: number // 2])
                await asyncio.gather(*[await batcher.submit(record) for record in records[number // 2 :]])

        await asyncio.gather(*(call(scope, 10 * (at + 1)) for at, scope in enumerate(scopes)))
        stats = batcher.stats
    assert heard.by_scope() == {scopes[0]: 10, scopes[1]: 20, scopes[2]: 30}
    submitted: Counter[Any] = Counter()
    for event in heard.of(events.RecordsSubmitted):
        submitted[event.scope] += event.records
    assert submitted == heard.by_scope()
    done = heard.of(BatchDone)
    assert sum(event.records for event in done) == stats.total_completed == 60
    assert sum(event.records for event in heard.of(events.BatchFormed)) == 60
    assert all(event.started_at <= event.at and 0 < event.fill <= 1 for event in done)
    assert all(seconds >= 0 for event in done for share in event.shares for seconds, _ in share.latencies)
    assert sum(number for event in done for share in event.shares for _, number in share.latencies) == 60
    assert {event.batcher for event in done} == {batcher.id}
    assert sum(event.cost for event in done) == pytest.approx(stats.total_batch_cost)


@BOTH
async def test_events_come_in_the_order_of_their_times_and_a_death_after_what_came_before_it(
    kind: int, heard: Listener
) -> None:
    batcher = batchers(dies_after=24)[kind]()
    await batcher.start()
    await batcher.map([batcher.engine.prepare(fb.Prompt("one")) for _ in range(8)])
    records = [batcher.engine.prepare(fb.Prompt("one")) for _ in range(500)]
    await batcher.map(records, return_exceptions=True)
    await batcher.stop()
    assert isinstance(heard.events[-1], events.EngineDied)
    assert all(event.fill > 0 for event in heard.of(events.BatchFormed))
    first = [next(event.at for event in heard.events if isinstance(event, kind)) for kind in (
        events.RecordsSubmitted, events.BatchFormed, events.BatchDone, events.EngineDied)]  # fmt: skip
    assert first == sorted(first)


def test_batchers_of_event_loops_on_several_threads_tell_of_all_their_records(heard: Listener) -> None:
    class Lingering:
        def on_event(self, event: Event) -> None:
            time.sleep(0.0005)  # so that the threads are in it at the same time

    failed: list[Any] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with batchers()[1]() as batcher:
            for _ in range(20):
                await batcher.map([batcher.engine.prepare(fb.Prompt("one")) for _ in range(20)])

    unsubscribe = hooks.subscribe(Lingering())
    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unsubscribe()
    assert failed == []
    assert sum(event.records for event in heard.of(BatchDone)) == 3 * 20 * 20
    assert sum(event.records for event in heard.of(events.RecordsSubmitted)) == 3 * 20 * 20


async def test_what_came_back_is_told_where_the_next_batch_was_taken_back(heard: Listener) -> None:
    async def process(batch: list[int]) -> list[int]:
        return batch  # the loop does not turn meanwhile, so callers have theirs before the next batch

    async with fb.DynamicBatcher(process, max_batch_size=2, batch_timeout_s=60) as batcher:
        futures = await batcher.submit_batch(range(4))

        def give_up(_: object) -> None:
            for each in futures[2:]:
                each.cancel()

        futures[0].add_done_callback(give_up)
        await asyncio.gather(*futures[:2])
        async with asyncio.timeout(10):
            while not heard.of(BatchDone):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert sum(event.records for event in heard.of(BatchDone)) == 2


@BOTH
async def test_events_of_batches_are_told_in_no_callers_context(kind: int) -> None:
    name = contextvars.ContextVar("name", default="nobody's")
    told_in: list[str] = []

    class Where:
        def on_event(self, event: Event) -> None:
            if isinstance(event, events.BatchFormed | BatchDone | events.RecordsSubmitted):
                told_in.append(name.get())

    unsubscribe = hooks.subscribe(Where())
    async with batchers()[kind]() as batcher:
        name.set("a caller's")
        for _ in range(3):
            await batcher.map([batcher.engine.prepare(fb.Prompt("one"))])
            batcher.tell()
    unsubscribe()
    assert set(told_in) == {"nobody's"}


async def test_records_that_come_out_in_one_step_are_one_event(heard: Listener) -> None:
    async with fb.ContinuousBatcher(fb.FakeContinuousEngine(), max_in_flight=64) as batcher:
        await batcher.map([batcher.engine.prepare(fb.Prompt("same length")) for _ in range(64)])
    assert len(heard.of(BatchDone)) < 16


@BOTH
async def test_a_record_that_failed_is_named_with_its_cause_and_counted_in_its_callers_share(
    kind: int, heard: Listener
) -> None:
    async with batchers(fail_on={"bad"})[kind]() as batcher:
        records = [batcher.engine.prepare(fb.Prompt(text)) for text in ("good", "bad", "fine")]
        with scope_entered(scope := events.Scope(action="mine")):
            await batcher.map(records, return_exceptions=True)
    (failed,) = heard.of(events.RecordFailed)
    assert (failed.scope, failed.stage, failed.error, failed.batcher) == (scope, "infer", "BadRecord", batcher.id)
    assert sum(share.failed for event in heard.of(BatchDone) for share in event.shares) == 1
    assert sum(event.failed for event in heard.of(BatchDone)) == 1


async def test_a_batch_that_is_split_is_told_of_without_outcomes_and_its_records_once(heard: Listener) -> None:
    async def process(batch: list[int]) -> list[int]:
        if len(batch) > 2:
            raise EngineOutOfMemory("too much")
        return batch

    async with fb.DynamicBatcher(process, max_batch_size=8, batch_timeout_s=0.001) as batcher:
        await batcher.map(range(8))
        assert batcher.stats.out_of_memory == sum(event.out_of_memory for event in heard.of(BatchDone)) >= 1
    assert all(
        not event.shares and event.failed == event.records for event in heard.of(BatchDone) if event.out_of_memory
    )
    assert sum(heard.by_scope().values()) == 8


async def test_no_batch_waits_until_the_one_before_was_told_of() -> None:
    started: list[int] = []
    seen: list[tuple[int, int]] = []  # batch, batches that were started when it was told of

    class Late:
        def on_event(self, event: Event) -> None:
            if isinstance(event, BatchDone):
                seen.append((event.batch, len(started)))

    def process(batch: list[int]) -> list[int]:
        started.append(len(batch))
        time.sleep(0.02)
        return batch

    unsubscribe = hooks.subscribe(Late())
    async with fb.DynamicBatcher(process, max_batch_size=4, batch_timeout_s=0.001) as batcher:
        await asyncio.gather(*await batcher.submit_batch(range(20)))
    unsubscribe()
    assert seen == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.lists(st.sampled_from(["ok", "bad", "poison"]), min_size=1, max_size=12), min_size=1, max_size=5),
    isolate=st.booleans(),
    cancelled=st.sets(st.integers(0, 4)),
)
async def test_what_is_told_adds_up_to_the_batchers_own_figures_whatever_happens(
    calls: list[list[str]], isolate: bool, cancelled: set[int]
) -> None:
    def process(batch: list[str]) -> list[Any]:
        if "poison" in batch:
            raise RuntimeError("a bug")
        return [ValueError("bad") if record == "bad" else record for record in batch]

    with listening() as heard:
        options: dict[str, Any] = {"max_batch_size": 4, "batch_timeout_s": 0.0, "isolate_failures": isolate}
        async with fb.DynamicBatcher[str, str](process, **options) as batcher:
            tasks = [asyncio.ensure_future(batcher.map(call, return_exceptions=True)) for call in calls]
            await asyncio.sleep(0)
            for index in cancelled:
                if index < len(tasks):
                    tasks[index].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        stats = batcher.stats
    done = heard.of(BatchDone)
    shares = [share for event in done for share in event.shares]
    assert sum(share.records for share in shares) == stats.total_completed
    assert sum(share.failed for share in shares) == stats.total_failed == len(heard.of(events.RecordFailed))
    assert sum(event.records for event in heard.of(events.RecordsSubmitted)) == stats.total_submitted
    assert (len(done), sum(event.records for event in done)) == (stats.total_batches, stats.total_batch_records)


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.lists(st.sampled_from(["ok", "bad", "long"]), min_size=1, max_size=12), min_size=1, max_size=5),
    cancelled=st.sets(st.integers(0, 4)),
    most=st.integers(1, 8),
    memory=st.sampled_from([None, 3]),
)
async def test_what_a_continuous_batcher_tells_adds_up_to_its_own_figures_whatever_happens(
    calls: list[list[str]], cancelled: set[int], most: int, memory: int | None
) -> None:
    engine = fb.FakeContinuousEngine(
        lambda text: "word " * (9 if text == "long" else 1), fail_on={"bad"}, largest_flight=memory
    )
    with listening() as heard:
        async with fb.ContinuousBatcher(engine, max_in_flight=most) as batcher:
            prepared = [[engine.prepare(fb.Prompt(text)) for text in call] for call in calls]
            tasks = [asyncio.ensure_future(batcher.map(call, return_exceptions=True)) for call in prepared]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for index in cancelled:
                if index < len(tasks):
                    tasks[index].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        stats = batcher.stats
    done = heard.of(BatchDone)
    shares = [share for event in done for share in event.shares]
    assert sum(share.records for share in shares) == sum(event.records for event in done) == stats.total_completed
    assert sum(share.failed for share in shares) == stats.total_failed == len(heard.of(events.RecordFailed))
    assert sum(event.records for event in heard.of(events.RecordsSubmitted)) == stats.total_submitted
    assert sum(event.records for event in heard.of(events.BatchFormed)) >= stats.total_completed
    assert sum(records for share in shares for _, records in share.latencies) == stats.total_completed
    assert sum(event.cost for event in done) == pytest.approx(stats.total_batch_cost)


@BOTH
async def test_an_engines_start_and_death_are_told_with_what_was_lost(kind: int, heard: Listener) -> None:
    batcher = batchers(dies_after=0)[kind]()
    await batcher.start()
    with pytest.raises((fb.EngineDead, fb.BatcherDied)):
        await batcher.map([batcher.engine.prepare(fb.Prompt("one")) for _ in range(5)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (started,) = heard.of(events.EngineStarted)
    (died,) = heard.of(events.EngineDied)
    assert (started.batcher, started.engine) == (batcher.id, type(batcher.engine).__name__)
    assert (died.batcher, died.error) == (batcher.id, "EngineDead")
    assert died.lost + sum(heard.by_scope().values()) == 5
    assert batcher in hooks.live_batchers()
    await batcher.stop()


async def test_another_batchers_death_loses_nothing_of_this_one_but_fails_its_records(heard: Listener) -> None:
    async def dead(_: list[int]) -> list[int]:
        raise fb.EngineDead("gone")

    inner = fb.DynamicBatcher(dead)
    await inner.start()
    await inner.map([0], return_exceptions=True)
    assert inner.stats.total_lost == 1
    async with fb.DynamicBatcher(inner.map, batch_timeout_s=0) as outer:
        (error,) = await outer.map([1], return_exceptions=True)
        assert isinstance(error, fb.BatcherDied)
        assert (outer.stats.total_failed, outer.stats.total_lost) == (1, 0)
    (failed,) = heard.of(events.RecordFailed)
    assert (failed.batcher, failed.error) == (outer.id, "BatcherDied")


# -- Hooks ------------------------------------------------------------------


class Broken:
    """Has no hash, as a mutable dataclass has none, and raises whatever it is told."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_event(self, event: Event) -> None:
        raise self._error


@BOTH
@pytest.mark.parametrize("error", [KeyError("a bug in a hook"), asyncio.CancelledError()])
async def test_a_failing_hook_breaks_no_batch_is_logged_once_and_the_others_still_hear(
    kind: int, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    unsubscribe = hooks.subscribe(Broken(error))
    try:
        with listening() as heard:
            async with batchers()[kind]() as batcher:
                answers = await batcher.map([batcher.engine.prepare(fb.Prompt("one")) for _ in range(20)])
    finally:
        unsubscribe()
    assert [answer.text for answer in answers] == ["echo: one"] * 20
    assert sum(heard.by_scope().values()) == 20
    (said,) = [record.message for record in caplog.records if "monitoring hook" in record.message]
    assert said.startswith("the monitoring hook Broken failed on EngineStarted, and is asked again for the next event")


class Slow:
    def on_event(self, event: Event) -> None:
        time.sleep(hooks.SLOW_S + 0.02)


def test_a_hook_that_is_slow_again_and_again_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    unsubscribe = hooks.subscribe(Slow())
    for _ in range(hooks.SLOW_TIMES - 1):
        hooks.emit(events.EngineLoading(0.0, "x"))
    assert caplog.messages == []
    for _ in range(2):
        hooks.emit(events.EngineLoading(0.0, "x"))
    unsubscribe()
    (said,) = caplog.messages
    assert said.startswith("the monitoring hook Slow took 0.1")
    assert "for EngineLoading, and what it was called from waited, not for the first time" in said


def test_a_caller_may_give_up_while_the_loop_does_not_run_and_somebody_listens() -> None:
    gate = threading.Event()

    def process(batch: list[int]) -> list[int]:
        gate.wait()
        return batch

    async def give_up_between(batcher: fb.DynamicBatcher[int, int]) -> tuple[asyncio.Future[int], asyncio.Task[Any]]:
        await batcher.start()
        await batcher.submit_batch([0, 0])
        while not batcher.stats.running:  # noqa: ASYNC110
            await asyncio.sleep(0)
        queued = await batcher.submit_batch([1, 2])
        waiting = asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        return queued[0], waiting

    async def result(waiting: asyncio.Task[Any]) -> Any:
        async with asyncio.timeout(10):
            return await (await waiting)

    with asyncio.Runner() as runner, listening() as heard:
        batcher = fb.DynamicBatcher[int, int](process, max_queue_size=2, max_batch_size=2, batch_timeout_s=0)
        first, waiting = runner.run(give_up_between(batcher))
        first.cancel()
        gate.set()
        assert runner.run(result(waiting)) == 3
        runner.run(batcher.stop())
    assert sum(event.records for event in heard.of(events.RecordsSubmitted)) == 5


def test_a_hook_that_was_taken_away_hears_nothing_and_twice_is_fine() -> None:
    with listening() as heard:
        unsubscribe = hooks.subscribe(other := Listener())
        unsubscribe()
        unsubscribe()
        assert hooks.is_anybody_listening()
        hooks.emit(events.EngineLoading(0.0, "x"))
    assert (len(heard.events), other.events) == (1, [])
    assert not hooks.is_anybody_listening()


def test_hooks_come_and_go_on_threads_while_events_are_told() -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            hooks.subscribe(Listener())()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    with listening() as heard:
        for _ in range(5000):
            hooks.emit(events.EngineLoading(0.0, "x"))
    stop.set()
    for thread in threads:
        thread.join()
    assert len(heard.events) == 5000
    assert not hooks.is_anybody_listening()


def test_outside_of_everything_there_is_an_empty_scope_and_a_new_one_each_time() -> None:
    outside = contextvars.copy_context()
    assert (scope_of(outside).run, scope_of(outside).action, scope_of(outside).chunk) == ("", "", "")
    assert new_scope() != new_scope()
    with scope_entered(mine := new_scope("c", 3)):
        assert scope_of(contextvars.copy_context()) is mine


# -- Chunks, runs, loads, the loop -------------------------------------------


def chunk_of(folder: Path, rows: int) -> Chunk:
    (folder / "out").mkdir()
    opened = open_source(questions(folder / "in.jsonl", rows))
    return plan_chunks(opened, str(folder / "out"), rows, settings={})[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda answer: fb.EngineBatcher(fb.FakeEngine(answer), max_batch_size=7, batch_timeout_s=0.001),
        lambda answer: fb.ContinuousBatcher(fb.FakeContinuousEngine(answer), max_in_flight=8),
    ],
)
async def test_what_the_engine_refuses_is_told_with_its_row_whoever_else_is_served_and_in_whatever_order(
    tmp_path: Path, heard: Listener, make: Callable[[Any], Any]
) -> None:
    def answer(text: str) -> str:
        if "poison" in text:
            raise fb.BadRecord(text)
        return "yes"

    def ask(row: dict[str, Any]) -> str:
        if row["id"] % 11 == 4:
            raise ValueError("no prompt for this one")
        return f"{row['id']} {'poison' if row['id'] % 7 == 3 else 'fine'}{' word' * (row['id'] * 37 % 50)}"

    @fb.singleton
    async def solver() -> Any:
        return make(answer)

    (tmp_path / "out").mkdir()
    opened = open_source(questions(tmp_path / "in.jsonl", 300))
    chunks = plan_chunks(opened, str(tmp_path / "out"), 100, settings={})
    await asyncio.gather(*(fb.infer(chunk, solver, prompt=ask) for chunk in chunks))
    batcher = await solver()
    with pytest.raises(fb.BadRecord):
        await (await batcher.submit(batcher.engine.prepare(fb.Prompt("poison of nobody"))))
    await batcher.stop()
    refused = [event for event in heard.of(events.RecordFailed) if event.stage == "infer"]
    assert {event.message.split()[0] for event in refused if event.row is None} == {"poison"}
    told = [(event.row, event.scope.chunk_index) for event in refused if event.row is not None]
    assert all(event.message.startswith(f"{event.row} poison") for event in refused if event.row is not None)
    assert sorted(told) == [(row, row // 100) for row in range(300) if row % 7 == 3 and row % 11 != 4]


def solver_of(engine: Any) -> Any:
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(engine, batch_timeout_s=0.001)

    return fb.singleton(solver)


async def test_a_chunks_events_carry_its_scope_and_the_parts_own_counts(tmp_path: Path, heard: Listener) -> None:
    chunk = chunk_of(tmp_path, 10)

    def ask(row: dict[str, Any]) -> str:
        if row["id"] == 3:
            raise ValueError("no prompt for this one")
        return str(row["question"])

    engine = fb.FakeEngine(fail_on={"question 7"})
    report = await fb.infer(chunk, solver_of(engine), prompt=ask)  # type: ignore[arg-type]
    (started,), (done,) = heard.of(events.ChunkStarted), heard.of(events.ChunkDone)
    scope = started.scope
    assert (scope.chunk, scope.chunk_index, done.scope) == (chunk.id, 0, scope)
    assert heard.by_scope() == {scope: 9}
    assert (done.rows, done.failures, done.causes) == (10, 2, {"BadRecord": 1, "ValueError": 1})
    assert (done.prompt_tokens, done.response_tokens) == (report.prompt_tokens, report.response_tokens)
    failed = {(event.stage, event.error, event.row): event.scope for event in heard.of(events.RecordFailed)}
    assert failed == {("prepare", "ValueError", 3): scope, ("infer", "BadRecord", 7): scope}
    details = ChunkDetails.from_json(report.details)
    assert details.causes == done.causes
    assert {(example.row, example.cause) for example in details.examples} == {(3, "ValueError"), (7, "BadRecord")}
    assert sum(details.latencies.values()) == 9
    assert sum(details.prompt_lengths.values()) == sum(details.response_lengths.values()) == 8
    (life,) = details.lives
    assert life.samples[-1].completed - life.samples[0].completed == 9
    elapsed = [sample.busy_s + sample.starved_s + sample.assembling_s + sample.late_s for sample in life.samples]
    assert elapsed[-1] - elapsed[0] == pytest.approx(life.samples[-1].at - life.samples[0].at, abs=0.01)


@pytest.mark.parametrize("how", ["fails", "cancelled", "too late"])
async def test_a_chunk_that_ends_badly_is_told_of_once(tmp_path: Path, heard: Listener, how: str) -> None:
    chunk = chunk_of(tmp_path, 4)
    loading = asyncio.Event()

    async def solver() -> Any:
        loading.set()
        if how == "fails":
            raise OSError("no such model")
        await asyncio.Event().wait()

    timeout_s = 0.05 if how == "too late" else None
    task = asyncio.ensure_future(fb.infer(chunk, fb.singleton(solver), prompt="{question}", timeout_s=timeout_s))
    await loading.wait()
    if how == "cancelled":
        task.cancel()
    await asyncio.wait([task])
    (started,), (failed,) = heard.of(events.ChunkStarted), heard.of(events.ChunkFailed)
    assert failed.scope is started.scope
    assert failed.error == {"fails": "OSError", "cancelled": "CancelledError", "too late": "DeadlineExceeded"}[how]
    assert not heard.of(events.ChunkDone)
    if how != "fails":
        await asyncio.sleep(0)
    loaded = [event.error for event in heard.of(events.EngineLoaded)]
    assert len(heard.of(events.EngineLoading)) == 1
    if how == "fails":
        assert loaded == ["OSError"]


async def test_a_run_tells_how_it_began_what_it_heard_and_how_it_ended(tmp_path: Path, heard: Listener) -> None:
    solver = solver_of(fb.FakeEngine(fail_on={"question 3"}))

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        if chunk.index == 2:
            raise RuntimeError("this one never works")
        return await fb.infer(chunk, solver, prompt="{question}")

    source, output = questions(tmp_path / "in.jsonl", 30), str(tmp_path / "out")
    with pytest.raises(fb.ChunkFailed):
        await fb.run(source, output, infer_chunk, chunk_size=10)
    (began,), (ended,) = heard.of(events.RunStarted), heard.of(events.RunEnded)
    assert (began.rows, began.chunks, began.rows_reused, began.chunks_reused) == (30, 3, 0, 0)
    reported = {event.chunk_index: event for event in heard.of(events.ChunkReported)}
    assert {index: (event.rows, event.failures, event.error) for index, event in reported.items()} == {
        0: (10, 1, ""),
        1: (10, 0, ""),
        2: (10, 0, "RuntimeError"),
    }
    assert (ended.rows, ended.failures, ended.error) == (20, 1, "ChunkFailed")
    assert {event.scope for event in [*reported.values(), ended]} == {began.scope}
    heard.events.clear()

    async def sound(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    await fb.run(source, output, sound, chunk_size=10, code_version=None, overwrite=True)
    assert heard.of(events.RunEnded)[0].error == ""


async def test_a_load_is_told_of_with_how_long_it_took(heard: Listener) -> None:
    @fb.singleton
    async def model() -> str:
        return "loaded"

    await model()
    (loading,), (loaded,) = heard.of(events.EngineLoading), heard.of(events.EngineLoaded)
    assert loading.name == loaded.name
    assert "model" in loaded.name
    assert (loaded.error, loaded.seconds >= 0) == ("", True)


async def test_a_loop_that_stood_still_is_told_of_with_the_code_that_held_it(
    heard: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(guard, "WARN_AFTER_S", 0.2)
    guard.watch()
    async with asyncio.timeout(20):
        while not heard.of(events.LoopBlocked):
            time.sleep(0.5)  # noqa: ASYNC251 - what is tested
            await asyncio.sleep(0.05)
    blocked = heard.of(events.LoopBlocked)[0]
    assert "test_events.py" in blocked.code
    assert blocked.seconds > 0.2


async def test_the_time_until_the_loop_hears_of_a_finished_batch_is_not_the_devices() -> None:
    """A plain function ends on its thread while the loop is held: the device is free, and the batcher says so."""
    ended = threading.Event()

    def process(batch: list[int]) -> list[int]:
        ended.set()
        return batch

    async with fb.DynamicBatcher(process, batch_timeout_s=0.0) as batcher:
        future = await batcher.submit(1)
        while not ended.is_set():  # noqa: ASYNC110 - a thread's
            await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - what is tested
        await future
        stats = batcher.stats
    assert stats.late_time_s > 0.25
    assert stats.busy_time_s < 0.2
    assert stats.idle_time_s == pytest.approx(stats.starved_time_s + stats.assembling_time_s + stats.late_time_s)


async def test_a_record_that_comes_and_goes_within_a_millisecond_has_no_negative_latency(heard: Listener) -> None:
    device = fb.FakeContinuousEngine(slots=4)
    async with fb.ContinuousBatcher(device) as batcher:
        record = device.prepare(fb.Prompt("w"))
        for _ in range(50):  # each is queued after the one before came back
            await (await batcher.submit(record))
    told = [pair for event in heard.of(events.BatchDone) for share in event.shares for pair in share.latencies]
    assert sum(records for _, records in told) == 50
    assert all(seconds >= 0 for seconds, _ in told)


async def test_a_death_that_many_chunks_saw_is_one_death(tmp_path: Path) -> None:
    lives: list[fb.FakeEngine] = []

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        lives.append(fb.FakeEngine(dies_after=None if lives else 3))
        return fb.EngineBatcher(lives[-1], max_batch_size=4, batch_timeout_s=0.001)

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    source = questions(tmp_path / "in.jsonl", 80)
    await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=20, concurrency=4)
    (log,) = logs_from_json((tmp_path / "out" / "_report.json").read_bytes())
    assert (log.rows, log.engine_deaths, len(lives)) == (80, 1, 2)
