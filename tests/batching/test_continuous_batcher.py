"""ContinuousBatcher in front of an engine that the tests step, token by token."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stepping import settle, soon, until

import flyte_batch as fb
from flyte_batch.engines.fake import FakeRecord


class Steps:
    """An engine's device time: a step passes when the test says so, or at once after `run`."""

    def __init__(self) -> None:
        self._allowed = asyncio.Semaphore(0)
        self._free = False

    async def __call__(self, _: float) -> None:
        if self._free:
            await asyncio.sleep(0)
        else:
            # Bounded, so that a test that fails while it holds the engine does not hang in stop().
            async with asyncio.timeout(10):
                await self._allowed.acquire()

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._allowed.release()
            await settle()

    def run(self) -> None:
        self._free = True
        self._allowed.release()


def words(count: int) -> str:
    return " ".join(["w"] * count)


def by_length(text: str) -> str:
    """The answer to "3 ..." has three words."""
    return words(int(text.split()[0]))


def engine(steps: Steps | None = None, **options: Any) -> fb.FakeContinuousEngine:
    options.setdefault("sampling", fb.SamplingParameters(max_tokens=100))
    if steps is not None:
        options["sleep"] = steps
    return fb.FakeContinuousEngine(by_length, **options)


def records(device: fb.FakeContinuousEngine, *texts: str) -> list[FakeRecord]:
    return [device.prepare(fb.Prompt(text)) for text in texts]


# -- Admission ---------------------------------------------------------------


async def test_a_record_starts_in_the_step_after_another_is_done_and_resolves_as_it_finishes():
    steps = Steps()
    device = engine(steps, slots=2)
    async with fb.ContinuousBatcher(device) as batcher:
        long, short, next_one = [await batcher.submit(r) for r in records(device, "5 a", "1 b", "1 c")]
        await settle()
        assert device.started == ["5 a", "1 b"]
        await steps.step()
        assert (short.done(), next_one.done(), long.done()) == (True, False, False)
        await steps.step()
        assert device.started == ["5 a", "1 b", "1 c"]
        assert next_one.done()
        assert not long.done()
        await steps.step(3)
        assert (await soon(long)).text == words(5)
        steps.run()


async def test_a_heavy_tail_takes_fewer_steps_than_static_batches_and_keeps_more_records_running():
    lengths = [2, 3, 2, 40, 2, 2, 3, 2, 2, 30, 2, 2, 2, 3, 2, 2] * 4
    ran: dict[str, fb.FakeContinuousEngine] = {}
    for name in ("static", "continuous", "told"):
        device = ran[name] = engine(slots=8)
        front = fb.EngineBatcher(device, max_batch_size=8) if name == "static" else fb.ContinuousBatcher(device)
        work = records(device, *(f"{n} x" for n in lengths))
        async with front as batcher:
            await soon(batcher.map(work, estimated_cost=[2 + n for n in lengths] if name == "told" else None))
        assert device.finished == len(lengths)
    static, continuous = ran["static"], ran["continuous"]
    assert static.steps > 3 * continuous.steps
    assert continuous.record_steps / continuous.steps > 3 * static.record_steps / static.steps
    # No schedule of 8 slots is shorter than the work spread evenly. Told what to expect, it comes within 10% of that.
    assert ran["told"].steps <= 1.1 * sum(lengths) / 8


async def test_the_cap_bounds_the_number_in_flight():
    steps = Steps()
    device = engine(steps, slots=100)
    async with fb.ContinuousBatcher(device, max_in_flight=3) as batcher:
        futures = await batcher.submit_batch(records(device, *(f"2 {i}" for i in range(10))))
        await settle()
        assert batcher.stats.running == 3
        steps.run()
        await soon(asyncio.gather(*futures))
    assert device.most_running == 3


async def test_the_budget_bounds_the_tokens_in_flight_and_an_oversized_record_goes_alone():
    steps = Steps()
    device = engine(steps, slots=100)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=50, max_in_flight=10) as batcher:
        most = 0.0
        texts = ["2 a", "2 b", "2 c", "2 d", "2 big"]
        costs = [20, 20, 20, 30, 90]
        futures = await batcher.submit_batch(records(device, *texts), estimated_cost=costs)
        while not all(future.done() for future in futures):
            await settle()
            most = max(most, batcher.cost_in_flight if batcher.stats.running > 1 else 0)
            if "2 big" in device.started and not futures[4].done():
                assert batcher.stats.running == 1
            await steps.step()
        assert 0 < most <= 50
        steps.run()


