"""``timeout_s``: a record that has no result in time fails with `DeadlineExceeded`, whatever it waits for."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from stepping import NEVER_S, Device, settle, soon

import flyte_batch as fb

SHORT_S = 0.02


async def test_a_record_that_waits_too_long_is_taken_out_of_the_queue():
    device = Device()
    async with fb.DynamicBatcher[str, Any](device, max_batch_size=1) as batcher:
        device.hold()
        first = await batcher.submit("first")
        await device.at_work()
        late = await batcher.submit("late", timeout_s=SHORT_S)
        (late_too,) = await batcher.submit_batch(["late too"], timeout_s=SHORT_S)
        patient = await batcher.submit("patient", timeout_s=NEVER_S)
        for future in (late, late_too):
            with pytest.raises(fb.DeadlineExceeded, match="timeout_s"):
                await soon(future)
        assert batcher.stats.queued == 1
        device.release()
        assert await soon(asyncio.gather(first, patient)) == [("done", "first"), ("done", "patient")]
        stats = batcher.stats
        assert (stats.total_expired, stats.total_abandoned, stats.total_completed) == (2, 2, 2)
    assert device.seen == ["first", "patient"]


async def test_a_record_on_a_device_that_cannot_give_it_back_fails_in_time_and_its_result_is_dropped():
    device = Device()
    async with fb.DynamicBatcher[str, Any](device, batch_timeout_s=0) as batcher:
        device.hold()
        late = await batcher.submit("late", timeout_s=SHORT_S)
        await device.at_work()
        with pytest.raises(fb.DeadlineExceeded):
            await soon(late)
        device.release()
        assert await soon(await batcher.submit("next")) == ("done", "next")
        stats = batcher.stats
        assert (stats.total_expired, stats.total_abandoned, stats.total_completed) == (1, 0, 2)


async def test_a_maps_records_expire_each_from_when_it_was_queued():
    device = Device()
    async with fb.DynamicBatcher[int, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        device.hold()
        results: list[Any] = await soon(batcher.map(range(6), timeout_s=SHORT_S, return_exceptions=True))
        assert [type(result) for result in results] == [fb.DeadlineExceeded] * 6
        assert batcher.stats.queued == 0
        device.release()
        # The batcher goes on, and a result that comes too late for one map is nobody else's.
        assert await soon(batcher.map(range(3), timeout_s=NEVER_S)) == [("done", i) for i in range(3)]
        device.hold()
        with pytest.raises(fb.DeadlineExceeded):
            await soon(batcher.map(range(6), timeout_s=SHORT_S))
        device.release()


async def test_a_record_that_finds_no_room_in_time_fails_and_leaves_its_place_to_the_next():
    device = Device()
    async with fb.DynamicBatcher[str, Any](device, max_batch_size=1, max_queue_size=1) as batcher:
        device.hold()
        await batcher.submit("running")
        await device.at_work()
        await batcher.submit("waiting")
        late = await soon(batcher.submit("late", timeout_s=SHORT_S))
        with pytest.raises(fb.DeadlineExceeded):
            await soon(late)
        following = asyncio.create_task(batcher.submit("following"))
        await settle()
        device.release()
        assert await soon(await soon(following)) == ("done", "following")
    assert "late" not in device.seen


async def test_a_result_in_time_ends_the_timer_and_nothing_keeps_it():
    class Result:
        pass

    async def answer(records: list[int]) -> list[Result]:
        return [Result() for _ in records]

    async with fb.DynamicBatcher[int, Result](answer, batch_timeout_s=0) as batcher:
        kept = [
            weakref.ref(await soon(await batcher.submit(1, timeout_s=NEVER_S))),
            weakref.ref((await soon(batcher.map([1], timeout_s=NEVER_S)))[0]),
            weakref.ref(await soon((await batcher.submit_batch([1], timeout_s=NEVER_S))[0])),
        ]
        gc.collect()
        assert [ref() for ref in kept] == [None, None, None]


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "soon"])
async def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout_s):
    async with fb.DynamicBatcher[int, Any](Device()) as batcher:
        for call in (batcher.submit, lambda record, **o: batcher.map([record], **o)):
            with pytest.raises((TypeError, ValueError), match="timeout_s"):
                await call(1, timeout_s=timeout_s)
        assert batcher.stats.total_submitted == 0
