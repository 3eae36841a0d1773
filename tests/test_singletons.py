from __future__ import annotations

import asyncio
import contextvars
import itertools
import time
import warnings
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch import guard, singletons
from flyte_batch.errors import FlyteBatchError
from flyte_batch.replica import ReplicaSettings
from flyte_batch.singletons import Singleton


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


@pytest.mark.parametrize("continuous", [False, True])
def test_a_loop_that_was_closed_over_a_working_engine_leaves_it_closed_and_the_next_one_works(continuous: bool) -> None:
    engines: list[fb.FakeEngine] = []

    @fb.singleton
    async def solver() -> fb.EngineBatcher | fb.ContinuousBatcher:
        engines.append(fb.FakeContinuousEngine() if continuous else fb.FakeEngine())
        return fb.ContinuousBatcher(engines[-1]) if continuous else fb.EngineBatcher(engines[-1])

    async def ask() -> str:
        batcher = await solver()
        (completion,) = await batcher.map([batcher.engine.prepare(fb.Prompt("hello"))])
        return completion.text

    assert [asyncio.run(ask()), asyncio.run(ask())] == ["echo: hello"] * 2
    assert [engine.closed for engine in engines] == [True, False]


# -- Defined anew -----------------------------------------------------------

CELL = """
@singleton
async def device() -> Device:
    return Device()
"""
_modules = itertools.count()


class Device(Resource):
    """Says how many there are."""

    alive = most = 0

    async def __aenter__(self) -> Resource:
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)
        return await super().__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)
        type(self).alive -= 1
        await super().__aexit__(None, None, None)


class Module:
    """A module of its own, whose text can be executed again as `importlib.reload` and notebooks do it."""

    def __init__(self, **names: object) -> None:
        class Counted(Device):
            pass

        self.device = Counted
        self._names = {"__name__": f"reloaded{next(_modules)}", "singleton": fb.singleton, "Device": Counted, **names}

    def execute(self, text: str = CELL) -> Singleton[[], Any]:
        exec(compile(text, "cell", "exec"), self._names)  # noqa: S102
        defined: Singleton[[], Any] = self._names["device"]  # type: ignore[assignment]
        return defined


async def test_what_is_defined_anew_closes_the_old_value_before_it_loads_its_own() -> None:
    module = Module()
    former = module.execute()
    old = await former()
    latest = module.execute()
    assert await former() is old  # nobody has asked for the new one
    new = await latest()
    assert (old.exited, new.exited, module.device.most) == (1, 0, 1)
    with pytest.raises(FlyteBatchError, match=r"reloaded\d+\.device was defined anew, .* Use the new one"):
        await former()
    assert await latest() is new


async def test_of_several_definitions_only_the_last_that_was_called_has_a_value() -> None:
    module = Module()
    values = [await module.execute()()]
    module.execute()  # never called
    values.append(await module.execute()())
    assert [value.exited for value in values] == [1, 0]
    assert module.device.most == 1


async def test_a_load_that_is_under_way_when_its_factory_is_defined_anew_is_closed_before_the_new_one_loads() -> None:
    began, gate = asyncio.Event(), asyncio.Event()
    module = Module(began=began, gate=gate)
    slow = CELL.replace("return", "began.set()\n    await gate.wait()\n    return")
    old = asyncio.create_task(module.execute(slow)())
    await began.wait()
    new = asyncio.create_task(module.execute()())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not new.done()
    gate.set()
    assert (await new).exited == 0
    with pytest.raises(FlyteBatchError, match="was defined anew"):
        await old
    assert (module.device.alive, module.device.most) == (1, 1)


