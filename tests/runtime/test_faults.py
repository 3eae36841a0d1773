"""``workflows/generate.py``, whole, on two replicas while something breaks: no row lost, none twice, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import flyte_batch as fb
from tests.runtime.jobs import CHUNK_ROWS, ROWS, SLOW, Job, lost, orphans

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run

psutil = pytest.importorskip("psutil", reason="make test-runtime")


@pytest.mark.fault(
    "the executor of a replica is killed (SIGKILL)",
    "its calls, and no others, are tried again; a new replica takes its place",
)
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


@pytest.mark.fault(
    "the bridge of a replica is terminated (SIGTERM, as by an eviction)",
    "its calls, and no others, are tried again; no executor is left behind",
)
async def test_a_bridge_that_is_terminated_costs_only_its_calls_and_leaves_no_executor(job: Job) -> None:
    run = await job.start()
    victim = (await job.half_done(run))[0]
    executor = victim.executor()
    victim.terminate_bridge()
    job.check(await run.result())
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    assert not psutil.pid_exists(executor)


WITH_A_CHILD = """
import subprocess
_childless = _Engine.start
async def _start(*args, **kwargs):
    subprocess.Popen(["sleep", "600"])  # what an engine of several processes starts, and what would keep the GPU
    return await _childless(*args, **kwargs)
_Engine.start = _start
"""


@pytest.mark.fault(
    "the bridge of a replica is killed, and its container lives on",
    "its executor ends itself and the processes of its engine; its calls are tried again",
)
async def test_no_orphan_of_a_killed_bridge_keeps_the_device(broken: Broken) -> None:
    job = broken.job(WITH_A_CHILD)
    run = await job.start()
    await job.half_done(run)
    # What was started in the last second may live on; what a call has used is known to the reaper.
    victim = await job.has_ended_a_call(run)
    victim.ends_with_bridge = False
    executor = psutil.Process(victim.executor())
    orphans = [executor, *executor.children()]  # the reaper is one of them: it ends once it has done its work
    assert sum(orphan.name() == "sleep" for orphan in orphans) == 1
    victim.process.kill()
    try:
        job.check(await run.result())
        _, left = psutil.wait_procs(orphans, timeout=10)
        assert left == []
    finally:
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}


@pytest.mark.fault(
    "both replicas are killed at once",
    "two new ones take their place, and the run goes on",
)
async def test_both_replicas_killed_at_once_are_replaced_and_the_run_ends_well(job: Job) -> None:
    run = await job.start()
    for replica in await job.half_done(run):
        replica.kill_executor()
    job.check(await run.result())
    assert len(job.cluster.pools["generate-cpu"].ended) == 2


@pytest.mark.fault(
    "the driver is killed, and the run repeated",
    "finished chunks are kept untouched, the rest is done",
)
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


@pytest.mark.fault(
    "a replica is frozen (SIGSTOP) for a while",
    "its chunks wait, the others go on; when it wakes up it goes on",
)
async def test_a_frozen_replica_holds_up_its_own_chunks_only_until_it_goes_on(job: Job) -> None:
    run = await job.start()
    frozen, other = await job.half_done(run)
    executor = frozen.executor()
    os.kill(executor, signal.SIGSTOP)
    async with frozen.worker.heartbeat:
        for _ in range(2):  # what ended before it froze is told later
            await frozen.worker.heartbeat.wait()
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


POISON = 321
"""Number of the row that does harm. It comes in a batch with others."""

POISONED = """
import os
from flyte_batch.errors import EngineDead
_poisonous = []
_prepare = _Engine.prepare
def _noting(self, prompt):
    record = _prepare(self, prompt)
    if prompt.seed == 321:
        _poisonous.append(record.ids)
    return record
_Engine.prepare = _noting
_harmless = _Engine.infer
async def _poisoned(self, batch):
    if any(record.ids in _poisonous for record in batch):
        {poison}
    return await _harmless(self, batch)
_Engine.infer = _poisoned
"""


class Broken:
    """Makes a `Job` in whose bundle a statement is executed once, in the task or in the engine's ``infer``."""

    def __init__(self, make: Callable[[str], Job], folder: Path) -> None:
        self._make = make
        self.flag = folder / "broken"

    def job(self, code: str) -> Job:
        """A job with this code at the end of its workflow."""
        return self._make(SLOW + code)

    async def run(self, where: str, what: str, more: str = "", **options: object) -> tuple[Job, Run]:
        """Break at a place once; ``more`` is further code, ``options`` are the workflow's."""
        fault = FAULT.format(where=where, what=what, flag=str(self.flag)) if where else ""
        job = self.job(fault + more)
        run = await job.start(**options)
        await run.ended()
        assert self.flag.exists() or not where, f"nothing was broken: {run.log}"
        return job, run


