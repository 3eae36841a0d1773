"""What is kept for the reports of chunks."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.events import Scope, Share
from flyte_batch.monitoring.recorder import MOST_STALLS, Recorder
from flyte_batch.monitoring.scope import scope_entered


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_of_stalls_by_the_hundred_the_longest_are_kept() -> None:
    recorder = Recorder()
    with recorder.recording(Scope()) as recording:
        for seconds in range(1, 3 * MOST_STALLS):
            hooks.emit(events.LoopBlocked(0.0, float(seconds), "f"))
    kept = sorted(stall.seconds for stall in recording.stalls)
    assert kept == list(range(2 * MOST_STALLS, 3 * MOST_STALLS))


@pytest.mark.usefixtures("hasty_threads")
def test_chunks_of_event_loops_on_several_threads_hear_what_happens_and_leave_nothing_behind() -> None:
    recorder, errors, deaf = Recorder(), list[BaseException](), list[int]()

    def work(number: int) -> None:
        try:
            for _ in range(3000):
                with recorder.recording(Scope()) as recording:
                    hooks.emit(events.EngineDied(0.0, str(number), "E", "e", "m", 0))
                if str(number) not in recording.died:
                    deaf.append(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, deaf) == ([], [])
    assert not hooks.is_anybody_listening()


@pytest.mark.parametrize("kind", ["batches", "continuous"])
async def test_a_chunk_that_ends_while_the_device_is_busy_with_others_has_all_its_latencies(kind: str) -> None:
    recorder, gate = Recorder(), asyncio.Event()

    def answer(text: str) -> Any:
        return gated() if text == "other" else "mine"

    async def gated() -> str:
        await gate.wait()
        return "other"

    if kind == "batches":
        engine: Any = fb.FakeEngine(answer)
        batcher: Any = fb.EngineBatcher(engine, max_batch_size=2, turn_size=2)
    else:
        engine = fb.FakeContinuousEngine(answer)
        batcher = fb.ContinuousBatcher(engine, max_in_flight=8)
    async with batcher:
        mine, other = ([engine.prepare(fb.Prompt(text))] * 2 for text in ("mine", "other"))
        with recorder.recording(scope := Scope()) as recording, recorder.sampling(batcher) as samples:
            with scope_entered(scope):
                call = asyncio.ensure_future(batcher.map(mine))
                await asyncio.sleep(0)
            others = asyncio.ensure_future(batcher.map(other))
            await call
            samples()
            heard = sum(recording.latencies.values())
        gate.set()
        await others
    assert heard == 2


def test_chunks_that_stood_still_together_tell_of_one_stall() -> None:
    recorder = Recorder()
    with recorder.recording(Scope()) as one, recorder.recording(Scope()) as other:
        hooks.emit(events.LoopBlocked(0.0, 1.5, "f"))
    assert one.stalls == other.stalls
    assert len(one.stalls) == 1


def test_records_that_an_engine_took_with_it_have_a_latency_when_they_are_done_and_not_before() -> None:
    recorder, scope = Recorder(), Scope("run", chunk="a")
    with recorder.recording(scope) as recording:
        for share in (Share(scope, 3, 3, 3.0, ((0.5, 3),), lost=3), Share(scope, 3, 1, 3.0, ((1.0, 3),))):
            hooks.emit(
                events.BatchDone(0.0, "b", 1, 0.0, 3, share.failed, 3.0, 1.0, out_of_memory=False, shares=(share,))
            )
        assert recording.latencies == {1.0: 3}
