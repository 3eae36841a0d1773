from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flyte_batch as fb


class Gate:
    """A batcher whose calls end when the test says so, each by the first record it holds."""

    def __init__(self, infer: Callable[[Any], Any] = lambda record: record) -> None:
        self.infer = infer
        self.doors: dict[Any, asyncio.Event] = {}
        self.waiting: set[Any] = set()
        self.finished: set[Any] = set()
        self.cancelled: list[Any] = []
        self.changed = asyncio.Event()

    async def map(self, records: Sequence[Any], *, return_exceptions: bool = False) -> list[Any]:
        assert return_exceptions
        name = records[0] if records else None
        self.waiting.add(name)
        self.changed.set()
        try:
            if name in self.doors:
                await self.doors[name].wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        self.waiting.discard(name)
        self.finished.add(name)
        self.changed.set()
        return [self.infer(record) for record in records]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


def same(item: int) -> int:
    return item


def pair(item: int, result: int) -> tuple[int, int]:
    return item, result


async def collect(outputs: AsyncIterator[Any]) -> list[Any]:
    return [output async for output in outputs]


@given(count=st.integers(0, 200), block=st.integers(1, 17), extra=st.integers(0, 40), ordered=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_item_comes_out_once_whatever_the_sizes(count: int, block: int, extra: int, ordered: bool) -> None:
    async def main() -> list[Any]:
        pipeline = fb.Pipeline(lambda i: i + 1, Gate(lambda r: r * 10), pair, block=block, window=block + extra)
        return await collect(pipeline.run(range(count), ordered=ordered))

    outputs = asyncio.run(main())
    expected = [(i, (i + 1) * 10) for i in range(count)]
    assert (outputs if ordered else sorted(outputs)) == expected


async def test_as_completed_a_late_first_block_comes_last() -> None:
    gate = Gate()
    gate.doors[0] = asyncio.Event()
    seen = []
    async for item, _ in fb.Pipeline(same, gate, pair, block=1, window=3).run(range(3), ordered=False):
        seen.append(item)
        if len(seen) == 2:
            gate.doors[0].set()
    assert sorted(seen[:2]) == [1, 2]
    assert seen[2] == 0


async def test_in_order_a_late_first_block_is_waited_for() -> None:
    gate = Gate()
    gate.doors[0] = asyncio.Event()
    seen = []

    async def consume() -> None:
        async for item, _ in fb.Pipeline(same, gate, pair, block=1, window=3).run(range(3)):
            seen.append(item)

    consumer = asyncio.create_task(consume())
    await gate.until(lambda: gate.finished >= {1, 2})
    assert seen == []
    gate.doors[0].set()
    await consumer
    assert seen == [0, 1, 2]


async def test_no_more_items_are_taken_than_the_window_holds() -> None:
    gate = Gate()
    gate.doors[0] = asyncio.Event()
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    outputs = asyncio.create_task(collect(fb.Pipeline(same, gate, pair, block=2, window=6).run(items())))
    await gate.until(lambda: len(taken) >= 6)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(taken) == 6
    gate.doors[0].set()
    assert len(await outputs) == 100


async def test_an_async_iterable_is_read_as_well() -> None:
    async def items() -> AsyncIterator[int]:
        for i in range(5):
            yield i

    assert await collect(fb.Pipeline(same, Gate(), pair, block=2).run(items())) == [(i, i) for i in range(5)]


async def test_a_failed_item_is_a_failure_with_its_stage_and_its_neighbours_go_on() -> None:
    def prepare(item: int) -> int:
        if item == 1:
            raise ValueError("prepare it was")
        return item

    def infer(record: int) -> Any:
        return RuntimeError("infer it was") if record == 2 else record

    def finish(item: int, result: int) -> int:
        if item == 3:
            raise KeyError("finish it was")
        return result

    outputs = await collect(fb.Pipeline(prepare, Gate(infer), finish).run(range(5), errors="yield"))
    assert outputs[0] == 0
    assert outputs[4] == 4
    failures = outputs[1:4]
    assert [(f.item, f.stage, type(f.error)) for f in failures] == [
        (1, "prepare", ValueError), (2, "infer", RuntimeError), (3, "finish", KeyError)
    ]  # fmt: skip
    assert str(failures[0]) == "ValueError: prepare it was"


async def test_by_default_the_first_failed_items_error_is_raised_and_what_is_under_way_is_cancelled() -> None:
    gate = Gate(lambda record: ValueError("bad") if record == 0 else record)
    gate.doors[1] = asyncio.Event()
    with pytest.raises(ValueError, match="bad"):
        await collect(fb.Pipeline(same, gate, pair, block=1, window=2).run([0, 1]))
    assert 1 not in gate.finished


async def test_leaving_early_cancels_what_is_under_way() -> None:
    gate = Gate()
    gate.doors[1] = gate.doors[2] = asyncio.Event()
    outputs = fb.Pipeline(same, gate, pair, block=1, window=3).run(range(3), ordered=False)
    assert await anext(outputs) == (0, 0)
    await gate.until(lambda: {1, 2} <= gate.waiting)
    await outputs.aclose()
    assert sorted(gate.cancelled) == [1, 2]


async def test_prepare_and_finish_run_on_threads() -> None:
    threads: set[threading.Thread] = set()

    def note(item: int, result: int = 0) -> int:
        threads.add(threading.current_thread())
        return item

    await collect(fb.Pipeline(note, Gate(), note).run(range(3)))
    assert threads
    assert threading.main_thread() not in threads
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


async def test_leaving_does_not_hold_up_the_loop_for_a_prepare_that_is_under_way() -> None:
    began, may_end = threading.Event(), threading.Event()

    def prepare(item: int) -> int:
        began.set()
        assert may_end.wait(timeout=30)
        return item

    outputs = asyncio.create_task(collect(fb.Pipeline(prepare, Gate(), pair, threads=1).run([1])))
    await asyncio.to_thread(began.wait)
    outputs.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outputs
    assert not may_end.is_set()  # we are back before it ended
    may_end.set()


async def test_of_several_blocks_that_fail_at_once_none_is_left_behind() -> None:
    class Dying(Gate):
        async def map(self, records: Sequence[Any], *, return_exceptions: bool = False) -> list[Any]:
            await super().map(records, return_exceptions=return_exceptions)
            raise fb.BatcherDied(str(records[0]))

    unretrieved: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unretrieved.append(context))
    gate = Dying()
    gate.doors = dict.fromkeys(range(4), asyncio.Event())

    async def fails() -> bool:
        try:
            await collect(fb.Pipeline(same, gate, pair, block=1, window=4).run(range(4), ordered=False))
        except fb.BatcherDied:
            return True
        return False

    run = asyncio.create_task(fails())
    await gate.until(lambda: len(gate.waiting) == 4)
    gate.doors[0].set()  # it is one door for all
    assert await run
    gc.collect()
    assert unretrieved == []


