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


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WARN_AFTER_S", 0.2)
    monkeypatch.setattr(guard, "LOOK_EVERY_S", 0.02)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.01)


# -- Warnings ---------------------------------------------------------------


def slow_user_code() -> None:
    time.sleep(0.5)


def slow_in_a_library() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.5)"], check=True)


@pytest.mark.parametrize("culprit", [slow_user_code, slow_in_a_library])
async def test_code_that_blocks_the_loop_is_named_once_with_its_place_and_for_how_long(
    culprit: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    guard.watch()
    for _ in range(2):
        culprit()
        await until(lambda: f"{culprit.__name__} (tests/test_guard.py) let the event loop go after" in caplog.text)
        named = [line for line in caplog.messages if "has stood still" in line]
        assert len(named) == 1
        assert f"in {culprit.__name__} (tests/test_guard.py), line " in named[0]


async def test_a_loop_that_turns_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    watching = guard.watch()
    assert guard.watch() is watching
    for _ in range(50):
        await asyncio.sleep(0.01)
        time.sleep(0.005)  # noqa: ASYNC251
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

guard.LOOK_EVERY_S = 0.02

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
        assert self.process.stdout is not None
        self.pid, self.child = map(int, self.process.stdout.readline().split())

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


@needs_proc
def test_a_replica_whose_loop_stands_still_too_long_says_where_and_ends_with_all_it_started(
    start: Callable[..., Process],
) -> None:
    replica = start("while True: pass", 0.5)
    assert "stood still for 1 s in main (" in replica.stderr_at_the_end()
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
    assert script.process.stdin is not None
    assert script.process.stdout is not None
    script.process.stdin.write("\n")
    script.process.stdin.flush()
    assert script.process.stdout.readline() == "still here\n"


def test_a_process_that_is_no_replica_may_block_as_long_as_it_likes(start: Callable[..., Process]) -> None:
    assert start("time.sleep(1.5); child.kill()", None).stderr_at_the_end().count("stood still") == 1


def test_a_replica_that_was_frozen_is_not_blamed_for_it(start: Callable[..., Process]) -> None:
    replica = start("await asyncio.sleep(1.5); child.kill()", 0.5)
    os.kill(replica.pid, signal.SIGSTOP)
    time.sleep(1)  # frozen for longer than its limit
    os.kill(replica.pid, signal.SIGCONT)
    assert replica.stderr_at_the_end() == ""
    assert replica.process.returncode == 0


def test_a_replica_that_is_told_to_ends_after_its_grace_once(start: Callable[..., Process]) -> None:
    told = "watching.end_replica_soon('the engine is stuck', grace_s=0.3); " * 2
    replica = start(told + "await asyncio.Event().wait()", 600)
    assert replica.stderr_at_the_end().count("the engine is stuck: this replica ends itself in 0.3 s") == 1
    assert replica.process.returncode == guard.EXIT_CODE


def test_what_is_no_replica_does_not_end_when_told_to(start: Callable[..., Process]) -> None:
    script = start("watching.end_replica_soon('stuck', grace_s=0); await asyncio.sleep(0.3); child.kill()", None)
    assert script.stderr_at_the_end() == ""
    assert script.process.returncode == 0