@pytest.fixture
def broken(
    cluster: Cluster,
    generate_bundle: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> Broken:
    return Broken(lambda fault: Job(cluster, generate_bundle(fault), tmp_path, record_property), tmp_path)


@pytest.mark.fault(
    "the engine dies",
    "it is built anew within the call; nothing is tried again",
)
async def test_an_engine_that_dies_is_built_anew_and_no_call_is_lost(broken: Broken) -> None:
    job, run = await broken.run("engine", "raise EngineDead('the device is gone')")
    job.check(await run.result())
    assert lost(run) == []
    logs = [replica.log for replica in job.cluster.pools["generate-cpu"].replicas]
    assert sum("building the engine anew" in log for log in logs) == 1


@pytest.mark.fault(
    "the task's code blocks the event loop for 3 s",
    "its replica's calls wait; the log names function, file and line; nothing is tried again",
)
async def test_code_that_blocks_the_loop_is_named_and_only_takes_its_time(broken: Broken) -> None:
    job, run = await broken.run("task", "time.sleep(3)")
    job.check(await run.result())
    assert lost(run) == []
    log = "".join(replica.log for replica in job.cluster.pools["generate-cpu"].replicas)
    assert re.search(r"has stood still for \d\.\d s in infer \(workflows/generate.py\), line \d+", log)
    assert re.search(r"infer \(workflows/generate.py\) let the event loop go after [23]\.\d s", log)


SHORT_LIMIT = """
import dataclasses as _dataclasses, os as _os
from flyte_batch.replica import this_replica as _this_replica
if _this_replica() is not None:
    _os.environ.update(_dataclasses.replace(_this_replica(), stall_limit_s=3).variable())
"""


@pytest.mark.fault(
    "the task's code blocks the event loop for ever",
    "after stall_limit_s its replica names the code and ends itself; its calls are tried again on others",
)
async def test_a_replica_whose_loop_is_blocked_for_ever_ends_itself(broken: Broken) -> None:
    job, run = await broken.run("task", "while True: time.sleep(0.1)", more=SHORT_LIMIT)
    job.check(await run.result())
    (ended,) = job.cluster.pools["generate-cpu"].ended
    assert {attempt.where for attempt in lost(run)} == {ended.worker.id}
    assert re.search(
        r"stood still for [34] s in infer \(workflows/generate.py\), line \d+: this replica ends", ended.log
    )


@pytest.mark.fault(
    "the engine hangs",
    "after chunk_timeout_s its chunks are given up; the replica ends itself, others take over",
)
async def test_an_engine_that_hangs_is_given_up_at_the_deadline_with_its_replica(broken: Broken) -> None:
    job, run = await broken.run("engine", "await asyncio.Event().wait()", chunk_timeout_s=15.0)
    job.check(await run.result())
    (ended,) = job.cluster.pools["generate-cpu"].ended
    assert {attempt.where for attempt in lost(run)} == {ended.worker.id}
    told = [str(attempt.error) for attempt in lost(run) if "DeadlineExceeded" in str(attempt.error)]
    assert told
    assert all(
        re.search(r"chunk \d+ \(rows \d+-\d+\) was not done after \d+ s: its rows were being answered", each)
        for each in told
    )
    assert re.search(r"nobody got an answer for \d+ s: this replica ends itself", ended.log)


@pytest.mark.fault(
    "the task's own code never ends",
    "Flyte's timeout of the task cancels it, it is tried again",
)
async def test_a_task_that_never_ends_is_cancelled_by_its_timeout_and_its_replica_goes_on(broken: Broken) -> None:
    job, run = await broken.run("task", "await asyncio.Event().wait()", more="infer_chunk.timeout = 15\n")
    job.check(await run.result())
    (attempt,) = lost(run)
    assert (attempt.error.code, attempt.error.message) == ("TIMED_OUT", "the task took longer than 15 s")
    pool = job.cluster.pools["generate-cpu"]
    assert pool.ended == []
    assert [replica.worker.busy for replica in pool.replicas] == [0, 0]


SLOW_IMPORT = """
import time as _time
from pathlib import Path as _Path
from flyte_batch.replica import this_replica as _this_replica
if _this_replica() is not None:
    _Path({folder!r}, f"importing-{{os.getpid()}}").touch()
    _time.sleep(4)
    _Path({folder!r}, f"imported-{{os.getpid()}}").touch()
"""


def when(folder: Path, stage: str) -> dict[int, int]:
    """When processes got to a stage (ns), by their ids."""
    return {int(path.name.split("-")[1]): path.stat().st_mtime_ns for path in folder.glob(f"{stage}-*")}


@pytest.mark.fault("importing the workflow takes 4 s", "the first calls wait for it; nothing is tried again")
async def test_a_slow_import_is_waited_for_by_the_calls_that_are_there_already(broken: Broken, tmp_path: Path) -> None:
    job = broken.job(SLOW_IMPORT.format(folder=str(tmp_path)))
    run = await job.start()
    waiting: set[str] = set()
    while len(waiting) < 2:
        assert not run.phase, f"too late: {run.phase} {run.error}"
        pool = job.cluster.pools.get("generate-cpu")
        for pid in when(tmp_path, "importing").keys() - when(tmp_path, "imported").keys():
            (replica,) = [each for each in pool.replicas if each.process.pid == psutil.Process(pid).ppid()]
            if replica.worker.calls:
                waiting.add(replica.worker.id)
        await asyncio.sleep(0.01)
    job.check(await run.result())
    imported = when(tmp_path, "imported")
    assert len(imported) == 2
    assert min(job.parts().values()) > min(imported.values())
    assert lost(run) == []


@pytest.mark.fault(
    "a row that the engine can't compute", "it fails alone, with the engine's words in its column 'error'"
)
async def test_a_poison_row_fails_alone_and_its_error_is_named(broken: Broken) -> None:
    poison = f"raise RuntimeError('the device says no to row {POISON}')"
    job, run = await broken.run("engine", "pass", more=POISONED.format(poison=poison))
    job.check(await run.result(), failures=1)
    assert lost(run) == []
    table = fb.read_output(str(job.output)).to_pylist()
    assert [i for i, row in enumerate(table) if row["error"] is not None] == [POISON]
    assert table[POISON]["error"] == f"RuntimeError: the device says no to row {POISON}"


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        pytest.param(
            "raise EngineDead('the device is gone')", "EngineDead: the device is gone",
            marks=pytest.mark.fault(
                "a chunk that kills its engine each time, then is mended",
                "it alone fails, by name; what shared an engine with it is tried again; the next run does it",
            ),
        ),
        pytest.param(
            "os._exit(1)", "LOST",
            marks=pytest.mark.fault(
                "a chunk that kills its replica each time, then is mended",
                "the same",
            ),
        ),
    ],
)  # fmt: skip
async def test_a_poison_chunk_fails_by_name_and_is_done_once_it_is_mended(
    broken: Broken, job: Job, poison: str, told: str
) -> None:
    _, run = await broken.run("", "pass", more=POISONED.format(poison=poison))
    assert run.phase == "FAILED"
    assert run.error.startswith("ChunkFailed: ")
    assert told in run.error
    done = job.parts()
    assert len(done) == ROWS // CHUNK_ROWS - 1
    assert not any(f"-{POISON - POISON % CHUNK_ROWS:012d}-" in name for name in done)
    assert f"1 of 24 chunks failed; first: chunk {POISON // CHUNK_ROWS} (rows 300-324)" in run.error
    again = await job.start()
    summary = await again.result()
    job.check(summary)
    assert summary.chunks_reused == len(done)
    assert {name: job.parts()[name] for name in done} == done


UNCATCHABLE = [
    pytest.param(
        where,
        what,
        id=f"{what}-{where}",
        marks=pytest.mark.fault(f"`{what}` in the {where}", "its replica's calls are tried again, at worst"),
    )
    for where in ("task", "engine")
    for what in ("sys.exit(3)", "raise KeyboardInterrupt", "raise asyncio.CancelledError")
]


@pytest.mark.parametrize(("where", "what"), UNCATCHABLE)
async def test_what_no_except_clause_catches_costs_attempts_but_no_row(broken: Broken, where: str, what: str) -> None:
    job, run = await broken.run(where, what)
    job.check(await run.result())
    assert len({attempt.where for attempt in lost(run)}) <= 1


async def test_a_process_that_is_left_behind_is_seen(job: Job) -> None:
    environment = {"HOME": str(job.cluster.folder), "PATH": os.defpath}
    shell = await asyncio.create_subprocess_exec(
        "sh", "-c", "sleep 600 > /dev/null & echo; wait", env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert shell.stdout is not None
    await shell.stdout.readline()
    assert orphans(job.cluster) == []
    shell.kill()
    await shell.wait()
    (orphan,) = orphans(job.cluster)
    orphan.kill()
    assert orphan.name() == "sleep"
