"""A run's progress as lines of text: what a terminal, a Flyte log and a CI log can all show."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Progress:
    """Prints at most one line every ``every_s`` seconds, and always the last one.

    Attributes:
        total: rows of the run.
        done: rows already finished before this run began (a resumed run); they do not count for the speed.
        out: where to; standard output by default, because Flyte shows a task's standard output as its log.
    """

    total: int
    done: int = 0
    every_s: float = 2.0
    out: TextIO | None = None
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    _reused: int = field(init=False)
    _started: float = field(init=False)
    _printed: float = field(init=False)

    def __post_init__(self) -> None:
        self._reused = self.done
        self._started = self._printed = self.clock()

    def say(self, line: str) -> None:
        """Print a line now."""
        with contextlib.suppress(OSError, ValueError):  # a closed terminal is no reason to lose a run
            print(line, file=self.out or sys.stdout, flush=True)

    def advance(self, rows: int, failures: int) -> None:
        """Count a finished chunk."""
        self.done += rows
        self.failures += failures
        if self.done >= self.total or self.clock() - self._printed >= self.every_s:
            self._printed = self.clock()
            self.say(self.line())

    def line(self) -> str:
        """``1,200/5,000 rows (24%), 512 rows/s, 7 s left, 0 failed``."""
        elapsed = self.clock() - self._started
        rate = (self.done - self._reused) / elapsed if elapsed > 0 else 0.0
        # What the first chunks took holds the model's load, and says little about the others.
        known = rate > 0 and self.done - self._reused >= (self.total - self._reused) / 5
        left = f"{(self.total - self.done) / rate:,.0f} s left" if known else "starting"
        share = 100 * self.done // max(1, self.total)
        return f"{self.done:,}/{self.total:,} rows ({share}%), {rate:,.0f} rows/s, {left}, {self.failures:,} failed"