async def test_defaults_are_twice_what_the_engine_computes_at_once():
    device = engine(slots=7, capacity_tokens=1000)
    batcher = fb.ContinuousBatcher(device)
    assert batcher.budget == 2000
    steps = Steps()
    device = engine(steps, slots=7, capacity_tokens=10**6)
    async with fb.ContinuousBatcher(device) as batcher:
        futures = await batcher.submit_batch(records(device, *["1 x"] * 30))
        await settle()
        assert (batcher.stats.running, device.running) == (14, 7)
        steps.run()
        await soon(asyncio.gather(*futures))


async def test_what_responses_take_is_learnt_while_it_runs():
    """Records may generate 100 tokens and generate 2: there is room for 19 of those, but for many of these."""
    steps = Steps()
    device = engine(steps, slots=1000)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=1000, max_in_flight=1000) as batcher:
        assert batcher.expected_response_tokens(2, 100) == 50
        call = asyncio.create_task(batcher.map(records(device, *["2 x"] * 500)))
        await steps.step()
        assert batcher.stats.running == 19
        steps.run()
        await soon(call)
        assert batcher.expected_response_tokens(2, 100) == pytest.approx(2, abs=0.1)
        assert device.most_running > 200


async def test_a_given_cost_is_the_most_that_is_expected():
    steps = Steps()
    device = engine(steps, slots=100)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=100, expected_response_tokens=50) as batcher:
        futures = await batcher.submit_batch(records(device, *["1 x"] * 30), estimated_cost=[5] * 30)
        await settle()
        assert batcher.stats.running == 20
        assert batcher.cost_in_flight == 100
        steps.run()
        await soon(asyncio.gather(*futures))


async def test_a_large_record_is_not_passed_over_for_ever_by_small_ones():
    steps = Steps()
    device = engine(steps, slots=100)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=100, turn_size=1) as batcher:
        small = [
            asyncio.create_task(batcher.map(records(device, *["3 s"] * 50), estimated_cost=[10] * 50)) for _ in range(3)
        ]
        await settle()
        big = await batcher.submit(*records(device, "1 big"), estimated_cost=95)
        rounds = 0
        while not big.done():
            await steps.step()
            rounds += 1
            assert rounds < 15
        assert not all(task.done() for task in small)
        steps.run()
        await soon(asyncio.gather(*small))


@pytest.mark.parametrize("turn_size", [1, 64])
async def test_a_small_caller_has_its_turn_also_where_the_budget_is_full_before_a_turn_is_over(turn_size):
    steps = Steps()
    device = engine(steps, slots=100)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=40, turn_size=turn_size) as batcher:
        big = asyncio.create_task(batcher.map(records(device, *["1 big"] * 1000), estimated_cost=[10] * 1000))
        await settle()
        small = await batcher.submit(*records(device, "1 small"), estimated_cost=10)
        while not small.done():
            await steps.step()
        assert len(device.started) < 100
        steps.run()
        await soon(big)


async def test_a_record_behind_one_that_does_not_fit_starts_as_soon_as_that_one_is_given_up():
    steps = Steps()
    device = engine(steps, slots=4)
    options: Any = {"target_tokens_in_flight": 100, "expected_response_tokens": 100, "max_queue_size": 1}
    async with fb.ContinuousBatcher(device, **options) as batcher:
        await batcher.submit(*records(device, "9 running"), estimated_cost=60)
        large = await batcher.submit(*records(device, "9 large"), estimated_cost=90)
        waiting = asyncio.create_task(batcher.submit(*records(device, "1 small"), estimated_cost=10))
        await settle()
        assert batcher.stats.running == 1
        assert large.cancel()
        await settle()
        assert (batcher.stats.running, batcher.stats.total_submitted) == (2, 3)
        await steps.step(2)
        assert (await waiting).done()
        assert device.started.count("1 small") == 1
        steps.run()


# -- Order -------------------------------------------------------------------


async def test_the_longest_expected_records_of_a_call_start_first_and_results_come_in_its_order():
    device = engine(slots=1)
    async with fb.ContinuousBatcher(device, max_in_flight=1, shared_prefix=0) as batcher:
        results = await soon(batcher.map(records(device, "1 a", "3 b", "2 c", "9 d"), estimated_cost=[10, 30, 20, 90]))
        assert device.started == ["9 d", "3 b", "2 c", "1 a"]
        assert [len(result.text.split()) for result in results] == [1, 3, 2, 9]
        futures = await batcher.submit_batch(records(device, "1 a", "3 b"), estimated_cost=[10, 30])
        assert [len((await soon(f)).text.split()) for f in futures] == [1, 3]
        assert device.started[4:] == ["3 b", "1 a"]


