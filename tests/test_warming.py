"""Warm-up: one record per engine in a replica, and calls that a run neither waits for nor depends on."""

from __future__ import annotations

import asyncio

import pytest

import flyte_batch as fb


class TestInTheReplica:
    async def test_it_loads_the_engine_and_lets_one_record_through_however_often_it_is_called(self) -> None:
        engines: list[fb.FakeEngine] = []

        @fb.singleton
        async def solver() -> fb.EngineBatcher:
            engines.append(fb.FakeEngine())
            return fb.EngineBatcher(engines[-1])

        await asyncio.gather(*(fb.warm_up(solver) for _ in range(4)))
        await fb.warm_up(solver)
        assert [engine.batches for engine in engines] == [[["Hello"]]]

    async def test_an_engine_that_was_built_anew_is_warmed_up_too(self) -> None:
        engines: list[fb.FakeContinuousEngine] = []

        @fb.singleton
        async def solver() -> fb.ContinuousBatcher:
            engines.append(fb.FakeContinuousEngine())
            return fb.ContinuousBatcher(engines[-1])

        await fb.warm_up(solver)
        await solver.discard(await solver())
        await fb.warm_up(solver, "a text of the user's")
        assert [engine.started for engine in engines] == [["Hello"], ["a text of the user's"]]

    @pytest.mark.parametrize(
        ("engine", "why"),
        [
            (fb.FakeEngine(fail_on=["Hello"]), "BadRecord"),
            (fb.FakeEngine(dies_after=0), "EngineDead"),
            (fb.FakeEngine(context=1), "PromptTooLong"),
        ],
        ids=["fails it", "dies of it", "refuses it"],
    )
    async def test_an_engine_that_does_not_answer_the_record_is_logged_and_nothing_else(
        self, caplog: pytest.LogCaptureFixture, engine: fb.FakeEngine, why: str
    ) -> None:
        @fb.singleton
        async def solver() -> fb.EngineBatcher:
            return fb.EngineBatcher(engine)

        await fb.warm_up(solver)
        (record,) = [record for record in caplog.records if record.name == "flyte_batch.warming"]
        assert f"did not answer its first record ({why}" in record.getMessage()

    async def test_a_record_that_takes_too_long_is_given_up(self, caplog: pytest.LogCaptureFixture) -> None:
        async def answer(text: str) -> str:
            if text == "Hello":
                await asyncio.Event().wait()
            return text

        engine = fb.FakeContinuousEngine(answer)

        @fb.singleton
        async def solver() -> fb.ContinuousBatcher:
            return fb.ContinuousBatcher(engine)

        await fb.warm_up(solver, timeout_s=0.01)
        assert "DeadlineExceeded" in caplog.text
        (answered,) = await (await solver()).map([engine.prepare(fb.Prompt("a row"))])
        assert answered.text == "a row"

    async def test_an_engine_whose_first_record_was_cancelled_is_warmed_up_by_the_next_call(self) -> None:
        asked: list[str] = []
        began = asyncio.Event()

        async def answer(text: str) -> str:
            asked.append(text)
            if not began.is_set():
                began.set()
                await asyncio.Event().wait()
            return text

        engine = fb.FakeContinuousEngine(answer)

        @fb.singleton
        async def solver() -> fb.ContinuousBatcher:
            return fb.ContinuousBatcher(engine)

        first = asyncio.create_task(fb.warm_up(solver))
        await began.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for _ in range(2):
            await fb.warm_up(solver)
        assert asked == ["Hello", "Hello"]

    async def test_a_load_that_fails_is_the_callers_error(self) -> None:
        @fb.singleton
        async def solver() -> fb.EngineBatcher:
            raise OSError("the weights are not there yet")

        with pytest.raises(OSError, match="not there yet"):
            await fb.warm_up(solver)


class TestInTheDriver:
    async def test_the_calls_are_under_way_while_the_body_runs_which_waits_for_none_and_they_end_with_it(self) -> None:
        begun, cancelled = asyncio.Semaphore(0), 0

        async def wake() -> None:
            nonlocal cancelled
            begun.release()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise

        async with fb.waking_replicas(wake, replicas=2, concurrency=2):
            for _ in range(3):
                await begun.acquire()
            assert cancelled == 0
        assert cancelled == 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @pytest.mark.parametrize("error", [fb.BadInput("no such column"), asyncio.CancelledError()])
    async def test_they_end_with_a_body_that_fails_and_its_error_is_the_one_that_is_raised(
        self, error: BaseException
    ) -> None:
        with pytest.raises(type(error)):
            async with fb.waking_replicas(asyncio.Event().wait, 2, 1):
                raise error
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_a_call_that_fails_is_logged_and_the_body_goes_on(self, caplog: pytest.LogCaptureFixture) -> None:
        async def wake() -> None:
            failing.release()
            raise fb.EngineDead("it died")

        failing = asyncio.Semaphore(0)
        async with fb.waking_replicas(wake, 2, 1):
            for _ in range(2):
                await failing.acquire()
        messages = [record.getMessage() for record in caplog.records]
        assert messages == ["a replica was not warmed up (EngineDead: it died); its first chunk does it"] * 2

    @pytest.mark.parametrize(
        ("replicas", "concurrency", "calls"), [(1, 10, 1), (2, 4, 5), (4, 10, 31), (4, 1, 4), (50, 10, 100)]
    )
    async def test_there_is_one_more_than_all_but_one_replica_can_take_up_to_a_second_of_submitting(
        self, replicas: int, concurrency: int, calls: int
    ) -> None:
        async with fb.waking_replicas(asyncio.Event().wait, replicas, concurrency):
            assert len(asyncio.all_tasks()) == 1 + calls

    async def test_none_are_made_for_no_replicas(self) -> None:
        async def wake() -> None:
            raise AssertionError("called")

        async with fb.waking_replicas(wake, 0, 4):
            assert asyncio.all_tasks() == {asyncio.current_task()}
