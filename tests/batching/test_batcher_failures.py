"""What becomes of records when process_fn fails."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

import pytest
from stepping import Device, settle, soon

from flyte_batch.batching import DynamicBatcher
from flyte_batch.batching.processing import copy_of
from flyte_batch.errors import BatcherDied, BatcherError, EngineDead, EngineOutOfMemory


def raising(error: BaseException) -> Device:
    def answer(_: list[Any]) -> Any:
        raise error

    return Device(answer)


def failing_on(*bad: Any) -> Device:
    def answer(records: list[Any]) -> list[Any]:
        if poison := [record for record in records if record in bad]:
            raise ValueError(f"cannot infer {poison}")
        return records

    return Device(answer)


async def outcomes(batcher: DynamicBatcher[Any, Any], records: list[Any]) -> list[Any]:
    futures = await batcher.submit_batch(records)
    return await soon(asyncio.gather(*futures, return_exceptions=True))


async def test_by_default_an_exception_fails_every_record_of_its_batch_and_the_batcher_goes_on():
    device = failing_on("bad")
    async with DynamicBatcher[Any, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        a, bad, c, d = await outcomes(batcher, ["a", "bad", "c", "d"])
        assert isinstance(a, ValueError)
        assert isinstance(bad, ValueError)
        assert [c, d] == ["c", "d"]
        assert (batcher.stats.total_completed, batcher.stats.total_failed) == (4, 2)


async def test_each_record_gets_an_exception_of_its_own_with_the_cause_and_the_place_it_was_raised():
    error = ValueError("no")
    error.__cause__ = KeyError("why")
    async with DynamicBatcher[Any, Any](raising(error), batch_timeout_s=0) as batcher:
        first, second = await outcomes(batcher, [1, 2])
    assert first is not second
    for failure in (first, second):
        assert (type(failure), str(failure), failure.__cause__) == (ValueError, "no", error.__cause__)
        assert any(frame.name == "answer" for frame in traceback.extract_tb(failure.__traceback__))


class Awkward(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


class Hopeless(Exception):
    def __init__(self) -> None:
        super().__init__("hopeless")

    def __reduce__(self) -> Any:
        raise TypeError("cannot be copied")

    def __new__(cls, *args: Any) -> Any:
        if args:
            raise TypeError("cannot be made")
        return super().__new__(cls)


def test_copies_of_an_exception_keep_its_state_and_those_that_cannot_be_copied_are_shared():
    awkward = Awkward(7, detail="x")
    twin = copy_of(awkward)
    assert twin is not awkward
    assert (str(twin), twin.code) == ("7: x", 7)  # type: ignore[attr-defined]
    missing = FileNotFoundError(2, "gone", "file.txt")
    assert copy_of(missing) is not missing
    assert str(copy_of(missing)) == str(missing)
    hopeless = Hopeless()
    assert copy_of(hopeless) is hopeless


@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([1], ValueError, "returned 1 results for batch of 2 records"),
        ([1, 2, 3], ValueError, "returned 3 results for batch of 2 records"),
        ({1: 1, 2: 2}, TypeError, "returned dict for a batch of 2 records"),
        ({1, 2}, TypeError, "returned set"),
        ("ab", TypeError, "returned str"),
        (b"ab", TypeError, "returned bytes"),
        (None, TypeError, "returned NoneType"),
        (7, TypeError, "returned int"),
        ((x for x in (1, 2)), TypeError, "returned generator"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_answer_that_is_not_one_result_a_record_fails_the_batch_by_name(kind, answer, error, message):
    async def on_loop(_: list[Any]) -> Any:
        return answer

    def on_thread(_: list[Any]) -> Any:
        return answer

    async with DynamicBatcher[Any, Any](on_loop if kind == "async" else on_thread, batch_timeout_s=0) as batcher:
        for failure in await outcomes(batcher, [1, 2]):
            assert isinstance(failure, error)
            assert message in str(failure)
        assert batcher.is_running


async def test_a_result_that_is_an_exception_fails_only_its_record():
    device = Device(lambda records: [KeyError(r) if r == 2 else r for r in records])
    async with DynamicBatcher[Any, Any](device, batch_timeout_s=0) as batcher:
        one, two, three = await outcomes(batcher, [1, 2, 3])
        assert (one, type(two), three) == (1, KeyError, 3)
        assert batcher.stats.total_failed == 1


class Odd(BaseException):
    pass


@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize("error", [asyncio.CancelledError("leaked"), StopIteration(3), Odd("odd")], ids=repr)
async def test_what_is_no_exception_of_the_callers_own_reaches_it_as_a_batcher_error_and_the_batcher_goes_on(
    kind, error
):
    async def on_loop(records: list[Any]) -> Any:
        if records == ["good"]:
            return records
        if isinstance(error, StopIteration):
            return [error for _ in records]
        raise error

    def on_thread(records: list[Any]) -> Any:
        if records == ["good"]:
            return records
        raise error

    async with DynamicBatcher[Any, Any](on_loop if kind == "async" else on_thread, batch_timeout_s=0) as batcher:
        for failure in await outcomes(batcher, ["bad", "bad"]):
            assert isinstance(failure, BatcherError)
            assert failure.__cause__ is not None
            assert type(failure.__cause__) is type(error)
        with pytest.raises(BatcherError):
            await soon(batcher.map(["bad"]))
        assert await soon(batcher.map(["good"])) == ["good"]


async def test_isolating_failures_fails_exactly_the_bad_records_in_few_calls():
    device = failing_on(17, 200)
    async with DynamicBatcher[int, Any](device, isolate_failures=True, batch_timeout_s=0) as batcher:
        results = await soon(batcher.map(range(256), return_exceptions=True))
        assert [i for i, r in enumerate(results) if isinstance(r, ValueError)] == [17, 200]
        assert [r for r in results if isinstance(r, int)] == [i for i in range(256) if i not in (17, 200)]
        assert batcher.stats.total_failed == 2
        assert batcher.stats.total_completed == 256
    assert len(device.batches) <= 2 * 2 * 8 + 1


async def test_isolating_failures_finds_the_record_for_which_no_result_came_back():
    device = Device(lambda records: [record for record in records if record != 3])
    async with DynamicBatcher[int, Any](device, isolate_failures=True, batch_timeout_s=0) as batcher:
        results = await outcomes(batcher, [1, 2, 3, 4])
    assert [results[0], results[1], results[3]] == [1, 2, 4]
    assert isinstance(results[2], ValueError)


async def test_a_record_abandoned_while_its_batch_is_split_is_not_tried_again():
    device = failing_on(0)
    async with DynamicBatcher[int, Any](device, isolate_failures=True, batch_timeout_s=0) as batcher:
        device.hold()
        futures = await batcher.submit_batch([0, 1, 2, 3])
        await device.at_work()
        futures[3].cancel()
        device.release()
        results = await soon(asyncio.gather(*futures[:3], return_exceptions=True))
        assert results[1:] == [1, 2]
        assert batcher.stats.total_abandoned == 1
    assert device.seen.count(3) == 1


async def test_a_map_cancelled_while_its_batch_is_split_is_not_tried_again():
    device = failing_on(0)
    async with DynamicBatcher[int, Any](device, isolate_failures=True, batch_timeout_s=0) as batcher:
        device.hold()
        mapping = asyncio.create_task(batcher.map(range(4)))
        await device.at_work()
        mapping.cancel()
        await settle()
        device.release()
    assert device.batches == [[0, 1, 2, 3]]


def fits(most: int, error: type[BaseException]) -> Device:
    def answer(records: list[int]) -> list[int]:
        if sum(records) > most:
            raise error("does not fit")
        return records

    return Device(answer)


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize("error", [EngineOutOfMemory, MemoryError, OutOfMemoryError])
async def test_out_of_memory_halves_the_batch_lowers_the_budget_and_goes_on(error):
    device = fits(30, error)
    async with DynamicBatcher[int, Any](
        device, cost_estimator=lambda n: n, target_batch_cost=100, batch_timeout_s=0
    ) as batcher:
        assert await soon(batcher.map([5] * 20)) == [5] * 20
        assert batcher.budget == 25
        assert batcher.stats.out_of_memory == 3
        device.batches.clear()
        await soon(batcher.map([5] * 20))
        assert [len(batch) for batch in device.batches] == [5, 5, 5, 5], "no batch runs out of memory again"


async def test_a_lone_record_that_does_not_fit_fails_alone_and_leaves_the_budget_of_others():
    async with DynamicBatcher[int, Any](
        fits(30, EngineOutOfMemory), cost_estimator=lambda n: n, target_batch_cost=30, batch_timeout_s=0
    ) as batcher:
        small, huge, other = await outcomes(batcher, [5, 99, 5])
        assert (small, type(huge), other) == (5, EngineOutOfMemory, 5)
        assert batcher.budget == 30


async def test_a_dead_engine_is_not_tried_again_and_ends_the_batcher_with_typed_errors():
    device = raising(EngineDead("gone"))
    batcher = DynamicBatcher[int, Any](device, isolate_failures=True, max_batch_size=2, batch_timeout_s=0)
    await batcher.start()
    device.hold()
    mapping = asyncio.create_task(batcher.map(range(9), return_exceptions=True))
    futures = await batcher.submit_batch([1, 2, 3])
    await device.at_work()
    device.release()
    results = await soon(asyncio.gather(*futures, return_exceptions=True))
    mapped = await soon(mapping)
    assert len(device.batches) == 1
    assert {type(result) for result in (*results, *mapped)} == {EngineDead, BatcherDied}
    assert all(type(r) is EngineDead or type(r.__cause__) is EngineDead for r in (*results, *mapped))
    assert not batcher.is_running
    with pytest.raises(BatcherDied, match="EngineDead: gone"):
        await batcher.submit(1)
    with pytest.raises(BatcherDied):
        await soon(batcher.map([1]))
    await soon(batcher.stop())


@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_or_exit_in_process_fn_ends_the_loop_and_leaves_nobody_waiting(kind, error):
    async def on_loop(_: list[int]) -> Any:
        raise error

    def on_thread(_: list[int]) -> Any:
        raise error

    async def use() -> None:
        await batcher.start()
        futures.extend(await batcher.submit_batch([1, 2, 3]))
        await asyncio.gather(*futures)

    futures: list[asyncio.Future[Any]] = []
    batcher = DynamicBatcher[int, Any](on_loop if kind == "async" else on_thread, max_batch_size=2, batch_timeout_s=0)
    with asyncio.Runner() as runner:
        with pytest.raises(error):
            runner.run(use())
        runner.run(settle())
        assert not batcher.is_running
        assert [type(future.exception()) for future in futures] == [BatcherDied] * 3
        runner.run(batcher.stop())