async def test_records_that_share_a_prefix_are_admitted_together():
    device = engine(slots=1)
    first, second = "first document " * 8, "second document " * 8
    texts = [f"1 all {first} a", f"1 all {second} b", f"1 all {first} c", f"1 all {second} d", "1 all else"]
    async with fb.ContinuousBatcher(device, max_in_flight=1) as batcher:
        await soon(batcher.map(records(device, *texts)))
    kinds = ["first" if "first" in text else "second" if "second" in text else "else" for text in device.started]
    assert sorted(kinds, key=kinds.index) == kinds
    assert len(set(kinds)) == 3


async def test_a_small_caller_is_not_stuck_behind_a_big_one():
    steps = Steps()
    device = engine(steps, slots=4)
    async with fb.ContinuousBatcher(device, max_in_flight=4, turn_size=1) as batcher:
        big = asyncio.create_task(batcher.map(records(device, *(f"2 big{i}" for i in range(1000)))))
        await settle()
        small = await batcher.submit(*records(device, "1 small"))
        await steps.step(5)
        assert small.done()
        assert len(device.started) < 20
        steps.run()
        await soon(big)


# -- Giving up ---------------------------------------------------------------


async def test_a_cancelled_record_is_aborted_in_the_engine_and_its_room_is_given_to_the_next():
    steps = Steps()
    device = engine(steps, slots=2, endless=["1 endless"])
    async with fb.ContinuousBatcher(device, max_in_flight=2) as batcher:
        endless, neighbour, waiting = [
            await batcher.submit(r) for r in records(device, "1 endless", "4 neighbour", "1 waiting")
        ]
        await steps.step()
        endless.cancel()
        await settle()
        assert device.aborted == 1
        await steps.step(2)
        assert waiting.done()
        assert not neighbour.done()
        steps.run()
        assert (await soon(neighbour)).text == words(4)
        stats = batcher.stats
        assert (stats.total_completed, stats.total_abandoned, stats.running) == (2, 1, 0)


async def test_a_cancelled_map_leaves_nothing_in_the_engine():
    steps = Steps()
    device = engine(steps, slots=4)
    async with fb.ContinuousBatcher(device, max_in_flight=4) as batcher:
        other = await batcher.submit(*records(device, "3 other"))
        task = asyncio.create_task(batcher.map(records(device, *["9 x"] * 20)))
        await steps.step()
        task.cancel()
        await settle()
        assert task.cancelled()
        assert (device.aborted, device.running, batcher.stats.queued) == (3, 1, 0)
        steps.run()
        await soon(other)


async def test_a_map_that_raises_aborts_the_rest():
    steps = Steps()
    device = engine(steps, slots=4, fail_on=["1 bad"])
    async with fb.ContinuousBatcher(device) as batcher:
        with pytest.raises(fb.BadRecord):
            await soon(batcher.map(records(device, "9 a", "1 bad", "9 b")))
        await settle()
        assert batcher.stats.running == 0
        assert device.running == 0
        steps.run()


async def test_a_bad_record_fails_alone():
    device = engine(fail_on=["1 bad"])
    async with fb.ContinuousBatcher(device) as batcher:
        results: list[Any] = await soon(batcher.map(records(device, "1 a", "1 bad", "2 c"), return_exceptions=True))
    assert [type(result) for result in results] == [fb.Completion, fb.BadRecord, fb.Completion]
    stats = batcher.stats
    assert (stats.total_completed, stats.total_failed) == (3, 1)


# -- Deadlines ---------------------------------------------------------------


async def test_a_record_whose_time_is_over_is_aborted_in_the_engine_and_fails_alone():
    steps = Steps()
    device = engine(steps, slots=4, endless=["1 endless"])
    async with fb.ContinuousBatcher(device) as batcher:
        endless, other = records(device, "1 endless", "2 other")
        late = await batcher.submit(endless, timeout_s=0.02)
        kept = await batcher.submit(other, timeout_s=600)
        with pytest.raises(fb.DeadlineExceeded):
            await soon(late)
        await settle()
        assert device.aborted == 1
        steps.run()
        await soon(kept)
        results: list[Any] = await soon(batcher.map([endless, other], timeout_s=0.05, return_exceptions=True))
        assert [type(result) for result in results] == [fb.DeadlineExceeded, fb.Completion]
        await until(lambda: device.aborted == 2)
        assert batcher.stats.total_expired == 2


async def test_a_map_that_finds_no_room_in_time_ends():
    steps = Steps()
    device = engine(steps, slots=1, endless=["1 endless"])
    async with fb.ContinuousBatcher(device, max_in_flight=1, max_queue_size=1) as batcher:
        running, queued = [await batcher.submit(r) for r in records(device, "1 endless", "1 queued")]
        results: list[Any] = await soon(
            batcher.map(records(device, "1 late", "1 late"), timeout_s=0.02, return_exceptions=True)
        )
        assert [type(result) for result in results] == [fb.DeadlineExceeded] * 2
        with pytest.raises(fb.DeadlineExceeded):
            await soon(batcher.map(records(device, "1 late"), timeout_s=0.02))
        running.cancel()
        steps.run()
        await soon(queued)
    stats = batcher.stats
    assert (stats.total_submitted, stats.total_completed, stats.total_abandoned) == (2, 1, 1)


