from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flyte_batch import guard
from flyte_batch.processes import process_table
from flyte_batch.replica import ReplicaSettings
from tests.helpers import ENVIRONMENT, ROOT


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.01)


# -- Warnings ---------------------------------------------------------------
# Where one has to come, the loop is held until it is there. Where none may come, the limit is several times longer than
# a busy machine lets a thread wait.

WarnAfter = Callable[[float], None]


@pytest.fixture
def warn_after(monkeypatch: pytest.MonkeyPatch) -> WarnAfter:
    monkeypatch.setattr(guard, "LOOK_EVERY_S", 0.02)
    return lambda seconds: monkeypatch.setattr(guard, "WARN_AFTER_S", seconds)


def slow_user_code() -> None:
    time.sleep(0.5)


def slow_in_a_library() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.5)"], check=True)


@pytest.mark.parametrize("culprit", [slow_user_code, slow_in_a_library])
async def test_code_that_blocks_the_loop_is_named_once_with_its_place_and_for_how_long(
    culprit: Callable[[], None], caplog: pytest.LogCaptureFixture, warn_after: WarnAfter
) -> None:
    warn_after(0.2)
    guard.watch()
    place = f"{culprit.__name__} (tests/test_guard.py)"
    async with asyncio.timeout(20):
        while caplog.text.count(f"{place} let the event loop go after 0.") < 2:
            culprit()
            await asyncio.sleep(0.05)
    named = [line for line in caplog.messages if "has stood still" in line and place in line]
    assert len(named) == 1
    assert f"in {place}, line " in named[0]


async def test_a_loop_that_turns_is_left_alone(caplog: pytest.LogCaptureFixture, warn_after: WarnAfter) -> None:
    warn_after(1.5)
    watching = guard.watch()
    assert guard.watch() is watching
    for _ in range(10):  # held for longer than that, but not at once
        time.sleep(0.2)  # noqa: ASYNC251
        await asyncio.sleep(0)
    assert caplog.messages == []


def test_a_loop_that_is_closed_is_not_watched_any_more() -> None:
    async def watch() -> guard.Guard:
        return guard.watch()

    first, second = asyncio.run(watch()), asyncio.run(watch())
    assert first is not second
    first.thread.join(10)
    second.thread.join(10)
    assert not first.thread.is_alive()
    assert not second.thread.is_alive()


# -- Endings ----------------------------------------------------------------

REPLICA = """
import asyncio, os, subprocess, sys, time
from flyte_batch import guard

guard.LOOK_EVERY_S, guard.WARN_AFTER_S = 0.02, 1.5

async def main():
    watching = guard.watch()
    child = subprocess.Popen(["sleep", "600"])
    print(os.getpid(), child.pid, flush=True)
    {then}

asyncio.run(main())
"""


