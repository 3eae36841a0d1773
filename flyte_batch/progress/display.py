"""Where progress is shown: in a live view, by lines, or nowhere."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TextIO, cast, get_args

from flyte_batch.errors import BadInput
from flyte_batch.progress.terminal import Forgiving, is_terminal
from flyte_batch.progress.texts import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flyte_batch.progress.live import LiveView

ProgressMode = Literal["auto", "live", "plain", "off"]

VARIABLE = "FLYTE_BATCH_PROGRESS"
"""Names the mode where the code does not."""

_the_terminal = threading.Lock()
"""Held by the display whose view is live: a second one in the same process prints lines, which go above it."""


def check_mode(mode: str | None) -> ProgressMode:
    """The mode that a `Display` would take.

    Raises:
        BadInput: there is no such mode.
    """
    chosen = mode if mode is not None else os.environ.get(VARIABLE) or "auto"
    for each in get_args(ProgressMode):
        if chosen == each:
            return cast(ProgressMode, each)
    name = VARIABLE if mode is None else "progress"
    raise BadInput(f"{name} is {chosen!r}: choose one of {', '.join(get_args(ProgressMode))}")


class Display:
    """Shows something's progress between `start` and `stop`.

    Args:
        frame: what a live view shows on a terminal of so many columns; called on a thread of the view's own.
        before_last: called before the last frame.
        mode: ``live``: a view at the lower end of the terminal that refreshes itself; ``plain``: lines; ``off``:
            nothing; ``auto``: ``live`` where ``out`` is a terminal that can (``TERM`` is not ``dumb``, and ``CI`` is
            not set), else ``plain``. By default what the environment variable ``FLYTE_BATCH_PROGRESS`` says, else
            ``auto``.
        out: where to; standard output by default.
        leaves_last_frame: of the live view.

    Raises:
        BadInput: there is no such mode.
    """

    def __init__(
        self,
        frame: Callable[[int], RenderableType],
        before_last: Callable[[], object] = lambda: None,
        mode: ProgressMode | None = None,
        out: TextIO | None = None,
        *,
        leaves_last_frame: bool = True,
    ) -> None:
        self._frame = frame
        self._before_last = before_last
        self._mode = check_mode(mode)
        self._out = out
        self._leaves_last_frame = leaves_last_frame
        self._live: LiveView | None = None
        self._stopping = threading.Lock()

    @property
    def is_live(self) -> bool:
        """Whether there is a live view now."""
        return self._live is not None

    @property
    def is_plain(self) -> bool:
        """Whether lines are to be printed now."""
        return self._mode != "off" and self._live is None

    def start(self) -> None:
        """Show the live view, where there is to be one."""
        out = self._out or sys.stdout
        if self._may_be_live(out) and _the_terminal.acquire(blocking=False):
            from flyte_batch.progress.live import LiveView

            self._live = LiveView(cast(TextIO, Forgiving(out)), self._frame, leaves_last=self._leaves_last_frame)
            atexit.register(self.stop)  # the work may be on a thread that the interpreter's end does not wait for
            try:
                self._live.start()
            except BaseException:  # Ctrl-C while the first frame is drawn
                self.stop()
                raise

    def stop(self) -> None:
        """End the live view, and give the terminal back; doing it twice is fine."""
        with self._stopping:
            if self._live is None:
                return
            self._before_last()
            try:
                self._live.stop()
            finally:
                self._live = None
                atexit.unregister(self.stop)
                _the_terminal.release()

    def say(self, line: str) -> None:
        """Print a line now."""
        if self._live is not None:
            self._live.say(printable(line))
        elif self._mode != "off":
            print(printable(line), file=Forgiving(self._out or sys.stdout), flush=True)

    def _may_be_live(self, out: TextIO) -> bool:
        if self._mode != "auto":
            return self._mode == "live"
        return is_terminal(out) and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
