"""The fake engine with slots does what it is told, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from flyte_batch.engines import FakeContinuousEngine
from flyte_batch.engines.base import ContinuousEngine
from flyte_batch.errors import BadRecord, EngineDead, EngineOutOfMemory
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters
from tests.batching.stepping import settle, soon


class Clock:
    """Device time that passes when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.ticks = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.ticks.acquire()

    async def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.ticks.release()
            await settle()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def words(text: str) -> str:
    """``a3`` is answered with three words."""
    return " ".join("w" * int(text[1:]))


def engine_of(clock: Clock, **options: Any) -> FakeContinuousEngine:
    return FakeContinuousEngine(words, sleep=clock.sleep, **options)


async def ask(engine: FakeContinuousEngine, *texts: str) -> list[asyncio.Task[Completion]]:
    calls = [asyncio.create_task(engine.generate(engine.prepare(Prompt(text)))) for text in texts]
    await settle()
    return calls


def done(calls: list[asyncio.Task[Completion]]) -> list[bool]:
    return [call.done() for call in calls]


async def failure(call: Awaitable[Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        await soon(call)
    return caught.value


async def test_it_is_a_continuous_engine_and_infer_is_all_of_generate() -> None:
    engine = FakeContinuousEngine(fail_on=["bad"])
    assert isinstance(engine, ContinuousEngine)
    good, bad = await engine.infer([engine.prepare(Prompt(text)) for text in ("two words", "bad")])
    assert good == Completion("echo: two words", "stop", 2, 3)
    assert isinstance(bad, BadRecord)
    assert engine.batches == [["two words", "bad"]]


async def test_records_run_side_by_side_a_token_a_step_and_each_is_answered_when_it_is_done(clock: Clock) -> None:
    engine = engine_of(clock, seconds_per_step=2)
    calls = await ask(engine, "a1", "a3", "a2")
    assert done(calls) == [False, False, False]
    await clock.step()
    assert done(calls) == [True, False, False]
    await clock.step()
    assert done(calls) == [True, False, True]
    await clock.step()
    assert [call.result().text for call in calls] == ["w", "w w w", "w w"]
    assert clock.asked == [2, 2, 2]
    assert (engine.steps, engine.record_steps, engine.most_running, engine.running) == (3, 3 + 2 + 1, 3, 0)


async def test_a_finished_record_makes_room_for_the_next_one_in_line(clock: Clock) -> None:
    engine = engine_of(clock, slots=2)
    calls = await ask(engine, "a2", "b1", "c1", "d1")
    assert engine.started == ["a2", "b1"]
    await clock.step()
    assert done(calls) == [False, True, False, False]
    assert engine.started == ["a2", "b1", "c1"]
    await clock.step(2)
    assert done(calls) == [True, True, True, True]
    assert engine.most_running == 2


async def test_a_late_record_joins_the_running_ones_at_the_next_step(clock: Clock) -> None:
    engine = engine_of(clock)
    (long,) = await ask(engine, "a3")
    await clock.step()
    (short,) = await ask(engine, "b1")
    assert engine.running == 1
    await clock.step(2)
    assert long.done()
    assert short.done()
    assert engine.steps == 3


async def test_records_wait_until_their_tokens_fit_and_one_that_never_fits_runs_alone(clock: Clock) -> None:
    engine = engine_of(clock, capacity_tokens=5)
    calls = await ask(engine, "a2", "b1", "c1", "d9")  # 3, 2, 2 and 10 tokens with the prompt's one
    assert engine.started == ["a2", "b1"]
    await clock.step()
    assert engine.started == ["a2", "b1", "c1"]
    await clock.step()
    assert engine.started == ["a2", "b1", "c1", "d9"]
    await clock.step(9)
    assert done(calls) == [True, True, True, True]


async def test_max_tokens_cuts_a_response_and_its_steps(clock: Clock) -> None:
    engine = engine_of(clock, sampling=SamplingParameters(max_tokens=2))
    (call,) = await ask(engine, "a9")
    await clock.step(2)
    assert call.result() == Completion("w w", "length", 1, 2)


async def test_a_response_without_a_word_takes_a_step(clock: Clock) -> None:
    engine = engine_of(clock)
    (call,) = await ask(engine, "a0")
    assert not call.done()
    await clock.step()
    assert call.result() == Completion("", "stop", 1, 0)


async def test_cancelling_frees_the_slot_of_a_running_and_the_place_of_a_waiting_record(clock: Clock) -> None:
    engine = engine_of(clock, slots=1)
    running, waiting, last = await ask(engine, "a9", "b9", "c1")
    waiting.cancel()
    running.cancel()
    await settle()
    assert (engine.running, engine.aborted) == (0, 2)
    await clock.step(2)  # one that had begun with the cancelled record, one for the last
    assert last.result().text == "w"
    assert engine.started == ["a9", "c1"]
    assert (engine.finished, engine.aborted) == (1, 2)


async def test_a_cancelled_call_that_is_done_in_the_same_moment_harms_nobody(clock: Clock) -> None:
    engine = engine_of(clock)
    one, other = await ask(engine, "a1", "b2")
    clock.ticks.release()
    one.cancel()
    await settle()
    await clock.step()
    assert one.cancelled()
    assert other.result().text == "w w"
    assert engine.running == 0


async def test_an_endless_text_runs_until_it_is_cancelled(clock: Clock) -> None:
    engine = engine_of(clock, endless=["a1"])
    endless, other = await ask(engine, "a1", "b2")
    await clock.step(50)
    assert done([endless, other]) == [False, True]
    assert engine.running == 1
    endless.cancel()
    await clock.step()
    assert engine.running == 0
    steps = engine.steps
    await clock.step()
    assert engine.steps == steps  # nothing to do, no steps


async def test_one_record_too_many_runs_out_of_memory_and_the_others_do_not(clock: Clock) -> None:
    engine = engine_of(clock, slots=1, largest_flight=2)
    running, waiting, newcomer = await ask(engine, "a1", "b1", "c1")
    assert isinstance(await failure(newcomer), EngineOutOfMemory)
    await clock.step(2)
    assert done([running, waiting]) == [True, True]
    (again,) = await ask(engine, "c1")
    await clock.step()
    assert again.result().text == "w"


async def test_infer_runs_out_of_memory_as_generate_does() -> None:
    engine = FakeContinuousEngine(largest_flight=1)
    with pytest.raises(EngineOutOfMemory):
        await engine.infer([engine.prepare(Prompt(text)) for text in "ab"])


async def test_a_text_it_fails_on_and_an_answer_that_raises_fail_alone(clock: Clock) -> None:
    engine = engine_of(clock, fail_on=["x1"])
    bad, broken, good = await ask(engine, "x1", "not a number", "a1")
    assert isinstance(await failure(bad), BadRecord)
    assert isinstance(await failure(broken), ValueError)
    await clock.step()
    assert good.result().text == "w"


async def test_it_dies_when_as_many_records_are_finished_as_told_for_all_in_flight_and_later(clock: Clock) -> None:
    engine = engine_of(clock, slots=3, dies_after=2)
    calls = await ask(engine, "a1", "b1", "c1", "d1")
    await clock.step()
    assert [call.exception() is None for call in calls] == [True, True, False, False]
    for call in calls[2:]:
        assert isinstance(await failure(call), EngineDead)
    assert isinstance(await failure(engine.generate(engine.prepare(Prompt("e1")))), EngineDead)
    assert isinstance(await failure(engine.infer([])), EngineDead)
    assert (engine.finished, engine.running) == (2, 0)


async def test_it_may_be_dead_from_the_start(clock: Clock) -> None:
    (call,) = await ask(engine_of(clock, dies_after=0), "a1")
    assert isinstance(await failure(call), EngineDead)


async def test_closing_fails_what_runs_and_waits(clock: Clock) -> None:
    engine = engine_of(clock, slots=1, endless=["a1"])
    calls = await ask(engine, "a1", "b1")
    await soon(engine.aclose())
    for call in calls:
        assert "was closed" in str(await failure(call))
    assert isinstance(await failure(engine.generate(engine.prepare(Prompt("c1")))), EngineDead)


async def test_a_clock_that_breaks_fails_the_records_and_hangs_nobody() -> None:
    async def broken(seconds: float) -> None:
        raise OverflowError

    engine = FakeContinuousEngine(sleep=broken)
    assert isinstance(await failure(engine.generate(engine.prepare(Prompt("a")))), EngineDead)


async def test_its_tokens_are_the_words_of_the_whole_conversation() -> None:
    engine = FakeContinuousEngine()
    record = engine.prepare(Chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "why not"}]))
    assert list(engine.prompt_ids(record)) == ["be", "brief", "why", "not"]
    assert (await engine.generate(record)).text == "echo: why not"


async def test_it_may_stand_for_a_vision_model() -> None:
    prompt = Prompt("what is it", images=(b"png", "a.png"))
    with pytest.raises(BadRecord, match="takes texts only"):
        FakeContinuousEngine().prepare(prompt)
    engine = FakeContinuousEngine(takes_images=True)
    assert await engine.generate(engine.prepare(prompt)) == Completion("echo: what is it", "stop", 5, 4)
