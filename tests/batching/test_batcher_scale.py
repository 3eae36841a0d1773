"""A million records pass through, and the batcher holds a few batches of them at a time."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from stepping import soon

from flyte_batch.batching import DynamicBatcher
from flyte_batch.batching.base import ResultFuture

MILLION = 1_000_000


async def test_a_million_records_through_map_hold_only_a_few_batches_in_the_queue():
    most_queued = most_drawn_ahead = answered = 0
    latest = -1

    def records():
        nonlocal latest
        while latest < MILLION - 1:
            latest += 1
            yield latest

    async def process(batch: list[int]) -> list[int]:
        nonlocal most_queued, most_drawn_ahead, answered
        most_queued = max(most_queued, batcher.stats.queued + len(batch))
        most_drawn_ahead = max(most_drawn_ahead, latest - answered)
        answered += len(batch)
        return batch

    async with DynamicBatcher[int, int](process, batch_timeout_s=0) as batcher:
        results = await soon(batcher.map(records()))
    assert len(results) == MILLION
    assert all(map(int.__eq__, results, range(MILLION)))
    assert most_queued <= 3 * 256
    assert most_drawn_ahead <= 4 * 256


async def test_submits_from_many_tasks_leave_nothing_behind():
    async def process(batch: list[int]) -> list[int]:
        return batch

    async def caller(number: int) -> None:
        for i in range(20):
            future = await batcher.submit(number * 100 + i)
            if i % 7 == 0:
                future.cancel()
            else:
                assert await future == number * 100 + i

    def live(kind: type[Any]) -> int:
        gc.collect()
        return sum(isinstance(thing, kind) for thing in gc.get_objects())

    async with DynamicBatcher[int, int](process, batch_timeout_s=0, max_queue_size=50) as batcher:
        before = live(ResultFuture)
        await soon(asyncio.gather(*map(caller, range(500))))
        assert live(ResultFuture) == before
        assert batcher.lanes == {}
        assert len(batcher._backlog._rotation) == 0
        assert batcher.stats.total_completed + batcher.stats.total_abandoned == 10_000


async def test_submitting_and_cancelling_while_the_device_is_busy_does_not_pile_up():
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def process(batch: list[int]) -> list[int]:
        entered.set()
        await go_on.wait()
        return batch

    async with DynamicBatcher[int, int](process, batch_timeout_s=0) as batcher:
        first = await batcher.submit(0)
        await soon(entered.wait())
        for i in range(2_000):
            (await asyncio.create_task(batcher.submit(i))).cancel()
        assert len(batcher._backlog._rotation) == 0
        assert batcher.lanes == {}
        go_on.set()
        await soon(first)
        assert batcher.stats.total_batches == 1
