"""A thread that looks after a process while it infers: does its event loop turn, and is anybody there to hear of it?

One call that blocks the event loop stops all calls of its replica, and nobody outside sees it: the bridge's heartbeats
go on. So the guard looks from within: it asks the loop for a sign of life four times a second.

- No sign for a second: a warning that names the code which holds the loop, from the loop's own stack.
- In a replica, no sign for its ``stall_limit_s``: the process kills what it started and ends. The bridge then ends too,
  a new container takes the place, and Flyte's retries do the lost calls again.
- In a replica whose bridge is gone (it was terminated, and is not the container's first process): the same, at once.
  Nothing that it computes can be reported any more, and it would keep the GPU.
- However a replica ends, by itself or killed, a `Reaper` kills what it started: what a load started from before the
  loaded value is first used, anything else from some second after its start.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flyte_batch.monitoring.events import LoopBlocked
from flyte_batch.monitoring.hooks import emit
from flyte_batch.processes import Reaper, below, kill_below
from flyte_batch.replica import ReplicaSettings, this_replica

WARN_AFTER_S = 1.0
LOOK_EVERY_S = 0.25
NOTE_EVERY_S = 1.0
EXIT_CODE = 70
"""sysexits.h: an internal software error."""

logger = logging.getLogger(__name__)

_guards: dict[asyncio.AbstractEventLoop, Guard] = {}

_LIBRARIES = tuple(
    spelling
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
    for spelling in (f"{path}/", f"{Path(path).resolve()}/")
)


def watch() -> Guard:
    """Guard the running event loop, from its thread; the second call for a loop gives the guard it has."""
    loop = asyncio.get_running_loop()
    for closed in [known for known in _guards if known.is_closed()]:
        del _guards[closed]
    if loop not in _guards:
        _guards[loop] = Guard(loop, this_replica())
    return _guards[loop]


class Guard:
    """Guards one event loop until it is closed. Made by `watch`.

    Args:
        loop: the running loop of this thread.
        replica: the replica that this process is; without one the guard only warns.

    Attributes:
        thread: where it looks; ends with the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, replica: ReplicaSettings | None) -> None:
        self._loop = loop
        self._replica = replica
        self._parent = os.getppid()
        self._loop_thread = threading.get_ident()
        self._alive = threading.Event()
        self._named: set[str] = set()
        self._reaper = Reaper()
        self._telling = threading.Lock()
        self._noted_at = -math.inf
        self._has_warned = False
        self._ending = False
        self.thread = threading.Thread(target=self._look, name="flyte-batch-guard", daemon=True)
        self.thread.start()

    def note_processes(self) -> None:
        """In a replica, have all processes that it has started so far killed at its end, however it comes."""
        if self._replica is None:
            return
        with self._telling:
            try:
                self._reaper.tell(below(os.getpid()))
            except OSError:  # no room for one more process: what is there goes on
                if not self._has_warned:
                    logger.warning("what this replica started may outlive it", exc_info=True)
                self._has_warned = True

    def end_replica_soon(self, why: str, grace_s: float = 2.0) -> None:
        """End this process if it is a replica, once its calls had time to say how they failed.

        Args:
            why: for the log.
            grace_s: seconds until then.
        """
        if self._replica is not None and not self._ending:
            self._ending = True
            logger.critical("%s: this replica ends itself in %g s, so that a sound one takes its place", why, grace_s)
            threading.Timer(grace_s, _end).start()

    def _look(self) -> None:
        while self._ask():
            stands_s, looked, culprit = 0.0, time.monotonic(), ""
            while not self._alive.wait(LOOK_EVERY_S):
                if self._loop.is_closed():
                    return
                now = time.monotonic()
                if self._loop.is_running():  # an asyncio.Runner's rests between two calls
                    # Where the whole process was stopped, this thread was too: that is nobody's fault.
                    stands_s += min(now - looked, 2 * LOOK_EVERY_S)
                looked = now
                if stands_s > WARN_AFTER_S and not culprit:
                    culprit = self._warn(stands_s)
                self._require_sense(stands_s)
            if culprit:
                logger.warning("%s let the event loop go after %.1f s", culprit, stands_s)
                emit(LoopBlocked(time.time(), stands_s, culprit))
            self._require_sense(0)
            time.sleep(LOOK_EVERY_S)

    def _ask(self) -> bool:
        """Ask the loop for a sign of life; False if it is closed."""
        self._alive.clear()
        try:
            self._loop.call_soon_threadsafe(self._alive.set)
        except RuntimeError:
            return False
        return True

    def _warn(self, stands_s: float) -> str:
        """Say who holds the loop; once for each function, or a log would hold little else."""
        culprit, line = self._culprit()
        if culprit not in self._named:
            self._named.add(culprit)
            logger.warning(
                "the event loop has stood still for %.1f s in %s, line %d: every call of this process waits. Run what "
                "blocks on a thread (await asyncio.to_thread(...)), or use a library's async functions",
                stands_s,
                culprit,
                line,
            )
        return culprit

    def _culprit(self) -> tuple[str, int]:
        frame = sys._current_frames().get(self._loop_thread)
        return whose(frame) if frame is not None else ("a thread that is gone", 0)

    def _require_sense(self, stands_s: float) -> None:
        """End the replica if nothing can come of it any more, and see to it that its end is that of its processes."""
        if self._replica is None:
            return
        if time.monotonic() - self._noted_at > NOTE_EVERY_S:
            self._noted_at = time.monotonic()
            self.note_processes()
        if os.getppid() != self._parent:
            _end("the process that started this replica is gone, and nobody hears of its calls any more")
        if stands_s > self._replica.stall_limit_s:
            culprit, line = self._culprit()
            _end(f"the event loop has stood still for {stands_s:.0f} s in {culprit}, line {line}")


def whose(frame: FrameType) -> tuple[str, int]:
    """``infer (workflows/generate.py)`` and the line: the innermost code that is neither Python's nor a package's."""
    own: FrameType | None = frame
    while own is not None and own.f_code.co_filename.startswith((*_LIBRARIES, "<")):
        own = own.f_back
    named = own or frame
    path = Path(named.f_code.co_filename)
    return f"{named.f_code.co_qualname} ({path.parent.name}/{path.name})", named.f_lineno


def _end(why: str = "") -> NoReturn:
    """Kill every process below this one, and end it; nothing that Python or a library does at exit may stop that.

    What its reapers know, an engine's processes that lost their parent, they kill once it is gone.
    """
    if why:
        logger.critical("%s: this replica ends itself, so that a sound one takes its place", why)
    kill_below(os.getpid())
    os._exit(EXIT_CODE)
