"""``workflows/generate.py``, whole, on two replicas while something breaks: no row lost, none twice, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runtime.jobs import SLOW, Job, lost

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run


async def test_an_executor_that_is_killed_costs_only_its_calls_and_a_new_replica_takes_its_place(job: Job) -> None:
    run = await job.start()
    replicas = await job.half_done(run)
    victim = replicas[0]
    under_way = set(victim.worker.calls)
    done = job.parts()
    victim.kill_executor()
    job.check(await run.result())
    # A call that had committed its part, but not told so yet, does it again.
    assert sum(job.parts()[name] != written for name, written in done.items()) <= len(under_way)
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    assert len(lost(run)) == len(under_way)
    assert job.cluster.pools["generate-cpu"].ended == [victim]
    assert len(await job.cluster.pools["generate-cpu"].up()) == 2


async def test_a_bridge_that_is_terminated_costs_only_its_calls_and_leaves_no_executor(job: Job) -> None:
    run = await job.start()
    victim = (await job.half_done(run))[0]
    executor = victim.executor()
    victim.terminate_bridge()
    job.check(await run.result())
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    with pytest.raises(ProcessLookupError):
        os.kill(executor, 0)


async def test_both_replicas_killed_at_once_are_replaced_and_the_run_ends_well(job: Job) -> None:
    run = await job.start()
    for replica in await job.half_done(run):
        replica.kill_executor()
    job.check(await run.result())
    assert len(job.cluster.pools["generate-cpu"].ended) == 2


async def test_a_driver_that_is_killed_is_run_again_and_finished_chunks_are_kept(job: Job) -> None:
    run = await job.start()
    await job.half_done(run)
    run.kill_driver()
    await run.ended()
    assert run.phase == "FAILED"
    done = job.parts()
    assert not (job.output / "_manifest.json").exists()
    again = await job.start()
    summary = await again.result()
    job.check(summary)
    assert {name: job.parts()[name] for name in done} == done
    assert summary.chunks_reused >= len(done) >= 6


async def test_a_frozen_replica_holds_up_its_own_chunks_only_until_it_goes_on(job: Job) -> None:
    run = await job.start()
    frozen, other = await job.half_done(run)
    executor = frozen.executor()
    os.kill(executor, signal.SIGSTOP)
    calls = set(frozen.worker.calls)
    while other.worker.calls:
        assert not run.phase
        await asyncio.sleep(0.01)
    assert calls <= set(frozen.worker.calls)
    os.kill(executor, signal.SIGCONT)
    job.check(await run.result())
    assert lost(run) == []


# -- What breaks from within ------------------------------------------------

FAULT = """
import sys, time
from pathlib import Path

from flyte_batch.errors import EngineDead

_calls = 0

def _now(name):
    "Whether it is time to break: at the third call of a process, in the first process that gets there."
    global _calls
    _calls += name == {where!r}
    if name != {where!r} or _calls < 3:
        return False
    try:
        Path({flag!r}).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

_sound = _Engine.infer
async def _breaking(self, batch):
    if _now("engine"):
        {what}
    return await _sound(self, batch)
_Engine.infer = _breaking

_infer = infer
async def infer(chunk, job):
    if _now("task"):
        {what}
    return await _infer(chunk, job)
"""


class Broken:
    """Makes a `Job` in whose bundle a statement is executed once, in the task or in the engine's ``infer``."""

    def __init__(self, make: Callable[[str], Job], folder: Path) -> None:
        self._make = make
        self.flag = folder / "broken"

    async def run(self, where: str, what: str) -> tuple[Job, Run]:
        fault = FAULT.format(where=where, what=what, flag=str(self.flag))
        job = self._make(SLOW + fault)
        run = await job.start()
        await run.ended()
        assert self.flag.exists(), f"nothing was broken: {run.log}"
        return job, run


@pytest.fixture
def broken(
    cluster: Cluster,
    generate_bundle: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> Broken:
    return Broken(lambda fault: Job(cluster, generate_bundle(fault), tmp_path, record_property), tmp_path)


async def test_an_engine_that_dies_is_built_anew_and_no_call_is_lost(broken: Broken) -> None:
    job, run = await broken.run("engine", "raise EngineDead('the device is gone')")
    job.check(await run.result())
    assert lost(run) == []
    logs = [replica.log for replica in job.cluster.pools["generate-cpu"].replicas]
    assert sum("building the engine anew" in log for log in logs) == 1


async def test_code_that_blocks_the_loop_only_takes_its_time(broken: Broken) -> None:
    job, run = await broken.run("task", "time.sleep(3)")
    job.check(await run.result())
    assert lost(run) == []


@pytest.mark.parametrize("what", ["sys.exit(3)", "raise KeyboardInterrupt", "raise asyncio.CancelledError"])
@pytest.mark.parametrize("where", ["task", "engine"])
async def test_what_no_except_clause_catches_costs_attempts_but_no_row(broken: Broken, where: str, what: str) -> None:
    job, run = await broken.run(where, what)
    job.check(await run.result())
    assert len({attempt.where for attempt in lost(run)}) <= 1
