"""The rate at which a service level stops to be kept, found on simulated devices of known capacity."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from virtual_time import in_virtual_time

import flyte_batch as fb
from flyte_batch.load import Limit, LoadResult, find_limit, run_load

RECORDS = list(range(100))


def batches_of_ten(seconds: float) -> Callable[[list[int]], Awaitable[list[int]]]:
    async def process(batch: list[int]) -> list[int]:
        await asyncio.sleep(seconds)
        return batch

    return process


def limit_of(process: Any, batching: dict[str, Any] | None = None, **options: Any) -> Limit:
    async def main() -> Limit:
        given = {"max_batch_size": 10, "batch_timeout_s": 0.005, **(batching or {})}
        async with fb.DynamicBatcher(process, **given) as batcher:
            return await find_limit(batcher, RECORDS, **options)

    return in_virtual_time(main())


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15])
def test_the_limit_is_within_15_percent_of_what_the_device_can_do(seconds: float) -> None:
    capacity = 10 / seconds
    limit = limit_of(batches_of_ten(seconds))
    assert limit.highest_kept_per_s is not None
    assert limit.lowest_broken_per_s is not None
    assert 0.85 * capacity < limit.highest_kept_per_s < limit.lowest_broken_per_s < 1.15 * capacity
    assert limit.lowest_broken_per_s <= 1.1 * limit.highest_kept_per_s
    assert "p50" in limit.why


def test_a_finer_search_takes_longer_steps_and_gives_a_narrower_answer() -> None:
    limit = limit_of(batches_of_ten(0.1), precision=0.03, seconds=60, start_per_s=70)
    assert limit.highest_kept_per_s is not None
    assert limit.lowest_broken_per_s is not None
    assert limit.lowest_broken_per_s <= 1.03 * limit.highest_kept_per_s
    assert 0.95 * 100 < limit.highest_kept_per_s < 1.03 * 100


def test_a_queue_that_rejects_breaks_by_availability_near_the_same_rate() -> None:
    limit = limit_of(batches_of_ten(0.1), {"overflow": "reject", "max_queue_size": 30})
    assert limit.highest_kept_per_s is not None
    assert 75 < limit.highest_kept_per_s < 105
    assert limit.why.startswith("availability ")
    assert "QueueFull" in limit.why
    assert "p50" not in limit.why


def test_the_same_seed_gives_the_same_steps() -> None:
    assert limit_of(batches_of_ten(0.1), seed=3) == limit_of(batches_of_ten(0.1), seed=3)


def test_each_step_has_arrivals_of_its_own() -> None:
    """Of the same seed, twice the rate would be the same arrivals in half the time: no second opinion."""
    seen: list[list[int]] = [[]]

    async def note(record: int) -> None:
        seen[-1].append(record)

    in_virtual_time(find_limit(note, RECORDS, most_per_s=32, on_step=lambda step: seen.append([])))
    assert len({tuple(step[10:60]) for step in seen[:3]}) == 3


def test_a_rate_that_was_kept_above_one_that_was_not_does_not_count() -> None:
    def step(rate: float, kept: bool) -> LoadResult:
        async def answer(record: int) -> None:
            if not kept:
                raise ValueError

        return in_virtual_time(run_load(answer, RECORDS, rate, 20))

    limit = Limit.of([step(10, True), step(30, True), step(20, False), step(40, False)])
    assert (limit.highest_kept_per_s, limit.lowest_broken_per_s) == (10, 20)
    assert limit.highest_kept is limit.steps[0]
    assert "ValueError" in limit.why


def test_a_first_rate_that_is_too_high_is_halved_until_one_is_kept() -> None:
    limit = limit_of(batches_of_ten(0.1), start_per_s=400)
    assert [step.rate_per_s for step in limit.steps[:3]] == [400, 200, 100]
    assert limit.highest_kept_per_s is not None
    assert 85 < limit.highest_kept_per_s < 115


def test_a_service_that_is_too_slow_at_any_rate_keeps_none() -> None:
    limit = limit_of(batches_of_ten(0.6))
    assert limit.highest_kept_per_s is None
    assert limit.highest_kept is None
    assert limit.lowest_broken_per_s == min(step.rate_per_s for step in limit.steps) == 0.5
    assert limit.why.startswith("p50 ")


def test_where_nothing_breaks_the_highest_rate_that_may_be_tried_is_the_last() -> None:
    async def at_once(record: int) -> int:
        return record

    limit = in_virtual_time(find_limit(at_once, RECORDS, most_per_s=50))
    assert [step.rate_per_s for step in limit.steps] == [8, 16, 32, 50]
    assert (limit.highest_kept_per_s, limit.lowest_broken_per_s, limit.why) == (50, None, "")


class Watched:
    """A batcher, and what was in it when the second request after a step came: the first is alone."""

    def __init__(self, batcher: fb.DynamicBatcher[int, int]) -> None:
        self._batcher = batcher
        self._came = 0
        self.found: list[int] = []
        self.left: list[int] = []

    async def submit(self, record: int) -> asyncio.Future[int]:
        self._came += 1
        if self._came == 2:
            self.found.append(self._batcher.stats.queued + self._batcher.stats.running)
        return await self._batcher.submit(record)

    def on_step(self, step: LoadResult) -> None:
        self._came = 0
        self.left.append(self._batcher.stats.queued + self._batcher.stats.running)


def test_every_step_finds_the_queue_empty_and_the_device_idle() -> None:
    async def main() -> Watched:
        async with fb.DynamicBatcher(batches_of_ten(0.1), max_batch_size=10, batch_timeout_s=0.0) as batcher:
            watched = Watched(batcher)
            await find_limit(watched, RECORDS, start_per_s=400, on_step=watched.on_step)
            return watched

    watched = in_virtual_time(main())
    assert any(watched.left)  # a batch whose records were given up is still on the device
    assert set(watched.found) == {0}


def test_a_service_that_dies_ends_the_search_with_what_is_known() -> None:
    async def dies_of_much(batch: list[int]) -> list[int]:
        await asyncio.sleep(0.01)
        if len(batch) > 3:
            raise fb.EngineDead("too much")
        return batch

    limit = limit_of(dies_of_much)
    assert limit.highest_kept_per_s is not None
    assert limit.lowest_broken_per_s == limit.steps[-1].rate_per_s
    assert "BatcherDied" in limit.why
    assert [step.is_kept for step in limit.steps] == [True] * (len(limit.steps) - 1) + [False]


def test_a_service_that_does_not_answer_at_all_is_an_error_before_any_step() -> None:
    async def never(record: int) -> None:
        await asyncio.Event().wait()

    async def broken(record: int) -> None:
        raise fb.BadRecord("what is this")

    with pytest.raises(fb.DeadlineExceeded, match="a request alone was not answered in 10 s"):
        in_virtual_time(find_limit(never, RECORDS))
    with pytest.raises(fb.BadRecord, match="what is this"):
        in_virtual_time(find_limit(broken, RECORDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": 0.001}, "precision must be at least 0.02"),
        ({"start_per_s": 10, "most_per_s": 5}, "most_per_s .5. is below start_per_s .10."),
        ({"start_per_s": 0}, "start_per_s must be finite and above 0"),
        ({"records": []}, "there are no records"),
    ],
)
def test_a_search_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    async def at_once(record: int) -> int:
        return record

    with pytest.raises(fb.BadInput, match=message):
        in_virtual_time(find_limit(at_once, **{"records": RECORDS, **options}))
