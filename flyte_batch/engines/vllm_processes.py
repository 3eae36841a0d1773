"""The processes that vLLM starts: which they are, that they end, and what they said when they failed.

vLLM computes in a core process and, mostly, in workers below it. Its own shutdown ends the core; a worker can outlive
it, and a core that was killed ends nobody. What keeps a GPU's memory must be gone before the next engine starts.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from flyte_batch.processes import Reaper, process_table

# Names that vLLM gives to the processes it starts itself; workers are found below them.
_ROOTS = ("EngineCore", "VLLM", "DPCoordinator")
_LOOK_EVERY_S = 0.05


class EngineProcesses:
    """Everything that one start of vLLM started, and nothing else; make it before, `look` meanwhile, then `started`.

    A process is known by its id and the moment it started, so that an id that the system gave away again is never
    taken for it. Where there is no ``/proc`` (not Linux) only the core processes are known.
    """

    def __init__(self) -> None:
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._starting = True
        self._roots: dict[int, multiprocessing.process.BaseProcess] = {}
        self._known: dict[int, int] = {}
        self._reaper = Reaper()

    def look(self) -> None:
        """Take note of all that runs below what is known and, until `started`, of core processes that are new."""
        if self._starting:
            for child in multiprocessing.active_children():
                if child.pid is not None and child.pid not in self._before and child.name.startswith(_ROOTS):
                    self._roots.setdefault(child.pid, child)
        table = process_table()
        ours = {pid for pid, started in self._known.items() if pid in table and table[pid][1] == started}
        ours |= {pid for pid, root in self._roots.items() if root.is_alive()}
        newer = ours
        while newer:
            newer = {pid for pid, (parent, _) in table.items() if parent in ours} - ours
            ours |= newer
        running = {pid: table[pid][1] for pid in ours if pid in table}
        self._known.update(running)
        self._reaper.tell(running)

    def started(self) -> None:
        """The start is over, well or not: look once more. Core processes that come later are another engine's."""
        self.look()
        self._starting = False

    @property
    def alive(self) -> list[int]:
        """Ids of those that still run."""
        table = process_table()
        running = {pid for pid, started in self._known.items() if pid in table and table[pid][1] == started}
        return sorted(running | {pid for pid, root in self._roots.items() if root.is_alive()})

    def end(self, grace_s: float) -> list[int]:
        """Wait for them to end by themselves, then tell them to, then kill them; blocks.

        Args:
            grace_s: how long they may take by themselves, and again after SIGTERM.

        Returns:
            Ids of those that had to be killed.
        """
        self.look()
        stubborn: list[int] = []
        if not self._wait(grace_s):
            self._signal(signal.SIGTERM)
            if not self._wait(grace_s):
                stubborn = self.alive
                self._signal(signal.SIGKILL)
                self._wait(grace_s)
        if not self.alive:
            self._reaper.close()
        return stubborn

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_EVERY_S)
        for root in self._roots.values():
            root.join(0)  # or it stays as a zombie
        return True

    def _signal(self, number: int) -> None:
        for pid in self.alive:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it ended in between
                continue


class ErrorFile(logging.Handler):
    """Writes what other processes log as an error to a file, a JSON line each, for whoever started them.

    vLLM's parent process learns that its core failed, not why. This handler is put into the logging configuration that
    its processes read; the process that made the configuration itself does not write.

    Args:
        path: the file; records are dropped once its folder is gone.
        parent: id of the process that reads the file.
    """

    def __init__(self, path: str, parent: int) -> None:
        super().__init__(logging.ERROR)
        self._path = Path(path)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record and its exception."""
        if os.getpid() == self._parent or not self._path.parent.is_dir():
            return
        error = record.exc_info[1] if record.exc_info else None
        line = {
            "message": record.getMessage(),
            "error": type(error).__name__ if error is not None else None,
            "text": str(error) if error is not None else None,
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            self.handleError(record)


def read_errors(path: Path) -> Iterator[str]:
    """What `ErrorFile` wrote, first failure first: ``ValueError: ...``, or the message where there was no exception."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut by the end of its process
            continue
        yield f"{entry['error']}: {entry['text']}" if entry["error"] else entry["message"]