async def test_a_map_that_expires_makes_room_for_whoever_waits():
    steps = Steps()
    device = engine(steps, slots=1, endless=["1 endless"])
    async with fb.ContinuousBatcher(device, max_in_flight=1, max_queue_size=2) as batcher:
        endless = await batcher.submit(*records(device, "1 endless"))
        late = asyncio.create_task(batcher.map(records(device, "1 a", "1 b"), timeout_s=0.05, return_exceptions=True))
        await settle()
        entering = asyncio.create_task(batcher.submit(*records(device, "1 c")))
        await settle()
        assert not entering.done()
        assert [type(result) for result in await soon(late)] == [fb.DeadlineExceeded] * 2
        await soon(entering)
        stats = batcher.stats
        assert (stats.queued, stats.total_abandoned, stats.total_expired) == (1, 2, 2)
        endless.cancel()
        steps.run()


# -- The engine's ways to fail -----------------------------------------------


async def test_an_engine_out_of_memory_gets_half_and_every_record_again():
    device = engine(slots=64, largest_flight=10)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=10_000) as batcher:
        results = await soon(batcher.map(records(device, *["3 x"] * 60), estimated_cost=[10] * 60))
        assert len(results) == 60
        assert all(result.text == words(3) for result in results)
        assert batcher.budget < 10_000
        stats = batcher.stats
        assert stats.out_of_memory > 0
        assert (stats.total_completed, stats.total_failed) == (60, 0)


async def test_a_burst_out_of_memory_halves_the_budget_once_and_it_rises_again_as_records_are_done():
    steps = Steps()
    device = engine(steps, slots=64, largest_flight=4)
    async with fb.ContinuousBatcher(device, target_tokens_in_flight=100) as batcher:
        futures = await batcher.submit_batch(records(device, *["2 x"] * 10), estimated_cost=[10] * 10)
        await settle()
        # Of ten in flight six were turned away; the first of them was the fifth, of 6 tokens each as far as is known.
        assert (batcher.stats.out_of_memory, batcher.stats.running) == (6, 4)
        assert batcher.budget == 15
        steps.run()
        await soon(asyncio.gather(*futures))
        assert batcher.budget < 100
        device._largest_flight = None  # whatever took the memory is gone
        await soon(batcher.map(records(device, *["1 x"] * 1000), estimated_cost=[10] * 1000))
        assert batcher.budget == 100


async def test_a_record_turned_away_is_counted_once_and_does_not_run_when_it_is_given_up():
    steps = Steps()
    device = engine(steps, slots=8, largest_flight=1)
    async with fb.ContinuousBatcher(device) as batcher:
        running, away = [await batcher.submit(r) for r in records(device, "5 running", "5 away")]
        await settle()
        assert batcher.stats.out_of_memory == 1
        away.cancel()
        steps.run()
        await soon(running)
        await settle()
        stats = batcher.stats
        assert (stats.total_submitted, stats.total_completed, stats.total_abandoned) == (2, 1, 1)
    assert device.started == ["5 running"]


async def test_records_without_a_cost_do_not_keep_an_engine_out_of_memory_busy_for_ever():
    device = engine(largest_flight=0)
    async with fb.ContinuousBatcher(device) as batcher:
        work = records(device, "1 a", "1 b")
        results: list[Any] = await soon(batcher.map(work, estimated_cost=[0, 0], return_exceptions=True))
        assert [type(result) for result in results] == [fb.EngineOutOfMemory] * 2


async def test_a_record_whose_prompt_cannot_be_read_hangs_nobody():
    class Broken(fb.FakeContinuousEngine):
        def prompt_ids(self, record: FakeRecord) -> Any:
            raise RuntimeError("no ids")

    device = Broken(by_length)
    async with fb.ContinuousBatcher(device) as batcher:
        work = records(device, "1 a", "2 b", "1 c")
        assert [r.text for r in await soon(batcher.map(work))] == ["w", "w w", "w"]
        assert (await soon(await batcher.submit(work[0]))).text == "w"


@pytest.mark.parametrize("tokens", [None, "many", float("nan")])
async def test_a_response_without_a_length_is_delivered_and_nothing_is_learnt_from_it(tokens):
    class Odd(fb.FakeContinuousEngine):
        async def generate(self, record: FakeRecord) -> fb.Completion:
            completion = await super().generate(record)
            return fb.Completion(completion.text, "stop", 1, tokens)

    device = Odd(by_length)
    async with fb.ContinuousBatcher(device) as batcher:
        assert len(await soon(batcher.map(records(device, *["1 a"] * 5)))) == 5
        assert batcher.expected_response_tokens(1, 100) == 50