async def test_a_load_that_had_not_begun_when_its_factory_was_defined_anew_does_not_begin() -> None:
    module = Module()
    old, new = module.execute(), module.execute()
    outcomes = await asyncio.gather(old(), new(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [FlyteBatchError, module.device]
    assert module.device.most == 1


def test_what_is_defined_anew_closes_the_value_of_a_loop_that_is_gone() -> None:
    module = Module()
    old = asyncio.run(module.execute()())
    new = asyncio.run(module.execute()())
    assert (old.exited, new.exited) == (1, 0)


async def test_singletons_that_a_loop_or_a_function_makes_are_no_new_definitions_of_each_other() -> None:
    module = Module(made=[])
    indented = CELL.replace("\n", "\n    ")
    module.execute(f"for _ in range(2):{indented}\n    made.append(device)")
    one, two = module._names["made"]  # type: ignore[misc]

    def make() -> Singleton[[], Resource]:
        @fb.singleton
        async def resource() -> Resource:
            return Resource()

        return resource

    async def load() -> Resource:
        return Resource()

    lambdas = fb.singleton(lambda: load()), fb.singleton(lambda: load())
    made = one, two, make(), make(), *lambdas
    values = [await each() for each in made]
    assert [value.exited for value in values] == [0] * 6
    assert [await each() for each in made] == values


# -- Cancelling -------------------------------------------------------------


async def test_a_load_that_raises_a_cancellation_of_its_own_cancels_none_of_its_callers() -> None:
    attempts: list[int] = []

    @fb.singleton
    async def resource() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            inner = asyncio.create_task(asyncio.sleep(60))
            inner.cancel()
            await inner
        return "loaded"

    errors = await asyncio.gather(*(resource() for _ in range(3)), return_exceptions=True)
    assert {type(error) for error in errors} == {FlyteBatchError}
    assert "resource raised a CancelledError that was not its callers'" in str(errors[0])
    assert await resource() == "loaded"


async def test_a_value_whose_closing_raises_a_cancellation_cancels_no_caller() -> None:
    class Leaking(Resource):
        async def __aexit__(self, *_: object) -> None:
            raise asyncio.CancelledError

    @fb.singleton
    async def resource() -> Resource:
        return Leaking()

    dead = await resource()
    dead.is_running = False
    assert await resource() is not dead
    await resource.aclose()


async def test_values_whose_closing_raises_a_cancellation_keep_none_from_being_closed() -> None:
    class Leaking(Device):
        async def __aexit__(self, *_: object) -> None:
            await super().__aexit__(None, None, None)
            raise asyncio.CancelledError

    module = Module(Device=Leaking)
    text = CELL.replace("device()", "device(number)")
    former: Any = module.execute(text)
    values = [await former(number) for number in range(3)]
    latest: Any = module.execute(text)
    await latest(0)
    assert [value.exited for value in values] == [1, 1, 1]
    assert (Leaking.alive, Leaking.most) == (1, 3)


async def test_the_error_of_a_value_that_cannot_be_entered_is_told_even_if_closing_it_raises_a_cancellation() -> None:
    class Broken(Resource):
        async def __aenter__(self) -> Resource:
            raise OSError("the device is gone")

        async def __aexit__(self, *_: object) -> None:
            raise asyncio.CancelledError

    @fb.singleton
    async def resource() -> Resource:
        return Broken()

    with pytest.raises(OSError, match="the device is gone"):
        await resource()


async def test_a_load_that_was_cancelled_has_ended_before_the_next_one_begins() -> None:
    module = Module()
    begun, cleaning, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    module._names |= {"begun": begun, "cleaning": cleaning, "may_end": may_end, "asyncio": asyncio}
    device = module.execute("""
@singleton
async def device():
    async with Device() as value:
        if not may_end.is_set():
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaning.set()
                await may_end.wait()
    return Device()
""")
    first = asyncio.create_task(device())
    await begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await cleaning.wait()
    second = asyncio.create_task(device())
    for _ in range(10):
        await asyncio.sleep(0)
    assert module.device.alive == 1
    may_end.set()
    assert (await second).exited == 0
    assert module.device.most == 1


async def test_a_value_that_was_ready_as_its_only_caller_was_cancelled_is_closed() -> None:
    made: list[Resource] = []

    @fb.singleton
    async def resource() -> Resource:
        made.append(Resource())
        if len(made) == 1:
            caller.cancel()
        return made[-1]

    caller = asyncio.create_task(resource())
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await resource() is made[-1]
    assert [value.exited for value in made] == [1, 0]


@pytest.mark.parametrize("says_that_it_runs", [True, False])
@pytest.mark.parametrize("asked_meanwhile", [True, False])
async def test_closing_while_a_value_is_being_loaded_closes_that_too(
    says_that_it_runs: bool, asked_meanwhile: bool
) -> None:
    began, gate = asyncio.Event(), asyncio.Event()
    made: list[Resource] = []

    class Silent(Resource):
        def __init__(self) -> None:
            super().__init__()
            if not says_that_it_runs:
                del self.is_running

    @fb.singleton
    async def resource() -> Resource:
        began.set()
        await gate.wait()
        made.append(Silent())
        return made[-1]

    caller = asyncio.create_task(resource())
    await began.wait()
    closing = asyncio.create_task(resource.aclose())
    await asyncio.sleep(0)
    another = asyncio.create_task(resource()) if asked_meanwhile else None
    gate.set()
    await closing
    assert await caller is await resource() is made[1]  # its caller was not left with a closed one
    assert another is None or await another is made[1]
    assert [value.exited for value in made] == [1, 0]


async def test_a_call_that_came_just_before_everything_was_closed_shares_its_value_with_the_next() -> None:
    @fb.singleton
    async def resource() -> Resource:
        return Resource()

    caller = asyncio.create_task(resource())
    await asyncio.sleep(0)
    await resource.aclose()
    value = await caller
    assert await resource() is value
    assert value.exited == 0


# -- Replicas ---------------------------------------------------------------


@pytest.mark.parametrize("seconds", [59, 61])
async def test_a_load_that_takes_longer_than_idle_replicas_live_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    clock = itertools.count(0, seconds)
    # Of this module alone: the guard's thread looks at the clock, too.
    monkeypatch.setattr(singletons, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    for name, value in ReplicaSettings("solver-a10g", idle_ttl_s=60).variable().items():
        monkeypatch.setenv(name, value)

    @fb.singleton
    async def resource() -> Resource:
        return Resource()

    await resource()
    warned = "61 s to load, and idle replicas of the environment 'solver-a10g' end after 60 s" in caplog.text
    assert warned == (seconds > 60)
    assert ("a longer idle_ttl" in caplog.text) == warned


async def test_a_process_that_loads_is_guarded() -> None:
    @fb.singleton
    async def value() -> object:
        return object()

    loop = asyncio.get_running_loop()
    assert loop not in guard._guards
    await value()
    assert guard._guards[loop].thread.is_alive()
