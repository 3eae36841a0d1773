"""What leaves, when, and for whom: the batcher as its callers see it while all goes well."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import itertools
import logging
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from stepping import NEVER_S, Device, settle, soon, until

from flyte_batch.batching import BatchStats, DynamicBatcher, TokenBatcher, processing
from flyte_batch.device_calls import device_at_work
from flyte_batch.errors import BadInput, BatcherError, QueueFull
from flyte_batch.records import Prompt


def done(*records: Any) -> list[Any]:
    return [("done", record) for record in records]


# -- What a record costs ---------------------------------------------------


class Tokens:
    def estimate_tokens(self) -> int:
        return 11

    def estimate_cost(self) -> int:
        return 22


async def cost_in_stats(batcher: DynamicBatcher[Any, Any], record: Any, **given: Any) -> float:
    async with batcher:
        await soon(await batcher.submit(record, **given))
        return batcher.stats.total_batch_cost


async def test_an_explicit_cost_comes_before_the_estimator_the_records_method_and_the_default():
    def batcher(**options: Any) -> DynamicBatcher[Any, Any]:
        return DynamicBatcher(Device(), batch_timeout_s=0, default_cost=7, **options)

    assert await cost_in_stats(batcher(cost_estimator=lambda _: 3), Tokens(), estimated_cost=2) == 2
    assert await cost_in_stats(batcher(cost_estimator=lambda _: 3), Tokens()) == 3
    assert await cost_in_stats(batcher(), Tokens()) == 22
    assert await cost_in_stats(batcher(), "no estimate") == 7


async def test_a_token_batcher_asks_for_tokens_before_cost_and_takes_its_own_names_first():
    def batcher(**options: Any) -> TokenBatcher[Any, Any]:
        return TokenBatcher(inference_fn=Device(), batch_timeout_s=0, **options)

    assert await cost_in_stats(batcher(), Tokens()) == 11
    assert await cost_in_stats(batcher(), Tokens(), estimated_tokens=1, estimated_cost=2) == 1
    assert await cost_in_stats(batcher(token_estimator=lambda _: 4, cost_estimator=lambda _: 5), "x") == 4
    assert await cost_in_stats(batcher(default_token_estimate=8, default_cost=9), "x") == 8
    assert await cost_in_stats(batcher(), Prompt("eight ch")) == 3


async def test_map_and_submit_batch_cost_records_as_submit_does():
    records = [Tokens(), "plain", {"a": 1}, Tokens()]
    async with TokenBatcher[Any, Any](Device(), batch_timeout_s=0, default_cost=5) as batcher:
        await soon(batcher.map(records))
        assert batcher.stats.total_batch_cost == 11 + 5 + 5 + 11
        await soon(asyncio.gather(*await batcher.submit_batch(records, estimated_tokens=[1, 1, 1, 1])))
        assert batcher.stats.total_batch_cost == 32 + 4
        await soon(batcher.map(records, estimated_tokens=(2, 2, 2, 2)))
        assert batcher.stats.total_batch_cost == 36 + 8


@pytest.mark.parametrize("cost", [None, "7", True, float("nan"), float("inf"), -1, [1], 1j])
async def test_a_bad_estimate_fails_that_submit_only_and_names_the_cost(cost):
    async with DynamicBatcher[Any, Any](
        Device(), cost_estimator=lambda record: cost if record == "bad" else 1, batch_timeout_s=0
    ) as batcher:
        neighbour = await batcher.submit("good")
        with pytest.raises((TypeError, ValueError), match="cost_estimator returns"):
            await soon(batcher.submit("bad"))
        if cost is not None:
            with pytest.raises((TypeError, ValueError), match="estimated_cost"):
                await soon(batcher.submit("good", estimated_cost=cost))
        assert await soon(neighbour) == ("done", "good")
        assert await soon(batcher.map(["good"])) == done("good")


async def test_an_estimator_that_raises_fails_that_submit_only():
    def estimate(record: str) -> int:
        return {"good": 1}[record]

    async with DynamicBatcher[str, Any](Device(), cost_estimator=estimate, batch_timeout_s=0) as batcher:
        with pytest.raises(KeyError):
            await soon(batcher.submit("bad"))
        with pytest.raises(KeyError):
            await soon(batcher.submit_batch(["good", "bad"]))
        with pytest.raises(KeyError):
            await soon(batcher.map(["good", "bad"]))
        good, bad = await soon(batcher.map(["good", "bad"], return_exceptions=True))
        assert good == ("done", "good")
        assert isinstance(bad, KeyError)
        assert await soon(await batcher.submit("good")) == ("done", "good")


async def test_costs_may_be_numpy_numbers_and_fractions():
    async with DynamicBatcher[str, Any](Device(), batch_timeout_s=0) as batcher:
        await soon(await batcher.submit("x", estimated_cost=np.int64(3)))
        await soon(await batcher.submit("x", estimated_cost=np.float32(0.5)))
        await soon(await batcher.submit("x", estimated_cost=0.25))
        assert batcher.stats.total_batch_cost == 3.75


async def test_costs_of_another_number_than_the_records_are_refused():
    async with DynamicBatcher[str, Any](Device(), batch_timeout_s=0) as batcher:
        for costs in ([1], [1, 1, 1]):
            with pytest.raises(ValueError, match=f"{len(costs)} items for 2 records"):
                await soon(batcher.map(["a", "b"], estimated_cost=costs))
            with pytest.raises(ValueError, match=f"{len(costs)} items for 2 records"):
                await soon(batcher.submit_batch(["a", "b"], estimated_cost=costs))


# -- Options ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"process_fn": None}, TypeError, "process_fn"),
        ({"cost_estimator": 5}, TypeError, "cost_estimator"),
        ({"target_batch_cost": 0}, BadInput, "target_batch_cost must be finite and above 0, got 0"),
        ({"target_batch_cost": float("nan")}, BadInput, "target_batch_cost"),
        ({"target_batch_cost": "32k"}, TypeError, "target_batch_cost must be a number, got '32k'"),
        ({"max_batch_size": 0}, BadInput, "max_batch_size must be 1 or more, got 0"),
        ({"max_batch_size": 2.0}, TypeError, "max_batch_size must be an int, got 2.0"),
        ({"max_batch_size": True}, TypeError, "max_batch_size"),
        ({"min_batch_size": 0}, BadInput, "min_batch_size"),
        ({"min_batch_size": 9, "max_batch_size": 8}, BadInput, "min_batch_size .9. is above max_batch_size .8."),
        ({"min_batch_size": 9, "max_queue_size": 8}, BadInput, "min_batch_size .9. is above max_queue_size .8."),
        ({"batch_timeout_s": -1}, BadInput, "batch_timeout_s must be finite and 0 or more, got -1"),
        ({"batch_timeout_s": float("inf")}, BadInput, "batch_timeout_s"),
        ({"batch_timeout_s": False}, TypeError, "batch_timeout_s"),
        ({"max_queue_size": 0}, BadInput, "max_queue_size"),
        ({"prefetch_batches": -1}, BadInput, "prefetch_batches"),
        ({"default_cost": -1}, BadInput, "default_cost"),
        ({"default_cost": None}, TypeError, "default_cost"),
        ({"batch_cost": "max"}, BadInput, "batch_cost must be one of 'sum', 'padded', got 'max'"),
        ({"overflow": "drop"}, BadInput, "overflow must be one of"),
        ({"length_window": 100}, BadInput, "length_window .100. is below max_batch_size .256."),
        ({"blocked_loop_warning_s": float("nan")}, BadInput, "blocked_loop_warning_s"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name_value_and_remedy(options, error, message):
    with pytest.raises(error, match=message):
        DynamicBatcher(**{"process_fn": Device.__call__, **options})


def test_a_token_batcher_needs_a_function_under_either_name():
    with pytest.raises(TypeError, match="either 'inference_fn' or 'process_fn'"):
        TokenBatcher()


# -- When a batch leaves ---------------------------------------------------


async def test_records_that_queue_behind_a_busy_device_leave_as_one_full_batch():
    device = Device()
    async with DynamicBatcher[int, Any](device, batch_timeout_s=0, max_batch_size=48) as batcher:
        device.hold()
        first = await batcher.submit(-1)
        await device.at_work()
        waiting = []
        for i in range(48):
            waiting.append(await batcher.submit(i))
            await asyncio.sleep(0)
        device.release()
        await soon(asyncio.gather(first, *waiting))
    assert [len(batch) for batch in device.batches] == [1, 48]


async def test_a_full_batch_leaves_at_once_by_size_and_by_budget():
    device = Device()
    async with DynamicBatcher[int, Any](
        device, batch_timeout_s=NEVER_S, max_batch_size=3, target_batch_cost=10
    ) as batcher:
        by_size = await soon(asyncio.gather(*await batcher.submit_batch([1, 2, 3])))
        by_budget = await soon(asyncio.gather(*await batcher.submit_batch([4, 5], estimated_cost=[5, 5])))
    assert by_size + by_budget == done(1, 2, 3, 4, 5)
    assert device.batches == [[1, 2, 3], [4, 5]]


async def test_the_timeout_counts_from_the_oldest_records_arrival_not_from_when_the_device_became_free():
    device = Device()
    async with DynamicBatcher[int, Any](device, batch_timeout_s=NEVER_S) as batcher:
        # Records that arrive longer ago than the timeout: the test need not wait for it.
        batcher._now = lambda: asyncio.get_running_loop().time() - NEVER_S - 1
        device.hold()
        first = await batcher.submit(0)
        await device.at_work()
        aged = await batcher.submit(1)
        device.release()
        assert await soon(asyncio.gather(first, aged)) == done(0, 1)


async def test_a_lone_record_below_min_batch_size_leaves_when_the_timeout_fires():
    async with DynamicBatcher[int, Any](Device(), min_batch_size=4, batch_timeout_s=0.01) as batcher:
        assert await soon(await batcher.submit(1)) == ("done", 1)


async def test_min_batch_size_holds_a_batch_that_the_budget_alone_would_send():
    device = Device()
    async with DynamicBatcher[int, Any](
        device, target_batch_cost=2, min_batch_size=3, batch_timeout_s=NEVER_S
    ) as batcher:
        futures = [await batcher.submit(1), await batcher.submit(2)]
        await settle()
        assert device.batches == []
        futures.append(await batcher.submit(3))
        await soon(asyncio.gather(*futures[:2]))
        assert device.batches == [[1, 2]]


async def test_min_batch_size_is_ignored_during_stop():
    device = Device()
    batcher = DynamicBatcher[int, Any](device, min_batch_size=5, batch_timeout_s=NEVER_S)
    await batcher.start()
    future = await batcher.submit(1)
    await soon(batcher.stop())
    assert future.result() == ("done", 1)


async def test_a_full_queue_leaves_at_once_because_it_can_wait_for_nobody():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_queue_size=3, batch_timeout_s=NEVER_S) as batcher:
        results = asyncio.gather(*(submit_and_wait(batcher, i) for i in range(6)))
        await settle()
        assert device.seen[:3] == [0, 1, 2]
        await batcher.stop()
        assert await soon(results) == done(*range(6))


async def submit_and_wait(batcher: DynamicBatcher[Any, Any], record: Any) -> Any:
    return await (await batcher.submit(record))


async def test_a_batch_never_exceeds_its_budget_and_an_oversized_record_goes_alone():
    device = Device()
    costs = [6, 5, 30, 4, 4, 4, 9, 1]
    async with DynamicBatcher[int, Any](device, target_batch_cost=10, batch_timeout_s=0) as batcher:
        await soon(batcher.map(costs, estimated_cost=costs))
    assert device.seen == costs
    assert [30] in device.batches
    assert all(len(batch) == 1 or sum(batch) <= 10 for batch in device.batches)


async def test_one_batch_at_a_time_is_on_the_device():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        await soon(batcher.map(range(20)))
    assert device.most_at_once == 1


# -- Callers ---------------------------------------------------------------


async def test_a_small_caller_is_in_the_next_batch_behind_a_map_of_many():
    device = Device()
    async with DynamicBatcher[Any, Any](device, max_batch_size=4, batch_timeout_s=0) as batcher:
        device.hold()
        big = asyncio.create_task(batcher.map(range(1000)))
        await device.at_work()
        small = await batcher.submit("small")
        device.release()
        await soon(small)
        assert "small" in device.batches[1]
        await soon(big)


async def test_a_tasks_submits_share_one_turn_and_another_tasks_get_the_next():
    device = Device()
    async with DynamicBatcher[Any, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        device.hold()
        futures = [await batcher.submit("first")]
        await device.at_work()
        futures += [await batcher.submit(f"mine {i}") for i in range(10)]
        other = asyncio.create_task(submit_and_wait(batcher, "other"))
        await settle()
        device.release()
        await soon(asyncio.gather(other, *futures))
    assert device.batches[1] == ["mine 0", "other"]


async def test_a_map_leaves_room_in_the_queue_for_others():
    device = Device()
    async with DynamicBatcher[Any, Any](device, max_batch_size=4, max_queue_size=100, batch_timeout_s=0) as batcher:
        device.hold()
        big = asyncio.create_task(batcher.map(range(1000)))
        await device.at_work()
        await settle()
        assert batcher.stats.queued <= 8
        device.release()
        assert await soon(big) == done(*range(1000))


async def test_map_draws_from_a_generator_as_the_device_goes_on():
    device = Device()
    drawn = 0

    def records():
        nonlocal drawn
        while drawn < 1000:
            drawn += 1
            yield drawn

    async with DynamicBatcher[int, Any](device, max_batch_size=4, batch_timeout_s=0) as batcher:
        device.hold()
        mapping = asyncio.create_task(batcher.map(records()))
        await device.at_work()
        await settle()
        assert drawn <= 16
        device.release()
        assert await soon(mapping) == done(*range(1, 1001))


async def test_map_gives_results_in_order_also_when_length_grouping_reorders_the_batches():
    device = Device()
    lengths = [(i * 37) % 101 for i in range(400)]
    async with DynamicBatcher[int, Any](
        device, cost_estimator=lambda n: n, batch_cost="padded", max_batch_size=16, length_window=64, batch_timeout_s=0
    ) as batcher:
        assert await soon(batcher.map(lengths)) == done(*lengths)
        assert batcher.stats.padding_efficiency > 0.7, "in order it would be 0.52"
    assert device.seen != lengths


async def test_map_of_nothing_is_nothing():
    async with DynamicBatcher[int, Any](Device()) as batcher:
        assert await soon(batcher.map([])) == []
        assert await soon(batcher.submit_batch([])) == []


async def test_map_raises_the_first_failure_and_abandons_the_rest_or_returns_failures_in_place():
    device = Device(lambda records: [ValueError(f"bad {r}") if r % 5 == 3 else r for r in records])
    async with DynamicBatcher[int, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        with pytest.raises(ValueError, match="bad 3"):
            await soon(batcher.map(range(100)))
        assert len(device.seen) < 100
        assert batcher.stats.queued == 0
        results = await soon(batcher.map(range(10), return_exceptions=True))
    assert [r for r in results if isinstance(r, int)] == [0, 1, 2, 4, 5, 6, 7, 9]
    assert [str(results[3]), str(results[8])] == ["bad 3", "bad 8"]


async def test_cancelled_records_never_reach_the_device_and_do_not_count():
    device = Device()
    async with DynamicBatcher[int, Any](device, batch_timeout_s=0, target_batch_cost=3) as batcher:
        device.hold()
        first = await batcher.submit(0)
        await device.at_work()
        futures = [await batcher.submit(i) for i in range(1, 7)]
        for future in futures[::2]:
            future.cancel()
        assert batcher.stats.queued == 3
        device.release()
        await soon(asyncio.gather(first, *futures[1::2]))
        assert batcher.stats.total_abandoned == 3
        assert batcher.stats.total_completed == 4
    assert device.batches == [[0], [2, 4, 6]], "the cancelled ones took no part of the budget of 3"


async def test_cancelling_a_map_abandons_what_has_not_reached_the_device():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_batch_size=2, batch_timeout_s=0) as batcher:
        device.hold()
        mapping = asyncio.create_task(batcher.map(range(100)))
        await device.at_work()
        mapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(mapping)
        assert batcher.stats.queued == 0
        device.release()
        assert await soon(await batcher.submit(7)) == ("done", 7)
    assert device.batches == [[0, 1], [7]]


# -- A full queue ----------------------------------------------------------


async def test_a_submit_waits_for_room_and_waiters_enter_in_order():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_queue_size=2, max_batch_size=2, batch_timeout_s=0) as batcher:
        device.hold()
        blocker = asyncio.create_task(submit_and_wait(batcher, 0))
        await device.at_work()
        tasks = []
        for i in range(1, 7):
            tasks.append(asyncio.create_task(submit_and_wait(batcher, i)))
            await settle()
        assert batcher.stats.queued == 2
        device.release()
        await soon(asyncio.gather(blocker, *tasks))
    assert device.seen == list(range(7))


async def test_a_waiter_that_is_cancelled_leaks_no_room_and_lets_the_next_in():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_queue_size=2, max_batch_size=2, batch_timeout_s=0) as batcher:
        device.hold()
        blocker = await batcher.submit(0)
        await device.at_work()
        kept = [await batcher.submit(i) for i in (1, 2)]
        waiters = [asyncio.create_task(submit_and_wait(batcher, i)) for i in range(3, 9)]
        await settle()
        for waiter in waiters[:-1]:
            waiter.cancel()
        kept[0].cancel()
        await settle()
        assert batcher.stats.queued == 2, "the last waiter took the place of the cancelled record"
        device.release()
        await soon(asyncio.gather(blocker, kept[1], waiters[-1]))
        assert batcher.stats.total_submitted == 4
        await soon(asyncio.gather(*await batcher.submit_batch([20, 21])))
    assert device.seen == [0, 2, 8, 20, 21]


async def test_a_large_arrival_that_is_cancelled_lets_in_the_small_one_behind_it():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_queue_size=4, max_batch_size=4, batch_timeout_s=0) as batcher:
        device.hold()
        blocker = await batcher.submit(0)
        await device.at_work()
        queued = await batcher.submit_batch([1, 2, 3])
        large = asyncio.create_task(batcher.submit_batch([4, 5]))
        small = asyncio.create_task(batcher.submit(6))
        await settle()
        assert batcher.stats.queued == 3
        large.cancel()
        await settle()
        assert batcher.stats.queued == 4
        device.release()
        await soon(asyncio.gather(blocker, *queued, await small))
    assert device.batches == [[0], [1, 2, 3, 6]]


async def test_a_waiter_cancelled_in_the_tick_that_admits_it_takes_its_record_back():
    device = Device()
    async with DynamicBatcher[int, Any](device, max_queue_size=1, max_batch_size=1, batch_timeout_s=0) as batcher:
        device.hold()
        blocker = await batcher.submit(0)
        await device.at_work()
        queued = await batcher.submit(1)
        waiter = asyncio.create_task(batcher.submit(2))
        await settle()
        queued.cancel()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(waiter)
        assert batcher.stats.queued == 0
        device.release()
        await soon(blocker)
    assert device.seen == [0]


async def test_overflow_reject_raises_instead_of_waiting():
    device = Device()
    async with DynamicBatcher[int, Any](
        device, max_queue_size=2, max_batch_size=2, batch_timeout_s=0, overflow="reject"
    ) as batcher:
        device.hold()
        first = await batcher.submit(0)
        await device.at_work()
        second = await batcher.submit(1)
        with pytest.raises(QueueFull, match="no room for 2 more"):
            await batcher.submit_batch([2, 3])
        third = await batcher.submit(2)
        with pytest.raises(QueueFull):
            await batcher.submit(3)
        with pytest.raises(QueueFull):
            await batcher.map([3])
        third.cancel()
        fourth = await batcher.submit(4)
        device.release()
        await soon(asyncio.gather(first, second, fourth))
        assert await soon(batcher.map(range(50))) == done(*range(50)), "a map paces itself once it has begun"


# -- Where process_fn runs -------------------------------------------------


async def test_a_plain_function_runs_on_one_thread_of_its_own_while_the_loop_goes_on():
    started, go_on = threading.Event(), threading.Event()
    threads = set()

    def process(records: list[int]) -> list[int]:
        threads.add(threading.current_thread())
        started.set()
        assert go_on.wait(20)
        return records

    async with DynamicBatcher[int, int](process, max_batch_size=1, batch_timeout_s=0) as batcher:
        mapping = asyncio.create_task(batcher.map([1, 2, 3]))
        await until(started.is_set)
        go_on.set()
        assert await soon(mapping) == [1, 2, 3]
    (thread,) = threads
    assert thread is not threading.current_thread()


class Model:
    async def __call__(self, records: list[int]) -> list[int]:
        asyncio.get_running_loop()
        return records

    async def infer(self, scale: int, records: list[int]) -> list[int]:
        asyncio.get_running_loop()
        return records


async def double(records: list[int]) -> list[int]:
    asyncio.get_running_loop()
    return records


class Lazy:
    def __init__(self, records: list[int]) -> None:
        self.records = records

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return self.records


@pytest.mark.parametrize(
    "process_fn",
    [
        double,
        Model(),
        functools.partial(Model().infer, 3),
        functools.partial(Model()),
        lambda records: double(records),
        lambda records: records,
        functools.partial(sorted, reverse=False),
        Lazy,
        tuple,
        np.array,
    ],
)
async def test_any_callable_that_answers_now_or_later_will_do(process_fn):
    async with DynamicBatcher[int, int](process_fn, max_batch_size=2, batch_timeout_s=0) as batcher:
        assert await soon(batcher.map([1, 2, 3, 4])) == [1, 2, 3, 4]


user = contextvars.ContextVar("user", default="nobody")


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_process_fn_does_not_see_the_context_of_whoever_started_or_submitted(kind):
    async def on_loop(records: list[str]) -> list[str]:
        return [user.get() for _ in records]

    def on_thread(records: list[str]) -> list[str]:
        return [user.get() for _ in records]

    user.set("first caller")
    async with DynamicBatcher[str, str](on_loop if kind == "async" else on_thread, batch_timeout_s=0) as batcher:
        assert await soon(batcher.map(["x"])) == ["nobody"]
        assert user.get() == "first caller"


async def test_an_async_process_fn_that_blocks_the_loop_is_named_once_and_counted(caplog):
    async def blocking_inference(records: list[int]) -> list[int]:
        await asyncio.sleep(0)
        time.sleep(0.02)  # noqa: ASYNC251 - the very mistake
        return records

    async with DynamicBatcher[int, int](
        blocking_inference, blocked_loop_warning_s=0.01, max_batch_size=1, batch_timeout_s=0
    ) as batcher:
        with caplog.at_level(logging.WARNING):
            await soon(batcher.map([1, 2, 3]))
        assert batcher.stats.loop_blocked_s >= 3 * 0.02
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "blocking_inference blocked the event loop" in warning
    assert "plain `def`" in warning


async def test_awaiting_for_long_is_not_blocking(caplog):
    device = Device()
    async with DynamicBatcher[int, Any](device, blocked_loop_warning_s=0.05, batch_timeout_s=0) as batcher:
        device.hold()
        future = await batcher.submit(1)
        await device.at_work()
        await asyncio.sleep(0.06)
        device.release()
        await soon(future)
        assert batcher.stats.loop_blocked_s == 0
    assert not caplog.records


# -- Stats -----------------------------------------------------------------


async def test_stats_are_a_snapshot_that_counts_the_running_batch():
    device = Device()
    async with DynamicBatcher[int, Any](device, batch_timeout_s=0) as batcher:
        before = batcher.stats
        device.hold()
        future = await batcher.submit(1)
        await device.at_work()
        waiting = await batcher.submit(2)
        earlier = batcher.stats
        assert (earlier.running, earlier.queued, earlier.total_batches) == (1, 1, 0)
        await until(lambda: batcher.stats.busy_time_s != earlier.busy_time_s)
        assert batcher.stats.utilization > 0
        device.release()
        await soon(asyncio.gather(future, waiting))
        after = batcher.stats
    assert before.total_submitted == 0, "a snapshot does not change"
    assert (after.running, after.queued, after.total_completed, after.total_batches) == (0, 0, 2, 2)
    assert isinstance(after, BatchStats)


async def test_time_without_records_is_starved_and_time_with_too_few_is_assembling():
    async with DynamicBatcher[int, Any](Device(), batch_timeout_s=NEVER_S, max_batch_size=2) as batcher:
        await until(lambda: batcher.stats.starved_time_s != 0)
        assert batcher.stats.assembling_time_s == 0
        lonely = await batcher.submit(1)
        starved = batcher.stats.starved_time_s
        await until(lambda: batcher.stats.assembling_time_s != 0)
        assert batcher.stats.starved_time_s == starved
        lonely.cancel()
        assembling = batcher.stats.assembling_time_s
        await until(lambda: batcher.stats.starved_time_s != starved)
        assert batcher.stats.assembling_time_s == assembling
        stats = batcher.stats
        assert stats.idle_time_s == stats.starved_time_s + stats.assembling_time_s


async def test_a_stopped_batcher_is_neither_busy_nor_idle():
    batcher = DynamicBatcher[int, Any](Device(), batch_timeout_s=0)
    async with batcher:
        await soon(batcher.map([1]))
    before = batcher.stats
    await asyncio.sleep(0.001)
    assert batcher.stats == before


async def test_fill_tells_how_full_batches_were_by_size_or_budget():
    async with DynamicBatcher[int, Any](
        Device(), batch_timeout_s=0, max_batch_size=4, target_batch_cost=100
    ) as batcher:
        await soon(batcher.map([1, 2], estimated_cost=[1, 1]))
        assert batcher.stats.fill == 0.5
        await soon(batcher.map([1], estimated_cost=[100]))
        assert batcher.stats.fill == 0.75


# -- Life ------------------------------------------------------------------


async def test_an_unclosed_batcher_warns_when_it_is_collected():
    batcher = DynamicBatcher[int, Any](Device(), batch_timeout_s=0)
    await batcher.start()
    assert batcher._task is not None
    batcher._task.cancel()
    await settle()
    owner = [batcher]
    del batcher

    def collect() -> None:
        owner.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed DynamicBatcher"):
        collect()


async def test_a_closed_batcher_is_collected_silently(recwarn):
    async with DynamicBatcher[int, Any](Device(), batch_timeout_s=0) as batcher:
        await soon(batcher.map([1]))
    del batcher
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning) and "Batcher" in str(w.message)]


async def test_starting_twice_is_an_error_and_starting_after_stop_is_not():
    device = Device()
    batcher = DynamicBatcher[int, Any](device, batch_timeout_s=0)
    async with batcher:
        with pytest.raises(RuntimeError, match="already running"):
            await batcher.start()
    for kind in (device, lambda records: device.answer(records)):
        batcher._processor._fn = kind
        async with batcher:
            assert await soon(batcher.map([1])) == done(1)
    assert not batcher.is_running


async def test_process_fn_that_submits_to_its_own_batcher_gets_an_error_instead_of_a_deadlock():
    async def recursive(records: list[int]) -> list[Any]:
        return await batcher.map(records)

    async with DynamicBatcher[int, Any](recursive, batch_timeout_s=0) as batcher:
        with pytest.raises(BatcherError, match="would wait for itself"):
            await soon(batcher.map([1]))


async def test_a_process_fn_that_never_awaits_leaves_the_loop_to_others_between_its_batches():
    turns: list[str] = []

    async def greedy(records: list[int]) -> list[int]:
        turns.append("batch")
        return records

    async def other() -> None:
        while True:
            turns.append("other")
            await asyncio.sleep(0)

    async with DynamicBatcher[int, int](greedy, max_batch_size=1, batch_timeout_s=0) as batcher:
        futures = await batcher.submit_batch(range(20))
        task = asyncio.create_task(other())
        await soon(asyncio.gather(*futures))
        task.cancel()
    batches = [i for i, turn in enumerate(turns) if turn == "batch"]
    assert all("other" in turns[a:b] for a, b in itertools.pairwise(batches[1:]))


@pytest.mark.parametrize(("lets_the_loop_turn", "started"), [(True, 2), (False, 1)])
async def test_a_full_batch_that_waits_starts_before_those_with_results_go_on_where_the_loop_could_turn(
    lets_the_loop_turn: bool, started: int
):
    starts: list[list[int]] = []

    async def process(batch: list[int]) -> list[int]:
        starts.append(batch)
        if lets_the_loop_turn:
            await asyncio.sleep(0)
        return batch

    async with DynamicBatcher(process, max_batch_size=2) as batcher:
        futures = await batcher.submit_batch(range(4))
        when_told: list[int] = []
        futures[0].add_done_callback(lambda _: when_told.append(len(starts)))
        await asyncio.gather(*futures)
    assert when_told == [started]


async def test_where_no_full_batch_waits_those_with_results_may_fill_it():
    sizes: list[int] = []

    async def process(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        await asyncio.sleep(0.01)
        return batch

    async with DynamicBatcher(process, max_batch_size=4, batch_timeout_s=0) as batcher:
        waiting = [await batcher.submit(number) for number in range(2)]
        await until(lambda: batcher.stats.running == 2)
        one_more = await batcher.submit(2)

        async def again() -> int:
            await waiting[0]
            return await (await batcher.submit(3))

        assert await asyncio.gather(one_more, again()) == [2, 3]
    assert sizes == [2, 2]


async def test_the_device_goes_first_where_much_waits_for_the_event_loop(monkeypatch):
    """A batch's thread needs the interpreter's lock to begin, which whoever computes on the loop holds meanwhile."""
    monkeypatch.setattr(processing, "_BEGIN_S", 5)  # no matter what else the machine does
    began = threading.Event()
    seen: list[bool] = []

    def process(batch: list[str]) -> list[str]:
        began.set()
        return batch

    def compute() -> None:
        assert batcher.stats.running == 1
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass
        seen.append(began.is_set())

    async with DynamicBatcher(process, max_batch_size=1) as batcher:
        await (await batcher.submit("the thread is there"))
        began.clear()
        await settle()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10)  # nobody has to give the lock away before
        try:
            future = await batcher.submit("a")
            asyncio.get_running_loop().call_soon(compute)
            await future
        finally:
            sys.setswitchinterval(interval)
    assert seen == [True]


async def test_an_async_function_says_when_its_device_was_at_work():
    def compute(batch: list[str]) -> list[str]:
        with device_at_work():
            return batch

    async def process(batch: list[str]) -> list[str]:
        answer = await asyncio.to_thread(compute, batch)
        await asyncio.sleep(0.3)  # until it is heard of
        return answer

    async with DynamicBatcher(process, batch_timeout_s=0) as batcher:
        await (await batcher.submit("a"))
        assert batcher.is_told
        assert batcher.stats.busy_time_s < 0.3
        assert batcher.stats.late_time_s >= 0.3


async def test_a_plain_function_that_says_more_than_its_thread_is_believed():
    def process(batch: list[str]) -> list[str]:
        with device_at_work():
            pass
        time.sleep(0.3)  # what it does with the answers
        return batch

    async with DynamicBatcher(process, batch_timeout_s=0) as batcher:
        await (await batcher.submit("a"))
        assert batcher.stats.busy_time_s < 0.3


async def test_of_a_wrapped_async_function_the_thread_that_only_called_it_says_nothing():
    async def process(batch: list[str]) -> list[str]:
        await asyncio.sleep(0.1)
        return batch

    async with DynamicBatcher(lambda batch: process(batch), batch_timeout_s=0) as batcher:
        await (await batcher.submit("a"))
        assert batcher.stats.busy_time_s >= 0.1
        assert not batcher.is_told
