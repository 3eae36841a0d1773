from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flyte_batch.processes import kill_below, process_table
from tests.helpers import ENVIRONMENT, ROOT

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")

OWNER = """
import subprocess, sys
from flyte_batch.processes import Reaper, process_table

reaper = Reaper()
kept, spared = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
reaper.tell({})
reaper.tell({spared.pid: process_table()[spared.pid][1]})
reaper.tell({kept.pid: process_table()[kept.pid][1], spared.pid: 1})  # an id that was given away meanwhile
print(kept.pid, spared.pid, reaper._process.pid, flush=True)
if sys.stdin.readline() == "close\\n":
    reaper.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""


class Owner:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], env=ENVIRONMENT, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.kept, self.spared, self.reaper = map(int, self.line().split())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.process.kill()
    for pid in (owner.kept, owner.spared):
        if pid in process_table():
            os.kill(pid, 9)
    owner.process.communicate()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_reaper_was_last_told_ends_with_its_owner_and_nothing_else(owner: Owner) -> None:
    owner.process.kill()
    until(lambda: not {owner.kept, owner.reaper} & set(process_table()))
    assert owner.spared in process_table()


def test_an_owner_that_just_ends_is_no_different(owner: Owner) -> None:
    owner.tell("end")
    until(lambda: not {owner.kept, owner.reaper} & set(process_table()))


def test_a_reaper_whose_owner_ended_before_it_looked_kills_what_it_was_told(owner: Owner) -> None:
    gone = 2**22 + 1  # more than any process' id
    reaper = subprocess.Popen(
        [sys.executable, "-c", f"from flyte_batch.processes import reap; reap({gone})"],
        env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert reaper.stdin is not None
    reaper.stdin.write(json.dumps({owner.spared: process_table()[owner.spared][1]}).encode() + b"\n")
    reaper.stdin.flush()  # and is not closed: an orphan holds it open
    assert reaper.wait(20) == 0
    until(lambda: owner.spared not in process_table())
    reaper.stdin.close()


def test_a_reaper_that_was_closed_kills_nobody(owner: Owner) -> None:
    owner.tell("close")
    assert owner.line() == "closed\n"
    assert owner.reaper not in process_table()
    owner.process.kill()
    owner.process.wait()
    assert {owner.kept, owner.spared} <= set(process_table())


def test_everything_below_a_process_is_killed_and_the_process_is_not() -> None:
    tree = subprocess.Popen(
        ["sh", "-c", "sh -c 'sleep 600 & echo $!; wait' & wait; echo alone; read _"],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert tree.stdout is not None
    leaf = int(tree.stdout.readline())
    assert leaf in kill_below(tree.pid)
    assert tree.stdout.readline() == "alone\n"
    assert leaf not in process_table()
    tree.communicate("\n", timeout=20)
