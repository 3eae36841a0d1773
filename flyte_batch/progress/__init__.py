"""A run's progress: a live view where there is a terminal, plain lines where there is none, nothing when told so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from flyte_batch.monitoring.clock import now
from flyte_batch.progress.display import VARIABLE, Display, ProgressMode, check_mode
from flyte_batch.progress.figures import Figures, Pace, queues_here
from flyte_batch.progress.texts import line
from flyte_batch.report.run_log import RunLog

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["VARIABLE", "ProgressMode", "RunView", "check_mode"]

SECONDS_BETWEEN_LINES = 2.0
MOST_SHARE_FOR_FIGURES = 0.02
"""Of the time of a live view: what engines did is summed up from all their samples."""


class RunView:
    """Shows a run while it is entered: in a live view, or by a line every `SECONDS_BETWEEN_LINES` at most, and always
    the last one.

    Args:
        log: of the run; the thread that fills it calls every method here.
        mode: as for `Display`.
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
        self._display = Display(self._frame, self._before_last, mode, out)
        self._clock = clock
        todo, slots = log.plan.rows - log.plan.rows_reused, log.plan.replicas * log.plan.concurrency
        self._pace = Pace(todo, slots, log.started)
        self._figures = Figures.of(log)
        self._figures_due = 0.0
        self._is_stale = False
        self._printed_at, self._printed_rows = clock(), log.rows
        self._has_told_left = False
        self._is_over = False

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.stop()
        if (self._printed_rows != self._log.rows or self._has_told_left) and not self._is_over:
            self._print_line(is_over=True)

    def say(self, line: str) -> None:
        """Print a line now."""
        self._display.say(line)

    def refresh(self) -> None:
        """A chunk has ended, and the log knows of it."""
        now = self._clock()
        self._pace.advance(self._log.rows - self._log.plan.rows_reused, now)
        self._is_stale = True
        is_last = self._log.rows >= self._log.plan.rows
        if self._display.is_plain and (is_last or now - self._printed_at >= SECONDS_BETWEEN_LINES):
            self._print_line()

    def _print_line(self, *, is_over: bool = False) -> None:
        self._printed_at, self._printed_rows = self._clock(), self._log.rows
        self._has_told_left = self._log.rows < self._log.plan.rows
        self.say(line(Figures.of(self._log), self._pace, self._clock(), is_over=is_over))

    def _before_last(self) -> None:
        """The live view draws its last frame next."""
        with contextlib.suppress(RuntimeError):  # the log grows meanwhile
            self._figures = Figures.of(self._log)
        self._is_stale, self._is_over = False, True

    def _frame(self, width: int) -> RenderableType:
        """Of the live view; called on its thread."""
        from flyte_batch.progress.frame import Moment, frame

        began = time.perf_counter()
        if self._is_stale and began >= self._figures_due:
            self._is_stale = False
            try:
                self._figures = Figures.of(self._log)
            except RuntimeError:  # the log grew meanwhile
                self._is_stale = True
            self._figures_due = began + (time.perf_counter() - began) / MOST_SHARE_FOR_FIGURES
        return frame(Moment(self._figures, self._pace, self._clock(), queues_here(), self._is_over), width)
