from __future__ import annotations

import asyncio

import pytest

import flyte_batch as fb


async def test_it_costs_records_as_the_engine_does_and_keeps_the_budget() -> None:
    engine = fb.FakeEngine(sampling=fb.SamplingParameters(max_tokens=8))
    async with fb.EngineBatcher(engine, target_batch_tokens=30) as batcher:
        await batcher.map([engine.prepare(fb.Prompt("two words"))] * 9)
    assert [len(batch) for batch in engine.batches] == [3, 3, 3]


async def test_bad_rows_are_isolated_unless_told_otherwise() -> None:
    for options, failed in (({}, [False, True, False]), ({"isolate_failures": False}, [True, True, True])):
        engine = fb.FakeEngine(poison=["b"])
        async with fb.EngineBatcher(engine, **options) as batcher:
            records = [engine.prepare(fb.Prompt(text)) for text in "abc"]
            results = await batcher.map(records, return_exceptions=True)
        assert [isinstance(result, Exception) for result in results] == failed


async def test_callers_of_64_records_end_one_after_the_other() -> None:
    engine = fb.FakeEngine()
    async with fb.EngineBatcher(engine, max_batch_size=64, batch_timeout_s=5) as batcher:
        await asyncio.gather(*(batcher.map([engine.prepare(fb.Prompt(name))] * 64) for name in "abc"))
    assert [set(batch) for batch in engine.batches] == [{"a"}, {"b"}, {"c"}]


async def test_leaving_it_answers_what_waits_and_closes_the_engine() -> None:
    engine = fb.FakeEngine()
    async with fb.EngineBatcher(engine) as batcher:
        future = await batcher.submit(engine.prepare(fb.Prompt("last")))
    assert (await future).text == "echo: last"
    assert engine.closed
    with pytest.raises(fb.BatcherNotRunning):
        await batcher.submit(engine.prepare(fb.Prompt("too late")))


async def test_a_dead_engine_ends_the_batcher_so_that_a_singleton_builds_another() -> None:
    engines = [fb.FakeEngine(dies_after=0), fb.FakeEngine()]

    @fb.singleton
    async def solver() -> fb.EngineBatcher:
        return fb.EngineBatcher(engines.pop(0))

    first = await solver()
    with pytest.raises(fb.EngineDead):
        await first.map([first.engine.prepare(fb.Prompt("a"))])
    assert not first.is_running
    second = await solver()
    assert second.id != first.id
    assert (await second.map([second.engine.prepare(fb.Prompt("a"))]))[0].text == "echo: a"


async def test_giving_up_on_closing_it_leaves_the_engine_to_the_records_it_took() -> None:
    gate = asyncio.Event()

    async def answer(text: str) -> str:
        await gate.wait()
        return text

    engine = fb.FakeEngine(answer)
    batcher = await fb.EngineBatcher(engine, max_batch_size=1).__aenter__()
    futures = await batcher.submit_batch([engine.prepare(fb.Prompt(text)) for text in "ab"])
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.set()
    assert [(await future).text for future in futures] == ["a", "b"]
    await batcher.aclose()
    assert engine.closed


def test_a_program_that_ends_without_closing_it_says_nothing_if_nothing_was_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @fb.singleton
    async def solver() -> fb.EngineBatcher:
        return fb.EngineBatcher(fb.FakeEngine())

    async def main() -> None:
        batcher = await solver()
        await batcher.map([batcher.engine.prepare(fb.Prompt("a"))])

    asyncio.run(main())
    assert caplog.text == ""