async def test_what_an_async_source_gave_goes_ahead_while_it_pauses() -> None:
    resume = asyncio.Event()

    async def items() -> AsyncIterator[int]:
        yield 1
        yield 2
        await resume.wait()
        yield 3

    outputs = fb.Pipeline(same, Gate(), pair, block=10, window=10).run(items())
    assert [await anext(outputs), await anext(outputs)] == [(1, 1), (2, 2)]
    resume.set()
    assert [output async for output in outputs] == [(3, 3)]


async def test_an_engine_that_dies_ends_the_run_even_where_failures_are_yielded() -> None:
    engine = fb.FakeEngine(dies_after=1)
    async with fb.EngineBatcher(engine, max_batch_size=2, batch_timeout_s=0.001) as batcher:
        pipeline = fb.Pipeline(lambda text: engine.prepare(fb.Prompt(text)), batcher, pair, block=2)
        with pytest.raises((fb.EngineDead, fb.BatcherDied)):
            await collect(pipeline.run(["a", "b", "c", "d"], errors="yield"))


async def test_an_error_of_the_batcher_itself_ends_the_run() -> None:
    class Dead(Gate):
        async def map(self, records: Sequence[Any], *, return_exceptions: bool = False) -> list[Any]:
            raise fb.BatcherDied("gone")

    with pytest.raises(fb.BatcherDied):
        await collect(fb.Pipeline(same, Dead(), pair).run(range(3), errors="yield"))


@pytest.mark.parametrize("options", [{"window": 0}, {"block": 0}, {"threads": 0}, {"window": 2, "block": 3}])
def test_sizes_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        fb.Pipeline(same, Gate(), pair, **options)


async def test_of_a_batcher_that_dies_all_that_was_answered_is_yielded_before_the_error() -> None:
    class Dying:
        async def map(self, records: Sequence[int], *, return_exceptions: bool = False) -> list[Any]:
            return [record if record % 4 else fb.BatcherDied("gone") for record in records]

    pipeline = fb.Pipeline(lambda item: item, Dying(), lambda _, result: result, block=8, window=32)
    seen: list[Any] = []

    async def consume() -> None:
        async for output in pipeline.run(range(32), ordered=False, errors="yield"):
            seen.append(output)

    with pytest.raises(fb.BatcherDied):
        await consume()
    assert set(seen) <= {i for i in range(32) if i % 4}
    assert len(seen) >= 6  # the whole of the first block


async def test_a_pipeline_hands_over_as_many_records_as_its_batcher_prefers() -> None:
    sizes: list[int] = []

    class Preferring:
        preferred_block = 100

        async def map(self, records: Sequence[int], *, return_exceptions: bool = False) -> list[int]:
            sizes.append(len(records))
            return list(records)

    pipeline = fb.Pipeline(lambda item: item, Preferring(), lambda _, result: result)
    assert [output async for output in pipeline.run(range(250))] == list(range(250))
    assert sizes == [100, 100, 50]


async def test_prepare_and_finish_see_the_callers_context_on_their_threads() -> None:
    task: contextvars.ContextVar[str] = contextvars.ContextVar("task", default="nobody")

    def prepare(item: int) -> str:
        return f"{item} of {task.get()}"

    def finish(item: int, result: str) -> tuple[str, str]:
        return result, task.get()

    async def call(name: str) -> list[Any]:
        task.set(name)
        return await collect(fb.Pipeline(prepare, Gate(), finish).run([1]))

    assert await asyncio.gather(*map(call, "ab")) == [[("1 of a", "a")], [("1 of b", "b")]]


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["prepare", "finish"])
async def test_a_cancellation_or_an_exit_that_a_function_raises_fails_its_item_and_not_the_run(
    kind: type[BaseException], stage: str
) -> None:
    def raising(where: str) -> Callable[..., Any]:
        def function(item: int, result: int = 0) -> int:
            if where == stage and item == 1:
                raise kind("mine")
            return item

        return function

    pipeline = fb.Pipeline(raising("prepare"), Gate(), raising("finish"), block=2)
    first, second, third = await collect(pipeline.run(range(3), errors="yield"))
    assert (first, third, second.item, second.stage) == (0, 2, 1, stage)
    assert str(second) == f"RuntimeError: raised {kind.__name__}: mine"
