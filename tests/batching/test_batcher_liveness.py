"""Every accepted record's future resolves, whatever happens around it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import NEVER_S, Device, settle, soon

from flyte_batch.batching import DynamicBatcher
from flyte_batch.errors import BatcherDied, BatcherError, BatcherNotRunning, QueueFull


async def started(device: Any, **options: Any) -> DynamicBatcher[Any, Any]:
    batcher = DynamicBatcher[Any, Any](device, **{"batch_timeout_s": 0, **options})
    await batcher.start()
    return batcher


async def test_submitting_before_start_or_after_stop_is_an_error_that_says_so():
    batcher = DynamicBatcher[int, Any](Device())
    for state in ("was not started", "was stopped"):
        for call in (batcher.submit(1), batcher.submit_batch([1]), batcher.map([1])):
            with pytest.raises(BatcherNotRunning, match=f"it {state}. Call start"):
                await call
        await batcher.start()
        await batcher.stop()


async def test_stop_finishes_what_was_accepted_and_refuses_what_comes_while_it_drains():
    device = Device()
    batcher = await started(device, max_batch_size=2, max_queue_size=2)
    device.hold()
    first = await batcher.submit(0)
    await device.at_work()
    queued = await batcher.submit_batch([1, 2])
    waiting = asyncio.create_task(batcher.submit(3))
    batch = asyncio.create_task(batcher.submit_batch([4, 5, 6, 7, 8]))
    mapping = asyncio.create_task(batcher.map(range(10, 40)))
    await settle()
    stopping = asyncio.create_task(batcher.stop())
    await settle()
    with pytest.raises(BatcherNotRunning, match="is stopping"):
        await batcher.submit(9)
    assert batcher.is_running
    device.release()
    await soon(stopping)
    assert not batcher.is_running
    done = [first, *queued, await waiting, *await batch]
    assert [future.result()[1] for future in done] == list(range(9))
    assert [value for _, value in await soon(mapping)] == list(range(10, 40))


async def test_a_stop_that_is_cancelled_can_be_awaited_again():
    device = Device()
    batcher = await started(device)
    device.hold()
    future = await batcher.submit(1)
    await device.at_work()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(batcher.stop(), 0.001)
    device.release()
    await soon(batcher.stop())
    assert future.result() == ("done", 1)
    await soon(batcher.stop())


async def test_stops_at_the_same_time_all_wait_for_the_end():
    device = Device()
    batcher = await started(device)
    device.hold()
    future = await batcher.submit(1)
    await device.at_work()
    stops = [asyncio.create_task(batcher.stop()) for _ in range(3)]
    await settle()
    assert not any(stop.done() for stop in stops)
    device.release()
    await soon(asyncio.gather(*stops))
    assert future.done()


async def test_a_stop_from_within_process_fn_does_not_wait_for_itself():
    async def stopping(records: list[int]) -> list[int]:
        await batcher.stop()
        await asyncio.gather(batcher.stop())
        return records

    batcher = await started(stopping, max_batch_size=1)
    assert await soon(asyncio.gather(*await batcher.submit_batch([1, 2]))) == [1, 2]
    await soon(batcher.stop())
    assert not batcher.is_running


async def test_a_stop_from_a_done_callback_ends_the_batcher():
    batcher = await started(Device())
    stops: list[asyncio.Task[None]] = []
    future = await batcher.submit(1)
    future.add_done_callback(lambda _: stops.append(asyncio.create_task(batcher.stop())))
    await soon(future)
    await settle()
    await soon(stops[0])
    assert not batcher.is_running


async def dispatcher_dies(batcher: DynamicBatcher[Any, Any], how: str) -> None:
    assert batcher._task is not None
    if how == "cancelled":
        batcher._task.cancel()
    else:
        batcher._backlog.take = None  # type: ignore[assignment,method-assign]
        batcher._wake()


@pytest.mark.parametrize("how", ["cancelled", "broken"])
async def test_when_the_dispatcher_ends_all_that_wait_learn_of_it_and_later_submits_do(how):
    device = Device()
    batcher = await started(device, max_batch_size=2, max_queue_size=2)
    device.hold()
    running = await batcher.submit(0)
    await device.at_work()
    queued = await batcher.submit_batch([1, 2])
    waiting = asyncio.create_task(batcher.submit(3))
    batch = asyncio.create_task(batcher.submit_batch([4, 5, 6]))
    mapping = asyncio.create_task(batcher.map(range(10)))
    await settle()
    await dispatcher_dies(batcher, how)
    device.release()
    lost = await soon(asyncio.gather(running, *queued, waiting, batch, mapping, return_exceptions=True))
    if how == "broken":
        assert lost.pop(0) == ("done", 0), "its batch was on the device already"
    assert {type(error) for error in lost} == {BatcherDied}
    assert {type(error.__cause__) for error in lost} == {asyncio.CancelledError if how == "cancelled" else TypeError}
    assert not batcher.is_running
    assert batcher.stats.queued == batcher.stats.running == 0
    with pytest.raises(BatcherDied, match="died of"):
        await batcher.submit(1)
    await soon(batcher.stop())


async def test_a_dispatcher_cancelled_before_its_first_step_leaves_nobody_waiting():
    batcher = await started(Device())
    future = await batcher.submit(1)
    await dispatcher_dies(batcher, "cancelled")
    with pytest.raises(BatcherDied):
        await soon(future)


async def test_a_process_fn_that_swallows_the_dispatchers_cancellation_does_not_keep_it_alive():
    async def swallowing(records: list[int]) -> list[int]:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return records
        raise AssertionError

    entered = asyncio.Event()
    batcher = await started(swallowing, max_batch_size=1)
    first, second = await batcher.submit_batch([1, 2])
    await soon(entered.wait())
    await dispatcher_dies(batcher, "cancelled")
    assert await soon(first) == 1
    with pytest.raises(BatcherDied):
        await soon(second)


async def test_a_batcher_that_died_can_be_started_again():
    device = Device()
    batcher = await started(device)
    await dispatcher_dies(batcher, "cancelled")
    await settle()
    assert not batcher.is_running
    await batcher.start()
    assert await soon(batcher.map([1])) == [("done", 1)]
    await batcher.stop()


def test_the_end_of_asyncio_run_fails_what_waits_and_the_next_loop_can_start_anew():
    batcher = DynamicBatcher[int, Any](Device(), batch_timeout_s=NEVER_S)

    async def leave_without_stopping() -> asyncio.Future[Any]:
        await batcher.start()
        return await batcher.submit(1)

    future = asyncio.run(leave_without_stopping())
    assert isinstance(future.exception(), BatcherDied)
    assert not batcher.is_running

    async def again() -> None:
        with pytest.raises(BatcherDied):
            await batcher.submit(1)
        async with batcher:
            future = await batcher.submit(2)
        assert future.result() == ("done", 2)

    asyncio.run(again())


def test_a_loop_that_is_closed_under_the_batcher_is_noticed():
    batcher = DynamicBatcher[int, Any](Device(), batch_timeout_s=NEVER_S)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it complains of tasks that never end
    loop.run_until_complete(batcher.start())
    mapping = loop.create_task(batcher.map([1, 2]))
    loop.run_until_complete(settle())
    future = loop.run_until_complete(batcher.submit(1))
    future.add_done_callback(print)
    loop.close()
    assert not batcher.is_running

    async def on_another_loop() -> None:
        with pytest.raises(BatcherDied, match="loop was closed"):
            await batcher.submit(2)
        await batcher.stop()

    asyncio.run(on_another_loop())
    assert isinstance(future.exception(), BatcherDied)
    assert batcher.stats.queued == 0
    assert not mapping.done(), "its loop will not run it any more"


async def test_another_loop_or_thread_gets_an_error_at_once():
    batcher = await started(Device())
    errors: list[BaseException] = []

    async def from_elsewhere() -> None:
        for call in (batcher.submit(1), batcher.submit_batch([1]), batcher.map([1]), batcher.stop()):
            try:
                await call
            except BatcherError as error:
                errors.append(error)

    thread = threading.Thread(target=asyncio.run, args=(from_elsewhere(),))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert len(errors) == 4
    assert all("belongs to another event loop" in str(error) for error in errors)
    assert await soon(batcher.map([1])) == [("done", 1)]
    await batcher.stop()


# -- Anything, in any order ------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 9)),
        st.tuples(st.just("submit_batch"), st.integers(0, 7)),
        st.tuples(st.just("map"), st.integers(0, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("tick"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["hold", "release", "stop", "cancelled stop", "kill"]), st.just(0)),
    ),
    max_size=25,
)
ANSWERS = {
    "right": lambda records: records,
    "fails": lambda records: [][1],
    "leaks": lambda records: (_ for _ in ()).throw(asyncio.CancelledError()),
    "short": lambda records: records[1:],
    "none": lambda records: None,
    "some bad": lambda records: [ValueError(r) if r % 3 == 0 else r for r in records],
    "out of memory": lambda records: records if len(records) < 3 else bytearray(10**18),
}


@settings(deadline=None, max_examples=150)
@given(
    steps,
    st.sampled_from(sorted(ANSWERS)),
    st.booleans(),
    st.sampled_from(["wait", "reject"]),
    st.sampled_from([0, 4]),
    st.integers(1, 5),
)
def test_whatever_callers_process_fn_and_stop_do_every_accepted_future_resolves(
    script, answer, isolate, overflow, window, queue
):
    async def play() -> None:
        device = Device(ANSWERS[answer])
        batcher = DynamicBatcher[int, Any](
            device,
            max_batch_size=4,
            max_queue_size=queue,
            batch_timeout_s=0,
            isolate_failures=isolate,
            overflow=overflow,
            length_window=window,
        )
        await batcher.start()
        calls: list[asyncio.Task[Any]] = []
        accepted: list[asyncio.Future[Any]] = []

        async def submit(number: int) -> None:
            accepted.append(await batcher.submit(number))
            await accepted[-1]

        async def submit_batch(number: int) -> None:
            accepted.extend(await batcher.submit_batch(range(number)))

        for action, number in script:
            if action == "submit":
                calls.append(asyncio.create_task(submit(number)))
            elif action == "submit_batch":
                calls.append(asyncio.create_task(submit_batch(number)))
            elif action == "map":
                calls.append(asyncio.create_task(batcher.map(range(number), return_exceptions=number % 2 == 0)))
            elif action == "cancel" and (targets := [*calls, *accepted]):
                targets[number % len(targets)].cancel()
            elif action == "tick":
                for _ in range(number):
                    await asyncio.sleep(0)
            elif action == "hold":
                device.hold()
            elif action == "release":
                device.release()
            elif action == "stop":
                calls.append(asyncio.create_task(batcher.stop()))
            elif action == "cancelled stop":
                stopping = asyncio.create_task(batcher.stop())
                await asyncio.sleep(0)
                stopping.cancel()
            elif action == "kill" and batcher._task is not None:
                batcher._task.cancel()
        device.release()
        await soon(batcher.stop())
        ended = await soon(asyncio.gather(*calls, return_exceptions=True))
        assert all(future.done() for future in accepted)
        assert not batcher.is_running
        stats = batcher.stats
        assert (stats.queued, stats.running) == (0, 0)
        assert stats.total_submitted == stats.total_completed + stats.total_abandoned
        assert batcher.lanes == {}
        assert batcher._open_calls == 0
        expected = (BatcherError, ValueError, TypeError, IndexError, MemoryError, OverflowError, asyncio.CancelledError)
        for outcome in (*ended, *(future.exception() for future in accepted if not future.cancelled())):
            assert not isinstance(outcome, BaseException) or isinstance(outcome, expected), outcome
        if overflow == "wait":
            assert not any(isinstance(outcome, QueueFull) for outcome in ended)

    asyncio.run(play())