class Process:
    """A Python process that is a replica, if it has a stall limit, and has a child."""

    def __init__(self, then: str, stall_limit_s: float | None, *, below: bool = False) -> None:
        environment = dict(ENVIRONMENT)
        if stall_limit_s is not None:
            environment |= ReplicaSettings("tested", stall_limit_s=stall_limit_s).variable()
        command = [sys.executable, "-c", REPLICA.format(then=then)]
        if below:  # a process between us and it, as the bridge is
            # What a shell starts in the background reads nothing, unless told so.
            command = ["sh", "-c", 'exec 3<&0; "$@" <&3 & wait', "sh", *command]
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.pid, self.child = map(int, self.line().split())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stderr_at_the_end(self) -> str:
        return self.process.communicate(timeout=30)[1]

    @property
    def left(self) -> set[int]:
        return {self.pid, self.child} & set(process_table())


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(then: str, stall_limit_s: float | None, **options: bool) -> Process:
        processes.append(Process(then, stall_limit_s, **options))
        return processes[-1]

    yield start
    for each in processes:
        try:
            os.killpg(each.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        each.process.communicate()


needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")


LOADED = """
    from flyte_batch.singletons import singleton
    guard.NOTE_EVERY_S = 600
    while watching._noted_at < 0:
        await asyncio.sleep(0.01)

    @singleton
    async def engine():
        return subprocess.Popen(["sleep", "600"], start_new_session=True)

    print((await engine()).pid, flush=True)
    await asyncio.Event().wait()
""".strip()


@needs_proc
async def test_a_replica_that_is_killed_leaves_nothing_that_it_started(start: Callable[..., Process]) -> None:
    told = "while child.pid not in watching._reaper._told: await asyncio.sleep(0.01)\n    print('told', flush=True)"
    replica = start(told + "\n    await asyncio.Event().wait()", 600)
    assert replica.process.stdout is not None
    assert replica.process.stdout.readline() == "told\n"
    os.kill(replica.pid, signal.SIGKILL)
    await until(lambda: not replica.left)


@needs_proc
async def test_what_a_singleton_started_is_known_before_its_first_use(start: Callable[..., Process]) -> None:
    replica = start(LOADED, 600)
    loaded = int(replica.line())
    try:
        os.kill(replica.pid, signal.SIGKILL)
        await until(lambda: loaded not in process_table())
    finally:
        if loaded in process_table():
            os.kill(loaded, signal.SIGKILL)


@needs_proc
def test_a_replica_whose_loop_stands_still_too_long_says_where_and_ends_with_all_it_started(
    start: Callable[..., Process],
) -> None:
    replica = start("while True: pass", 1.7)
    assert "stood still for 2 s in main (" in replica.stderr_at_the_end()
    assert replica.process.returncode == guard.EXIT_CODE
    assert replica.left == set()


@needs_proc
async def test_a_replica_whose_bridge_is_gone_ends_with_all_it_started(start: Callable[..., Process]) -> None:
    replica = start("await asyncio.Event().wait()", 600, below=True)
    replica.process.kill()
    await until(lambda: not replica.left)


def test_a_process_that_is_no_replica_lives_on_without_its_parent(start: Callable[..., Process]) -> None:
    told = "await asyncio.to_thread(input); await asyncio.sleep(0.5); print('still here', flush=True)"
    script = start(told, None, below=True)
    script.process.kill()
    script.process.wait()
    script.tell()
    assert script.line() == "still here\n"


def test_a_process_that_is_no_replica_may_block_as_long_as_it_likes(start: Callable[..., Process]) -> None:
    script = start("guard.WARN_AFTER_S = 0.2; time.sleep(1.5); child.kill()", None)
    assert "stood still" in script.stderr_at_the_end()
    assert script.process.returncode == 0


HELD = """
    while watching._alive.is_set():
        pass
    print("the guard waits for the loop", flush=True)
    sys.stdin.readline()
    child.kill()
"""


def test_a_replica_that_was_frozen_is_not_blamed_for_it(start: Callable[..., Process]) -> None:
    replica = start(HELD, 1.5)
    assert replica.line() == "the guard waits for the loop\n"
    os.kill(replica.pid, signal.SIGSTOP)
    time.sleep(2)  # frozen for longer than its limit
    os.kill(replica.pid, signal.SIGCONT)
    replica.tell()
    assert replica.stderr_at_the_end() == ""
    assert replica.process.returncode == 0


RESTS = """child.kill()

with asyncio.Runner() as runner:
    runner.run(main())
    time.sleep(2)  # the loop is not closed, and not running
    runner.run(main())
sys.exit()
"""


def test_a_replica_whose_loop_rests_between_two_calls_is_left_alone(start: Callable[..., Process]) -> None:
    replica = start(RESTS, 1.5)
    assert replica.stderr_at_the_end() == ""
    assert replica.process.returncode == 0


WITH_ORPHAN = """
    from flyte_batch.processes import Reaper, process_table
    shell = ["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]
    orphan = int(subprocess.check_output(shell, stdin=subprocess.DEVNULL))
    reaper = Reaper()
    reaper.tell({orphan: process_table()[orphan][1]})
    print(orphan, flush=True)
    watching.end_replica_soon("told to", grace_s=0)
    await asyncio.Event().wait()
"""


@needs_proc
async def test_what_only_a_reaper_knows_of_ends_with_its_replica(start: Callable[..., Process]) -> None:
    replica = start(WITH_ORPHAN, 600)
    orphan = int(replica.line())
    await until(lambda: not replica.left | ({orphan} & set(process_table())))


def test_a_replica_that_is_told_to_ends_after_its_grace_once(start: Callable[..., Process]) -> None:
    told = "watching.end_replica_soon('the engine is stuck', grace_s=0.3); " * 2
    replica = start(told + "await asyncio.Event().wait()", 600)
    assert replica.stderr_at_the_end().count("the engine is stuck: this replica ends itself in 0.3 s") == 1
    assert replica.process.returncode == guard.EXIT_CODE


def test_what_is_no_replica_does_not_end_when_told_to(start: Callable[..., Process]) -> None:
    script = start("watching.end_replica_soon('stuck', grace_s=0); await asyncio.sleep(0.3); child.kill()", None)
    assert "stuck" not in script.stderr_at_the_end()
    assert script.process.returncode == 0