async def test_what_the_engine_runs_cannot_wait_for_its_own_batcher():
    refused: list[Exception] = []

    class Recursive(fb.FakeContinuousEngine):
        async def generate(self, record: FakeRecord) -> fb.Completion:
            try:
                await batcher.submit(record)
            except fb.FlyteBatchError as error:
                refused.append(error)
            await batcher.stop()  # does not wait for this very record
            return await super().generate(record)

    device = Recursive(by_length)
    async with fb.ContinuousBatcher(device, max_in_flight=1) as batcher:
        assert (await soon(await batcher.submit(*records(device, "1 a")))).text == "w"
    assert "that same batcher" in str(refused[0])


async def test_an_engine_that_does_not_let_go_of_a_record_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("flyte_batch.batching.continuous._LETTING_GO_S", 0.01)
    done = asyncio.Event()

    class Stubborn(fb.FakeContinuousEngine):
        async def generate(self, record: FakeRecord) -> fb.Completion:
            while not done.is_set():
                try:
                    await done.wait()
                except asyncio.CancelledError:
                    continue
            return fb.Completion("late", "stop", 1, 1)

    batcher = fb.ContinuousBatcher(Stubborn())
    await batcher.start()
    future = await batcher.submit(*records(batcher.engine, "a"))  # type: ignore[arg-type]
    await settle()
    future.cancel()
    await soon(batcher.aclose())
    stats = batcher.stats
    assert (stats.running, stats.total_abandoned) == (0, 1)
    done.set()
    await settle()


async def test_after_a_death_nothing_runs_in_the_engine_and_whoever_was_turned_away_learns_of_it():
    steps = Steps()
    device = engine(steps, slots=8, largest_flight=2, endless=["1 endless"], dies_after=1)
    batcher = fb.ContinuousBatcher(device)
    await batcher.start()
    futures = await batcher.submit_batch(records(device, "1 endless", "1 last", "1 away", "1 away"))
    await settle()
    assert batcher.stats.out_of_memory > 0
    steps.run()
    outcomes: list[Any] = await soon(asyncio.gather(*futures, return_exceptions=True))
    assert sum(isinstance(outcome, fb.BatcherDied | fb.EngineDead) for outcome in outcomes) == 3
    await settle()
    assert device.running == 0
    assert batcher._task is not None
    assert batcher._task.done()
    await batcher.aclose()


def test_a_caller_may_give_up_while_the_loop_does_not_run_and_the_next_one_is_admitted():
    steps = Steps()

    async def full(batcher: fb.ContinuousBatcher[FakeRecord]) -> list[asyncio.Future[fb.Completion]]:
        await batcher.start()
        futures = [await batcher.submit(record) for record in records(batcher.engine, "1", words(15), "2")]
        await until(lambda: batcher.stats.running == 1)
        return futures

    async def rest(batcher: fb.ContinuousBatcher[FakeRecord], last: asyncio.Future[fb.Completion]) -> int:
        steps.run()
        async with asyncio.timeout(10):
            answer = await last
            await batcher.stop()
        return answer.response_tokens

    with asyncio.Runner() as runner:
        device = fb.FakeContinuousEngine(lambda text: "w w" if text == "2" else "w", slots=4, sleep=steps)
        batcher = fb.ContinuousBatcher(device, target_tokens_in_flight=10, expected_response_tokens=1)
        first, second, third = runner.run(full(batcher))
        assert second.cancel()
        assert runner.run(rest(batcher, third)) == 2
        assert first.done()


def test_a_loop_closed_under_records_in_flight_is_noticed():
    device = fb.FakeContinuousEngine(endless=["a"])
    batcher = fb.ContinuousBatcher(device)
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Future[Any]:
        await batcher.start()
        return await batcher.submit(*records(device, "a"))

    future = loop.run_until_complete(begin())
    loop.run_until_complete(settle())
    loop.close()

    async def look() -> None:
        with pytest.raises(fb.BatcherDied, match="loop was closed"):
            await batcher.submit(*records(device, "a"))

    asyncio.run(look())
    assert isinstance(future.exception(), fb.BatcherDied)


