from __future__ import annotations

import asyncio
import contextvars
import warnings
from types import TracebackType

import pytest

import flyte_batch as fb


class Resource:
    """Counts its life; an async context manager, as batchers are."""

    def __init__(self) -> None:
        self.entered = self.exited = 0
        self.is_running = True

    async def __aenter__(self) -> Resource:
        self.entered += 1
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.exited += 1
        self.is_running = False


async def test_ten_callers_at_once_share_one_load() -> None:
    gate, loads = asyncio.Event(), []

    @fb.singleton
    async def resource() -> Resource:
        loads.append(1)
        await gate.wait()
        return Resource()

    callers = [asyncio.create_task(resource()) for _ in range(10)]
    await asyncio.sleep(0)
    gate.set()
    values = await asyncio.gather(*callers)
    assert len(loads) == 1
    assert all(value is values[0] for value in values)
    assert values[0].entered == 1


async def test_distinct_arguments_have_distinct_values() -> None:
    @fb.singleton
    async def resource(model: str, size: int = 1) -> tuple[str, int, object]:
        return model, size, object()

    assert await resource("a") is await resource("a")
    assert await resource("a") is not await resource("b")
    assert await resource("a", size=2) is await resource("a", size=2)


async def test_a_failed_load_reaches_every_waiting_caller_and_the_next_one_tries_again() -> None:
    gate, attempts = asyncio.Event(), []

    @fb.singleton
    async def resource() -> str:
        attempts.append(1)
        await gate.wait()
        if len(attempts) == 1:
            raise OSError("weights are not there yet")
        return "loaded"

    callers = [asyncio.create_task(resource()) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    assert [str(e) for e in await asyncio.gather(*callers, return_exceptions=True)] == ["weights are not there yet"] * 3
    assert await resource() == "loaded"
    assert len(attempts) == 2


async def test_the_value_does_not_carry_the_first_callers_context() -> None:
    caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")
    gate = asyncio.Event()
    seen: list[str] = []

    @fb.singleton
    async def resource() -> asyncio.Task[None]:
        seen.append(caller.get())

        async def background() -> None:
            await gate.wait()
            seen.append(caller.get())

        return asyncio.create_task(background())

    caller.set("first")
    background = await resource()
    gate.set()
    await background
    assert seen == ["nobody", "nobody"]


async def test_cancelling_the_first_caller_leaves_the_load_to_the_others() -> None:
    gate, loads = asyncio.Event(), []

    @fb.singleton
    async def resource() -> str:
        loads.append(1)
        await gate.wait()
        return "loaded"

    first, second = asyncio.create_task(resource()), asyncio.create_task(resource())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.set()
    assert await second == "loaded"
    assert len(loads) == 1


async def test_a_value_that_died_is_closed_once_and_loaded_anew_by_the_next_callers() -> None:
    @fb.singleton
    async def resource() -> Resource:
        return Resource()

    dead = await resource()
    dead.is_running = False
    one, two = await asyncio.gather(resource(), resource())
    assert one is two is not dead
    assert dead.exited == 1
    assert one.exited == 0


def test_another_event_loop_gets_a_new_value_and_the_old_one_is_closed_without_a_warning() -> None:
    @fb.singleton
    async def resource() -> Resource:
        return Resource()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = asyncio.run(resource())
        second = asyncio.run(resource())
    assert first is not second
    assert (first.exited, second.exited) == (1, 0)


async def test_discard_forgets_only_the_value_it_is_given() -> None:
    @fb.singleton
    async def resource(*, a: int, b: int) -> Resource:
        return Resource()

    value, other = await resource(a=1, b=2), await resource(b=2, a=2)
    await resource.discard(value)
    await resource.discard(value)
    assert (value.exited, other.exited) == (1, 0)
    assert await resource(a=1, b=2) is not value
    assert await resource(b=2, a=2) is other


async def test_a_value_that_fails_to_close_does_not_keep_the_next_one_from_loading(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Stubborn(Resource):
        async def __aexit__(self, *_: object) -> None:
            raise OSError("device busy")

    @fb.singleton
    async def resource() -> Resource:
        return Stubborn()

    dead = await resource()
    dead.is_running = False
    assert await resource() is not dead
    assert "device busy" in caplog.text


async def test_a_device_never_holds_two_values_while_a_dead_one_is_being_closed() -> None:
    closing, may_close = asyncio.Event(), asyncio.Event()
    alive: list[Resource] = []
    most = 0

    class Slow(Resource):
        async def __aenter__(self) -> Resource:
            nonlocal most
            alive.append(self)
            most = max(most, len(alive))
            return await super().__aenter__()

        async def __aexit__(self, *_: object) -> None:
            closing.set()
            await may_close.wait()
            alive.remove(self)

    @fb.singleton
    async def resource() -> Resource:
        return Slow()

    dead = await resource()
    dead.is_running = False
    first = asyncio.create_task(resource())
    await closing.wait()
    second = asyncio.create_task(resource())
    await asyncio.sleep(0)
    may_close.set()
    assert await first is await second is not dead
    assert most == 1


async def test_a_value_whose_entering_was_cancelled_is_closed() -> None:
    entering, closed = asyncio.Event(), asyncio.Event()

    class Slow(Resource):
        async def __aenter__(self) -> Resource:
            entering.set()
            await asyncio.Event().wait()
            return self

        async def __aexit__(self, *_: object) -> None:
            closed.set()

    @fb.singleton
    async def resource() -> Resource:
        return Slow()

    caller = asyncio.create_task(resource())
    await entering.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await closed.wait()


def test_two_event_loops_that_live_at_the_same_time_keep_their_own_values() -> None:
    @fb.singleton
    async def resource() -> Resource:
        return Resource()

    one, two = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        first, second = one.run_until_complete(resource()), two.run_until_complete(resource())
        assert first is not second
        assert one.run_until_complete(resource()) is first
        assert (first.exited, second.exited) == (0, 0)
    finally:
        one.close()
        two.close()
    asyncio.run(resource())
    assert (first.exited, second.exited) == (1, 1)
