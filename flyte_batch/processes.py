"""The processes of this machine, as ``/proc`` shows them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


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

    Returns:
        Their ids.
    """
    killed: set[int] = set()
    while below := _below(pid) - killed:  # until none is left: one may have started another meanwhile
        for each in below:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        killed |= below
    return sorted(killed)


def _below(pid: int) -> set[int]:
    table = process_table()
    found: set[int] = set()
    newer = {pid}
    while newer:
        newer = {each for each, (parent, _) in table.items() if parent in newer} - found
        found |= newer
    return found
