"""The processes of this machine, as ``/proc`` shows them, and how to end those that nobody else will end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_REAPER = "import sys; sys.path.insert(0, sys.argv[1]); from flyte_batch.processes import reap; reap(int(sys.argv[2]))"
_LOOK_EVERY_S = 0.5

_reapers: set[int] = set()


def process_table() -> dict[int, tuple[int, int]]:
    """id -> (parent's id, start in clock ticks since boot) of all processes but zombies; empty without ``/proc``."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in parentheses that may hold anything, parentheses too.
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended in between
            continue
        if fields[0] != "Z":
            table[int(path.parent.name)] = (int(fields[1]), int(fields[19]))
    return table


def kill_below(pid: int) -> list[int]:
    """Kill every process that a process started, and those that these did; does nothing without ``/proc``.

    This process's reapers are spared: they alone know what lost its parent, and kill that at this process's end.

    Returns:
        Their ids.
    """
    killed: set[int] = set()
    while left := below(pid).keys() - killed:  # until none is left: one may have started another meanwhile
        for each in left:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        killed |= left
    return sorted(killed)


def below(pid: int) -> dict[int, int]:
    """id -> start, as in `process_table`, of all processes that a process started, and those that these did.

    Without this process's reapers.
    """
    table = process_table()
    found: set[int] = set()
    newer = {pid}
    while newer:
        newer = {each for each, (parent, _) in table.items() if parent in newer} - found
        found |= newer
    return {each: table[each][1] for each in found - _reapers}


class Reaper:
    """A small process that kills others once this one is gone, however it ended: SIGKILL leaves no time for anything.

    An engine's processes keep the device's memory. vLLM's go on for as long as the machine does if the process that
    started them is killed, by the kernel for want of memory, say.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: dict[int, int] = {}

    def tell(self, known: Mapping[int, int]) -> None:
        """Have these processes, and no others, killed at this one's end; the first call starts the reaper.

        Args:
            known: id -> start in clock ticks since boot, as in `process_table`.
        """
        if not known or known == self._told:
            return
        if self._process is None:
            # In a session of its own: what a terminal or a supervisor sends to the group must not end it.
            self._process = subprocess.Popen(  # noqa: S603 - this very module
                [sys.executable, "-c", _REAPER, str(Path(__file__).parent.parent), str(os.getpid())],
                stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            _reapers.add(self._process.pid)
        assert self._process.stdin is not None  # noqa: S101  for the type checker
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(dict(known)).encode() + b"\n")
            self._process.stdin.flush()
        self._told = dict(known)

    def close(self) -> None:
        """End the reaper; it kills nobody."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            _reapers.discard(self._process.pid)
            self._process = None
            self._told = {}


def reap(parent: int) -> None:
    """What the reaper's process does: read lists of processes, wait for the parent's end, kill the last list.

    Args:
        parent: id of the process that started it, which may be gone by now.
    """
    read, orphaned = b"", False
    while True:  # until nothing is left to read: children of the parent may hold the pipe open, too
        ready, _, _ = select.select([0], [], [], 0 if orphaned else _LOOK_EVERY_S)
        if orphaned and not ready:
            break
        if ready:
            more = os.read(0, 1 << 16)
            if not more:
                break
            read = (read + more)[-(1 << 20) :]
        orphaned = os.getppid() != parent
    complete = read.rpartition(b"\n")[0].rpartition(b"\n")[2]
    known = {int(pid): start for pid, start in json.loads(complete or b"{}").items()}
    table = process_table()
    for pid, start in known.items():
        if pid in table and table[pid][1] == start:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
