"""Load on batchers and functions in virtual time: what is counted, and as what."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import VirtualTimeLoop, in_virtual_time

import flyte_batch as fb
from flyte_batch.load import LoadResult, ServiceLevel, run_load
from flyte_batch.load.generator import arrival_times
from flyte_batch.load.underway import Underway

RECORDS = list(range(50))


async def at_once(record: int) -> int:
    return record


def load(
    target: Any, rate_per_s: float = 50, seconds: float = 20, records: Any = RECORDS, **options: Any
) -> LoadResult:
    return in_virtual_time(run_load(target, records, rate_per_s, seconds, **options))


# -- Arrivals --------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.5, 500))
def test_arrivals_are_a_poisson_process_of_the_rate_that_was_asked_for(seed: int, rate: float) -> None:
    seconds = 2000 / rate
    times = list(arrival_times(rate, seconds, random.Random(seed)))
    assert times == sorted(times)
    assert all(0 < at < seconds for at in times)
    assert abs(len(times) - 2000) < 6 * math.sqrt(2000)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.25)  # as far apart as exponential gaps are


def test_a_load_tells_how_it_goes_while_it_goes() -> None:
    told: list[Underway] = []

    async def answer(record: int) -> None:
        await asyncio.sleep(0.1 if record else 3)
        if record == 1:
            raise ValueError

    result = load(answer, 50, 20, warm_up_s=5, timeout_s=10, on_progress=told.append)
    assert [each.elapsed_s for each in told] == pytest.approx([0.5 * tick for tick in range(len(told))])
    assert [each.is_warming_up for each in told] == [each.elapsed_s < 5 for each in told]
    assert (told[0].requests, told[0].in_flight, told[0].failed, told[0].p99_ms) == (0, 0, 0, None)
    assert told[9].requests == pytest.approx(4.5 * 50, rel=0.2)  # of the warm-up
    assert told[9].p50_ms is None
    assert told[11].requests < 60  # it begins anew
    assert [each.left_s for each in (told[0], told[10], told[-1])] == [25, 20, 0]
    last = told[-1]
    assert last.elapsed_s > 25  # for as long as answers are waited for
    assert 0 < last.in_flight < 10
    assert last.requests == result.requests
    assert last.failed == result.errors["ValueError"] > 0
    assert result.latencies.p50_ms is not None
    assert last.p50_ms is not None
    assert result.latencies.p50_ms <= last.p50_ms <= 1.13 * result.latencies.p50_ms


def test_the_same_seed_asks_the_same_records_at_the_same_times_and_another_seed_does_not() -> None:
    def asked(seed: int) -> list[tuple[float, int]]:
        seen = []

        async def note(record: int) -> None:
            seen.append((asyncio.get_running_loop().time(), record))

        load(note, seed=seed)
        return seen

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


def test_every_record_has_its_turn_before_one_comes_again() -> None:
    seen = []

    async def note(record: int) -> None:
        seen.append(record)

    result = load(note)
    assert sorted(seen[:50]) == RECORDS
    assert seen[:50] != RECORDS  # neighbours in a source are often alike
    assert seen[50:100] == seen[:50]
    assert result.distinct_records == 50


# -- Latencies -------------------------------------------------------------


def test_a_service_that_always_takes_as_long_has_that_latency_at_every_percentile() -> None:
    async def slow(record: int) -> None:
        await asyncio.sleep(0.2)

    found = load(slow).latencies
    for each in (found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms):
        assert each == pytest.approx(200)


def test_a_service_that_stands_still_for_a_second_delays_all_that_were_due_in_it() -> None:
    """A closed loop would have one slow request; here it is the 1 s of 20 s that is really lost."""
    lock = asyncio.Lock()

    async def one_at_a_time(record: int) -> None:
        async with lock:
            at = asyncio.get_running_loop().time()
            await asyncio.sleep(1.0 if 10 <= at < 10.02 else 0.001)

    result = load(one_at_a_time)
    assert result.latencies.p50_ms == pytest.approx(1, abs=1)
    assert result.latencies.p95_ms is not None
    assert 1 < result.latencies.p95_ms < 500
    assert result.latencies.p99_ms is not None
    assert result.latencies.p99_ms > 700


def test_an_event_loop_that_is_held_delays_what_was_due_meanwhile_and_arrivals_are_said_to_be_late() -> None:
    held = False

    async def holding(record: int) -> None:
        nonlocal held
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        if loop.time() >= 10 and not held:
            held = True
            loop.block(1.0)

    result = load(holding)
    assert result.late_max_ms > 900
    assert result.late_p99_ms > 700
    assert result.is_generator_late
    assert result.latencies.p99_ms is not None
    assert result.latencies.p99_ms > 700
    assert not load(at_once).is_generator_late


def test_the_rate_that_was_offered_is_what_was_due_and_the_load_is_the_same_when_nobody_answers() -> None:
    async def never(record: int) -> None:
        await asyncio.Event().wait()

    good, bad = load(at_once), load(never)
    assert good.requests == bad.requests == pytest.approx(1000, abs=150)
    assert good.offered_per_s == bad.offered_per_s == good.requests / 20


def test_the_warm_up_is_not_counted() -> None:
    async def cold(record: int) -> None:
        if asyncio.get_running_loop().time() < 5:
            await asyncio.sleep(1)
            raise ValueError

    result = load(cold, warm_up_s=5)
    assert result.requests == result.ok == pytest.approx(1000, abs=150)
    assert result.latencies.max_ms == pytest.approx(0, abs=1e-6)


# -- What counts as what ---------------------------------------------------


def test_errors_are_counted_by_class_and_have_no_latency() -> None:
    async def failing(record: int) -> None:
        if record == 1:
            raise fb.BadRecord("empty")
        if record == 2:
            raise ValueError
        if record == 3:
            raise fb.DeadlineExceeded("gave up")

    result = load(failing)
    assert set(result.errors) == {"BadRecord", "ValueError", "DeadlineExceeded"}
    assert result.ok + sum(result.errors.values()) == result.requests
    assert result.latencies.requests == result.ok
    assert [each.name for each in result.broken] == ["errors"]


def test_what_is_not_answered_in_time_is_an_error_and_counts_with_the_time_it_was_waited_for() -> None:
    async def half_stuck(record: int) -> None:
        if record % 2:
            await asyncio.Event().wait()

    result = load(half_stuck, timeout_s=3.0)
    assert set(result.errors) == {"TimeoutError"}
    assert result.latencies.requests == result.requests
    assert result.latencies.max_ms == pytest.approx(3000)
    assert "p99" in [each.name for each in result.broken]


@pytest.mark.parametrize("error", [fb.QueueFull, fb.BatcherDied, fb.BatcherNotRunning, fb.EngineDead])
def test_nobody_there_to_answer_is_unavailability(error: type[Exception]) -> None:
    async def absent(record: int) -> None:
        if record < 25:
            raise error("no")

    result = load(absent)
    assert result.unavailable == {error.__name__: result.requests - result.ok}
    assert result.errors == {}
    assert [each.name for each in result.broken] == ["availability"]


def test_an_answer_that_the_service_cancels_is_an_error() -> None:
    async def cancelling(record: int) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    result = load(cancelling)
    assert result.errors == {"CancelledError": result.requests}


def test_beyond_the_most_in_flight_requests_are_not_made_and_count_as_unavailable() -> None:
    at_once_most = running = 0

    async def slow(record: int) -> None:
        nonlocal at_once_most, running
        running += 1
        at_once_most = max(at_once_most, running)
        await asyncio.sleep(1)
        running -= 1

    result = load(slow, max_in_flight=10)
    assert at_once_most == 10
    assert result.ok == pytest.approx(200, abs=20)
    assert result.unavailable == {"TooManyInFlight": result.requests - result.ok}


def device(seconds: float) -> Any:
    async def process(batch: list[int]) -> list[int]:
        await asyncio.sleep(seconds)
        return batch

    return process


def on_a_batcher(rate_per_s: float, process: Any, **options: Any) -> tuple[LoadResult, fb.BatchStats]:
    async def main() -> tuple[LoadResult, fb.BatchStats]:
        async with fb.DynamicBatcher(process, max_batch_size=10, batch_timeout_s=0.005, **options) as batcher:
            result = await run_load(batcher, RECORDS, rate_per_s, 20)
            assert batcher.stats.queued == 0
            return result, batcher.stats

    return in_virtual_time(main())


def test_a_batcher_within_its_capacity_keeps_the_level_and_every_request_went_through_it() -> None:
    result, stats = on_a_batcher(80, device(0.1))  # it can do 100
    assert result.is_kept
    assert result.ok == result.requests == stats.total_completed
    assert result.latencies.p50_ms is not None
    assert 50 < result.latencies.p50_ms < 500


def test_a_batcher_beyond_its_capacity_grows_a_queue_that_breaks_the_latencies() -> None:
    result, _ = on_a_batcher(200, device(0.1))
    assert {each.name for each in result.broken} >= {"p50", "p99"}
    assert result.errors["TimeoutError"] > 0 or result.latencies.max_ms > 5000


def test_a_bounded_queue_that_rejects_turns_overload_into_unavailability_and_answers_the_rest_in_time() -> None:
    result, _ = on_a_batcher(200, device(0.1), overflow="reject", max_queue_size=20)
    assert [each.name for each in result.broken] == ["availability"]
    assert set(result.unavailable) == {"QueueFull"}
    assert result.availability == pytest.approx(0.5, abs=0.1)
    assert result.latencies.max_ms is not None
    assert result.latencies.max_ms < 500


def test_an_engine_that_dies_leaves_all_later_requests_without_service() -> None:
    async def mortal(batch: list[int]) -> list[int]:
        await asyncio.sleep(0.01)
        if asyncio.get_running_loop().time() > 15:
            raise fb.EngineDead("gone")
        return batch

    result, _ = on_a_batcher(50, mortal)
    assert set(result.unavailable) == {"EngineDead", "BatcherDied"}
    assert result.availability == pytest.approx(0.75, abs=0.08)
    assert "availability" in [each.name for each in result.broken]


def test_a_singleton_that_loads_the_engine_anew_loses_only_what_was_pending() -> None:
    lives = 0

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        nonlocal lives
        lives += 1
        engine = fb.FakeEngine(seconds_per_batch=0.05, dies_after=100 if lives == 1 else None)
        return fb.EngineBatcher(engine, batch_timeout_s=0.005)

    async def ask(text: str) -> Any:
        batcher = await solver()
        return await (await batcher.submit(batcher.engine.prepare(fb.Prompt(text))))

    async def main() -> LoadResult:
        try:
            return await run_load(ask, ["one", "two"], 50, 20)
        finally:
            await solver.aclose()

    result = in_virtual_time(main())
    assert lives == 2
    lost = sum(result.unavailable.values())
    assert 1 <= lost <= 20
    assert result.ok == result.requests - lost


def test_a_load_that_is_cancelled_leaves_no_task_and_nothing_in_the_batcher() -> None:
    async def main() -> None:
        async with fb.DynamicBatcher(device(0.1), max_batch_size=10) as batcher:
            before = asyncio.all_tasks()
            under_way = asyncio.create_task(run_load(batcher, RECORDS, 500, 20))
            await asyncio.sleep(5)
            assert batcher.stats.queued > 100
            under_way.cancel()
            with pytest.raises(asyncio.CancelledError):
                await under_way
            assert asyncio.all_tasks() == before
            assert batcher.stats.queued == 0

    in_virtual_time(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": []}, "there are no records"),
        ({"rate_per_s": 0}, "rate_per_s must be finite and above 0"),
        ({"rate_per_s": math.nan}, "rate_per_s must be finite"),
        ({"seconds": 0}, "seconds must be finite and above 0"),
        ({"warm_up_s": -1}, "warm_up_s must be finite and 0 or more"),
        ({"timeout_s": 2}, "timeout_s .2. must be above the p99 that is wanted .2000 ms."),
        ({"max_in_flight": 0}, "max_in_flight must be 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fb.BadInput, match=message):
        load(at_once, **options)


def test_a_slower_promise_may_be_kept_where_a_faster_one_is_not() -> None:
    async def slow(record: int) -> None:
        await asyncio.sleep(0.7)

    assert [each.name for each in load(slow).broken] == ["p50"]
    assert load(slow, level=ServiceLevel(p50_ms=1000)).is_kept