async def test_an_iterable_without_an_end_does_not_hold_the_loop_when_the_batcher_is_dead():
    device = engine(dies_after=0)
    batcher = fb.ContinuousBatcher(device)
    await batcher.start()
    (record,) = records(device, "1 a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.map(iter(lambda: record, None), return_exceptions=True), 0.05)
    await batcher.aclose()


async def test_what_a_caller_sets_in_one_record_does_not_reach_the_next():
    seen: list[int] = []
    count = contextvars.ContextVar("count", default=0)

    def answer(_: str) -> str:
        seen.append(count.get())
        count.set(count.get() + 1)
        return "w"

    device = fb.FakeContinuousEngine(answer)
    async with fb.ContinuousBatcher(device) as batcher:
        await soon(batcher.map(records(device, *"abc")))
    assert seen == [0, 0, 0]


async def test_a_result_keeps_nothing_of_its_way_alive():
    device = engine()
    async with fb.ContinuousBatcher(device) as batcher:
        future = await batcher.submit(*records(device, "1 a"))
        await soon(future)
        assert future.holder is None  # type: ignore[attr-defined]


async def test_a_record_for_which_an_empty_engine_has_no_memory_fails_alone():
    device = engine(largest_flight=0)
    async with fb.ContinuousBatcher(device) as batcher:
        budget = batcher.budget
        for text in ("1 a", "1 b"):
            with pytest.raises(fb.EngineOutOfMemory):
                await soon(batcher.map(records(device, text)))
        assert batcher.budget == budget
        both: list[Any] = await soon(batcher.map(records(device, "1 a", "1 b"), return_exceptions=True))
        assert [type(result) for result in both] == [fb.EngineOutOfMemory] * 2


async def test_a_dead_engine_fails_all_that_waits_and_ends_the_batcher_at_once():
    device = engine(slots=2, dies_after=3)
    batcher = fb.ContinuousBatcher(device, max_in_flight=2)
    await batcher.start()
    futures = await batcher.submit_batch(records(device, *["1 x"] * 10))
    outcomes: list[Any] = await soon(asyncio.gather(*futures, return_exceptions=True))
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds.count(fb.Completion) == 3
    assert set(kinds) == {fb.Completion, fb.EngineDead, fb.BatcherDied}
    assert not batcher.is_running
    with pytest.raises(fb.BatcherDied, match="EngineDead"):
        await batcher.submit(*records(device, "1 x"))
    await soon(batcher.aclose())
    assert device.closed


async def test_leaving_the_batcher_answers_what_is_queued_and_closes_the_engine():
    device = engine(slots=1)
    async with fb.ContinuousBatcher(device, max_in_flight=1) as batcher:
        futures = await batcher.submit_batch(records(device, *["2 x"] * 5))
    assert all(future.done() for future in futures)
    assert device.closed
    assert not batcher.is_running


async def test_what_is_submitted_before_the_dispatchers_first_step_is_not_lost():
    device = engine()
    batcher = fb.ContinuousBatcher(device)
    await batcher.start()
    future = await batcher.submit(*records(device, "1 x"))
    assert (await soon(future)).text == "w"
    await batcher.aclose()


async def test_backpressure_lets_a_queue_full_wait_or_refuses_it():
    steps = Steps()
    device = engine(steps, slots=1)
    async with fb.ContinuousBatcher(device, max_in_flight=1, max_queue_size=2) as batcher:
        for text in ("1 a", "1 b", "1 c"):
            await batcher.submit(*records(device, text))
        waiting = asyncio.create_task(batcher.submit(*records(device, "1 d")))
        await settle()
        assert not waiting.done()
        await steps.step()
        assert waiting.done()
        steps.run()
    steps = Steps()
    device = engine(steps, slots=1)
    async with fb.ContinuousBatcher(device, max_in_flight=1, max_queue_size=1, overflow="reject") as batcher:
        for text in ("1 a", "1 b"):
            await batcher.submit(*records(device, text))
        with pytest.raises(fb.QueueFull):
            await batcher.submit(*records(device, "1 c"))
        steps.run()


# -- Contexts, statistics, options --------------------------------------------


async def test_a_record_runs_in_its_own_callers_context():
    who = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []

    def answer(text: str) -> str:
        seen.append(f"{text} {who.get()}")
        return "w"

    device = fb.FakeContinuousEngine(answer)
    async with fb.ContinuousBatcher(device, max_in_flight=1) as batcher:

        async def caller(name: str, as_map: bool) -> None:
            who.set(name)
            (record,) = records(device, name)
            await (batcher.map([record]) if as_map else await batcher.submit(record))

        await soon(asyncio.gather(*(asyncio.create_task(caller(name, name > "b")) for name in "abcd")))
    assert seen == ["a a", "b b", "c c", "d d"]


@pytest.mark.parametrize(("options", "said"), [({"largest_flight": 1}, "out of memory"), ({"dies_after": 0}, "died")])
async def test_what_concerns_the_whole_engine_is_logged_in_no_callers_context(
    options: dict[str, int], said: str, caplog: pytest.LogCaptureFixture
):
    who = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []
    caplog.handler.addFilter(lambda record: seen.append(f"{record.getMessage()} {who.get()}") or True)
    device = engine(slots=4, **options)
    batcher = fb.ContinuousBatcher(device)
    await batcher.start()

    async def caller(name: str) -> None:
        who.set(name)
        await batcher.map(records(device, f"1 {name}", f"2 {name}"), return_exceptions=True)

    await soon(asyncio.gather(*(asyncio.create_task(caller(name)) for name in "ab")))
    await batcher.aclose()
    assert [line.split()[-1] for line in seen if said in line] == ["nobody"]


async def test_stats_tell_how_many_records_were_in_flight_and_when_there_were_none():
    steps = Steps()
    device = engine(steps, slots=4)
    async with fb.ContinuousBatcher(device, max_in_flight=4) as batcher:
        await asyncio.sleep(0.01)
        assert batcher.stats.starved_time_s > 0
        assert batcher.stats.busy_time_s == 0
        futures = await batcher.submit_batch(records(device, *["2 x"] * 6))
        await settle()
        stats = batcher.stats
        assert (stats.running, stats.queued) == (4, 2)
        await until(lambda: batcher.stats.avg_in_flight > 3.9)  # the time in which they were launched counts, too
        assert batcher.stats.avg_in_flight <= 4
        steps.run()
        await soon(asyncio.gather(*futures))
        stats = batcher.stats
        assert (stats.total_completed, stats.total_batches, stats.running) == (6, 6, 0)
        assert 0 < stats.fill <= 1
        starved = stats.starved_time_s
        await asyncio.sleep(0.01)
        assert batcher.stats.starved_time_s > starved


class Elsewhere(fb.FakeContinuousEngine):
    """Computes each record on a thread, which says when."""

    async def generate(self, record: Any) -> fb.Completion:
        return await asyncio.to_thread(self._compute)

    def _compute(self) -> fb.Completion:
        with fb.device_at_work():
            time.sleep(0.05)
        return fb.Completion("x", "stop", 1, 1)


async def test_a_device_that_has_nothing_to_do_while_the_loop_stands_still_is_not_busy():
    device = Elsewhere()
    async with fb.ContinuousBatcher(device, max_in_flight=2) as batcher:
        work = asyncio.ensure_future(batcher.map(records(device, *["w"] * 4)))
        while not work.done():
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 - what is tested
        stats = batcher.stats
    rounds = 4 / 2
    assert 0.05 * rounds <= stats.busy_time_s < 0.3 * rounds  # 0.8, if it counted until they were heard of
    assert stats.late_time_s > 0.1 * rounds
    assert batcher.is_told


async def test_what_is_said_around_an_await_is_no_news_of_the_device():
    """It ends when the event loop has time for it."""

    class Says(fb.FakeContinuousEngine):
        async def generate(self, record: Any) -> fb.Completion:
            with fb.device_at_work():
                return await super().generate(record)

    device = Says(slots=4)
    async with fb.ContinuousBatcher(device) as batcher:
        await batcher.map(records(device, "w"))
        assert not batcher.is_told


async def test_an_engine_that_computes_on_the_event_loop_says_when_by_itself():
    class Says(fb.FakeContinuousEngine):
        async def generate(self, record: Any) -> fb.Completion:
            with fb.device_at_work():
                time.sleep(0.05)  # noqa: ASYNC251 - as an engine should not
            await asyncio.sleep(0.5)
            return fb.Completion("x", "stop", 1, 1)

    device = Says(slots=4)
    async with fb.ContinuousBatcher(device) as batcher:
        await batcher.map(records(device, "w"))
        assert batcher.is_told
        assert 0.05 <= batcher.stats.busy_time_s < 0.5


async def test_an_engine_that_blocks_the_loop_is_named_and_counted(caplog):
    def blocks(_: str) -> str:
        time.sleep(0.05)
        return "w"

    device = fb.FakeContinuousEngine(blocks)
    async with fb.ContinuousBatcher(device, blocked_loop_warning_s=0.01) as batcher:
        await soon(batcher.map(records(device, "a", "b")))
        assert batcher.stats.loop_blocked_s >= 0.05
    assert caplog.text.count("FakeContinuousEngine.generate blocked the event loop") == 1


async def test_an_unclosed_batcher_warns_when_it_is_collected():
    batcher = fb.ContinuousBatcher(engine())
    await batcher.start()
    assert batcher._task is not None
    batcher._task.cancel()
    await settle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del batcher
        gc.collect()
    assert any("unclosed ContinuousBatcher" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_tokens_in_flight": 0}, "target_tokens_in_flight"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"expected_response_tokens": -1}, "expected_response_tokens"),
        ({"shared_prefix": -1}, "shared_prefix"),
        ({"max_queue_size": 0}, "max_queue_size"),
        ({"turn_size": 0}, "turn_size"),
        ({"overflow": "drop"}, "overflow"),
        ({"blocked_loop_warning_s": float("nan")}, "blocked_loop_warning_s"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(options, message):
    with pytest.raises(fb.BadInput, match=message):
        fb.ContinuousBatcher(engine(), **options)


@pytest.mark.parametrize(("name", "value"), [("slots", 0), ("capacity_tokens", None)])
def test_an_engines_own_numbers_are_checked_by_their_names(name, value):
    device = engine()
    setattr(device, name, value)
    with pytest.raises((TypeError, fb.BadInput), match=f"the engine's {name}"):
        fb.ContinuousBatcher(device)


def test_an_engine_that_takes_batches_only_is_sent_to_the_other_batcher():
    with pytest.raises(TypeError, match="EngineBatcher"):
        fb.ContinuousBatcher(fb.FakeEngine())  # type: ignore[arg-type]


# -- Liveness ----------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 9)),
    st.tuples(st.just("submit with timeout"), st.integers(0, 9)),
    st.tuples(st.just("submit_batch"), st.integers(0, 9)),
    st.tuples(st.just("map"), st.integers(0, 20)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("tick"), st.integers(1, 30)),
    st.tuples(st.just("stop"), st.just(0)),
    st.tuples(st.just("kill"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@example(
    script=[("submit", 0), ("submit with timeout", 0)],
    slots=1,
    cap=2,
    budget=104,
    queue=1,
    largest=1,
    dies=None,
    overflow="wait",
)  # a record turned away whose time was over was counted twice
@given(
    script=st.lists(ACTIONS, max_size=25),
    slots=st.integers(1, 4),
    cap=st.integers(1, 6),
    budget=st.integers(1, 300),
    queue=st.integers(1, 12),
    largest=st.one_of(st.none(), st.integers(1, 4)),
    dies=st.one_of(st.none(), st.integers(0, 20)),
    overflow=st.sampled_from(["wait", "reject"]),
)
def test_whatever_callers_engine_and_stop_do_every_accepted_future_resolves_within_the_budget(
    script, slots, cap, budget, queue, largest, dies, overflow
):
    async def play() -> None:
        device = engine(slots=slots, largest_flight=largest, dies_after=dies, fail_on=["3 3"])
        batcher = fb.ContinuousBatcher(
            device, max_in_flight=cap, target_tokens_in_flight=budget, max_queue_size=queue, overflow=overflow
        )
        await batcher.start()
        calls: list[asyncio.Task[Any]] = []
        accepted: list[asyncio.Future[Any]] = []

        def some(count: int) -> list[FakeRecord]:
            return records(device, *(f"{1 + i % 4} {i}" for i in range(count)))

        async def submit(number: int, timeout_s: float | None = None) -> None:
            accepted.append(await batcher.submit(*records(device, f"{number} {number}"), timeout_s=timeout_s))
            await accepted[-1]

        async def submit_batch(number: int) -> None:
            accepted.extend(await batcher.submit_batch(some(number)))

        def check() -> None:
            assert batcher.stats.running <= cap
            assert batcher.stats.running <= 1 or batcher.cost_in_flight <= budget
            assert batcher.stats.queued <= queue

        for action, number in script:
            if action == "submit":
                calls.append(asyncio.create_task(submit(number)))
            elif action == "submit with timeout":
                calls.append(asyncio.create_task(submit(number, 0.0001 * number)))
            elif action == "submit_batch":
                calls.append(asyncio.create_task(submit_batch(number)))
            elif action == "map":
                calls.append(asyncio.create_task(batcher.map(some(number), return_exceptions=number % 2 == 0)))
            elif action == "cancel" and (targets := [*calls, *accepted]):
                targets[number % len(targets)].cancel()
            elif action == "tick":
                for _ in range(number):
                    await asyncio.sleep(0)
                    check()
            elif action == "stop":
                calls.append(asyncio.create_task(batcher.stop()))
            elif action == "kill" and batcher._task is not None:
                batcher._task.cancel()
            check()
        await soon(batcher.stop())
        await soon(asyncio.gather(*calls, return_exceptions=True))
        await settle()
        assert all(future.done() for future in accepted)
        for future in accepted:
            if not future.cancelled():
                future.exception()
        assert not batcher.is_running
        stats = batcher.stats
        assert (stats.queued, stats.running, batcher.cost_in_flight) == (0, 0, 0)
        assert stats.total_submitted == stats.total_completed + stats.total_abandoned
        assert batcher.lanes == {}
        # Nothing goes on in the engine.
        assert device.running == 0
        await device.aclose()

    asyncio.run(play())
