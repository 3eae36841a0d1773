"""A run's progress: a live view where there is a terminal, plain lines where there is none, nothing when told so."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO, cast, get_args

from flyte_batch.errors import BadInput
from flyte_batch.monitoring.clock import now
from flyte_batch.progress.figures import Figures, Pace, queues_here
from flyte_batch.progress.terminal import Forgiving, is_terminal
from flyte_batch.progress.texts import line, printable
from flyte_batch.report.run_log import RunLog

if TYPE_CHECKING:
    from flyte_batch.progress.live import LiveView, Moment

ProgressMode = Literal["auto", "live", "plain", "off"]

VARIABLE = "FLYTE_BATCH_PROGRESS"
"""Names the mode where the code does not."""

SECONDS_BETWEEN_LINES = 2.0
MOST_SHARE_FOR_FIGURES = 0.02
"""Of the time of a live view: what engines did is summed up from all their samples."""

_the_terminal = threading.Lock()
"""Held by the run whose view is live: a second one in the same process prints lines, which go above it."""


def check_mode(mode: str | None) -> ProgressMode:
    """The mode that `RunView` would take.

    Raises:
        BadInput: there is no such mode.
    """
    chosen = mode if mode is not None else os.environ.get(VARIABLE) or "auto"
    for each in get_args(ProgressMode):
        if chosen == each:
            return cast(ProgressMode, each)
    name = VARIABLE if mode is None else "progress"
    raise BadInput(f"{name} is {chosen!r}: choose one of {', '.join(get_args(ProgressMode))}")


class RunView:
    """Shows a run while it is entered.

    Args:
        log: of the run; the thread that fills it calls every method here.
        mode: ``live``: a view at the lower end of the terminal that refreshes itself; ``plain``: a line every
            `SECONDS_BETWEEN_LINES` at most, and always the last one; ``off``: nothing; ``auto``: ``live`` where ``out``
            is a terminal that can (``TERM`` is not ``dumb``, and ``CI`` is not set), else ``plain``. By default what
            the environment variable ``FLYTE_BATCH_PROGRESS`` says, else ``auto``.
        out: where to; standard output by default, because Flyte shows a task's standard output as its log.
        clock: gives Unix times in seconds.

    Raises:
        BadInput: there is no such mode.
    """

    def __init__(
        self,
        log: RunLog,
        mode: ProgressMode | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = now,
    ) -> None:
        self._log = log
        self._mode = check_mode(mode)
        self._out = out
        self._clock = clock
        todo, slots = log.plan.rows - log.plan.rows_reused, log.plan.replicas * log.plan.concurrency
        self._pace = Pace(todo, slots, log.started)
        self._figures = Figures.of(log)
        self._figures_due = 0.0
        self._is_stale = False
        self._printed_at, self._printed_rows = clock(), log.rows
        self._live: LiveView | None = None
        self._is_over = False
        self._stopping = threading.Lock()

    def __enter__(self) -> Self:
        out = self._out or sys.stdout
        if self._is_live(out) and _the_terminal.acquire(blocking=False):
            from flyte_batch.progress.live import LiveView

            self._live = LiveView(cast(TextIO, Forgiving(out)), self._moment)
            self._live.start()
            atexit.register(self._stop)  # the run may be on a thread that the interpreter's end does not wait for
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._stop()
        elif self._printed_rows != self._log.rows and not self._is_over:
            self._print_line()

    def say(self, line: str) -> None:
        """Print a line now."""
        if self._live is not None:
            self._live.say(printable(line))
        elif self._mode != "off":
            print(printable(line), file=Forgiving(self._out or sys.stdout), flush=True)

    def refresh(self) -> None:
        """A chunk has ended, and the log knows of it."""
        now = self._clock()
        self._pace.advance(self._log.rows - self._log.plan.rows_reused, now)
        self._is_stale = True
        if self._live is not None or self._mode == "off":
            return
        if self._log.rows >= self._log.plan.rows or now - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def _stop(self) -> None:
        """Leave the last frame of the live view, and give the terminal back; doing it twice is fine."""
        with self._stopping:
            live, self._live = self._live, None
            if live is None:
                return
            with contextlib.suppress(RuntimeError):  # the log grows meanwhile
                self._figures = Figures.of(self._log)
            self._is_stale, self._is_over = False, True
            live.stop()
            atexit.unregister(self._stop)
            _the_terminal.release()

    def _print_line(self) -> None:
        self._printed_at, self._printed_rows = self._clock(), self._log.rows
        self.say(line(Figures.of(self._log), self._pace, self._clock()))

    def _moment(self) -> Moment:
        """What a frame of the live view shows; called on its thread."""
        from flyte_batch.progress.live import Moment

        began = time.perf_counter()
        if self._is_stale and began >= self._figures_due:
            self._is_stale = False
            try:
                self._figures = Figures.of(self._log)
            except RuntimeError:  # the log grew meanwhile
                self._is_stale = True
            self._figures_due = began + (time.perf_counter() - began) / MOST_SHARE_FOR_FIGURES
        return Moment(self._figures, self._pace, self._clock(), queues_here(), self._is_over)

    def _is_live(self, out: TextIO) -> bool:
        if self._mode != "auto":
            return self._mode == "live"
        return is_terminal(out) and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
