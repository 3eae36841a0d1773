"""The fake engine does what it is told, so that tests with it mean something."""

from __future__ import annotations

import asyncio

import pytest

from flyte_batch.engines import FakeEngine
from flyte_batch.engines.fake import FakeRecord
from flyte_batch.errors import BadRecord, EngineDead, EngineOutOfMemory, MissingValue, PromptTooLong
from flyte_batch.records import Completion, Prompt, SamplingParameters


def records(engine: FakeEngine, *texts: str) -> list[FakeRecord]:
    return [engine.prepare(Prompt(text)) for text in texts]


async def test_it_echoes_by_default_and_counts_words() -> None:
    engine = FakeEngine()
    assert await engine.infer(records(engine, "two words")) == [Completion("echo: two words", "stop", 2, 3)]


async def test_an_answer_may_be_a_function_or_async() -> None:
    async def later(text: str) -> str:
        await asyncio.sleep(0)
        return text.upper()

    for answer in (str.upper, later):
        engine = FakeEngine(answer)
        (result,) = await engine.infer(records(engine, "a"))
        assert isinstance(result, Completion)
        assert result.text == "A"


async def test_max_tokens_and_stop_texts_end_a_response() -> None:
    engine = FakeEngine(lambda _: "a b c d", sampling=SamplingParameters(max_tokens=3))
    assert await engine.infer(records(engine, "x")) == [Completion("a b c", "length", 1, 3)]
    engine = FakeEngine(lambda _: "a b STOP d", sampling=SamplingParameters(stop=("d", "STOP")))
    assert await engine.infer(records(engine, "x")) == [Completion("a b ", "stop", 1, 2)]


async def test_device_time_passes_on_the_clock_it_was_given() -> None:
    passed: list[float] = []

    async def clock(seconds: float) -> None:
        passed.append(seconds)

    engine = FakeEngine(lambda _: "x y", seconds_per_batch=10, seconds_per_token=1, sleep=clock)
    await engine.infer(records(engine, "a b c", "d"))
    assert passed == [10 + (3 + 2) + (1 + 2)]


async def test_it_says_what_is_on_the_device() -> None:
    engine = FakeEngine(seconds_per_batch=3600)
    call = asyncio.ensure_future(engine.infer(records(engine, "a")))
    await asyncio.sleep(0)
    assert engine.running == 1
    call.cancel()
    await asyncio.wait([call])
    assert engine.running == 0


async def test_a_prompt_it_fails_on_fails_alone() -> None:
    engine = FakeEngine(fail_on=["bad"])
    good, bad = await engine.infer(records(engine, "good", "bad"))
    assert isinstance(good, Completion)
    assert isinstance(bad, BadRecord)


async def test_an_answer_that_raises_fails_that_record_alone() -> None:
    def answer(text: str) -> str:
        return text if text == "1" else str(1 / 0)

    engine = FakeEngine(answer)
    good, bad = await engine.infer(records(engine, "1", "0"))
    assert isinstance(good, Completion)
    assert isinstance(bad, ZeroDivisionError)


async def test_a_poisoned_prompt_fails_its_whole_batch() -> None:
    engine = FakeEngine(poison=["bad"])
    with pytest.raises(RuntimeError, match="'bad'"):
        await engine.infer(records(engine, "good", "bad"))
    assert len(await engine.infer(records(engine, "good"))) == 1


async def test_a_batch_above_its_size_or_cost_runs_out_of_memory_and_a_smaller_one_does_not() -> None:
    engine = FakeEngine(largest_batch=1)
    with pytest.raises(EngineOutOfMemory, match="2 records"):
        await engine.infer(records(engine, "a", "b"))
    assert len(await engine.infer(records(engine, "a"))) == 1
    engine = FakeEngine(largest_cost=12, sampling=SamplingParameters(max_tokens=10))
    with pytest.raises(EngineOutOfMemory, match="22"):
        await engine.infer(records(engine, "a", "b"))
    assert len(await engine.infer(records(engine, "a"))) == 1


async def test_it_dies_after_as_many_batches_as_told_and_stays_dead() -> None:
    engine = FakeEngine(dies_after=1)
    await engine.infer(records(engine, "a"))
    for _ in range(2):
        with pytest.raises(EngineDead):
            await engine.infer(records(engine, "b"))
    assert engine.batches == [["a"], ["b"]]


def test_a_prompt_as_long_as_the_context_is_rejected_and_a_long_one_may_answer_less() -> None:
    engine = FakeEngine(context=4, sampling=SamplingParameters(max_tokens=3))
    with pytest.raises(PromptTooLong, match=r"4 tokens.*holds 4"):
        engine.prepare(Prompt("1 2 3 4"))
    assert engine.estimate_cost(engine.prepare(Prompt("1 2 3"))) == 4
    assert engine.estimate_cost(engine.prepare(Prompt("1", system="2"))) == 4
    assert engine.estimate_cost(engine.prepare(Prompt("1"))) == 4


@pytest.mark.parametrize(("text", "kind"), [("", MissingValue), ("  ", MissingValue), ("\ud800", BadRecord)])
def test_it_rejects_what_the_real_engines_reject(text: str, kind: type[BadRecord]) -> None:
    with pytest.raises(kind):
        FakeEngine().prepare(Prompt(text))
