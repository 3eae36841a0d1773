"""A view at the end of a terminal that refreshes itself; what is printed meanwhile goes above.

Loads rich: import it only where there is a terminal.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from threading import RLock, Thread, current_thread
from typing import IO, TextIO, TypeVar, cast
from weakref import WeakSet

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

from flyte_batch.progress.terminal import is_terminal

T = TypeVar("T")

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FRAMES = 0.25
WIDEST = 100
PATIENCE_S = 1.0
"""For what is being drawn when its caller is interrupted: a terminal may be stopped, and never take it."""


class LiveView:
    """Shows something until `stop`.

    What this process prints on a terminal meanwhile, log handlers included, is put above the view.

    Args:
        out: the terminal.
        frame: gives what to show on a terminal of so many columns; called on a thread of the view's own.
        leaves_last: whether the last frame stays where it is.
    """

    def __init__(self, out: TextIO, frame: Callable[[int], RenderableType], *, leaves_last: bool) -> None:
        self._draw = frame
        self._frame: RenderableType = ""
        self._error: Exception | None = None
        self._console = Console(file=out, force_terminal=True, force_jupyter=False, markup=False, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=not leaves_last,
            vertical_overflow="crop",
            get_renderable=self._render,
        )
        self._drawer = _Drawer(self._refresh)
        self._above = _Above(self._console, self._drawer)

    def start(self) -> None:
        self._drawer.start()
        self._above.take()
        self._drawer.do(lambda: self._live.start(refresh=True))

    def stop(self) -> None:
        """Draw a last frame, give the terminal back."""
        try:
            self._drawer.do(self._live.stop)
        finally:
            self._drawer.end()
            self._above.give_back()  # not before: the last frame would be drawn over what others write meanwhile
        if self._error is not None:
            logger.warning("the view of the progress failed: it may have shown old figures", exc_info=self._error)

    def say(self, line: str) -> None:
        """Print a line above the view."""
        self._drawer.do(lambda: self._console.print(Text(line)))

    def _refresh(self) -> None:
        try:
            self._live.refresh()
        except Exception as error:
            self._error = error

    def _render(self) -> RenderableType:
        try:
            self._frame = Constrain(self._draw(min(WIDEST, self._console.width)), WIDEST)
        except Exception as error:  # of a view: no reason to lose a run
            self._error = error  # logged at the end: a handler may be waiting for the view to print above it
        return self._frame


class _Drawer(Thread):
    """Draws all that is drawn, one after the other: Ctrl-C breaks off what the main thread does, but not a frame here.

    Args:
        refresh: draws a frame; called every `SECONDS_BETWEEN_FRAMES`.
    """

    def __init__(self, refresh: Callable[[], object]) -> None:
        super().__init__(name="flyte-batch-view", daemon=True)
        self._refresh = refresh
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._giving = RLock()  # a signal's handler, or the garbage collector, may write inside
        self._has_ended = False

    def run(self) -> None:
        due = time.monotonic() + SECONDS_BETWEEN_FRAMES
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                job()
            if time.monotonic() >= due:
                self._refresh()
                due = time.monotonic() + SECONDS_BETWEEN_FRAMES

    def do(self, draw: Callable[[], T]) -> T:
        """Have something drawn, and wait for it; where this is interrupted, what is drawn is not."""
        if current_thread() is self or not self.is_alive():  # not in a forked process
            return draw()
        drawn: futures.Future[T] = futures.Future()

        def job() -> None:
            try:
                drawn.set_result(draw())
            except BaseException as error:
                drawn.set_exception(error)

        with self._giving:
            is_late = self._has_ended
            if not is_late:
                self._jobs.put(job)
        if is_late:
            return draw()
        try:
            futures.wait([drawn])
        except BaseException:
            futures.wait([drawn], PATIENCE_S)
            raise
        return drawn.result()

    def end(self) -> None:
        """Draw what was given, and no more: who still writes does so on its own thread."""
        with self._giving:
            self._has_ended = True
            self._jobs.put(None)


class _AboveProxy(FileProxy):
    """Prints above a live view whatever is written to it."""

    def __init__(self, console: Console, stream: TextIO, drawer: _Drawer) -> None:
        super().__init__(console, stream)
        self._stream = stream
        self._drawer = drawer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Click would write past the view to a stream that has none."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def write(self, text: str) -> int:
        return self._drawer.do(lambda: super(_AboveProxy, self).write(text))

    def flush(self) -> None:
        self._drawer.do(super().flush)

    @property
    def rich_proxied_file(self) -> IO[str]:
        """Not to be had: other consoles, such as those of Flyte's log handlers, would write past the view to it."""
        raise AttributeError("rich_proxied_file")


class _Above:
    """Has what this process writes to terminals printed above a view: ``sys.stdout``, ``sys.stderr``, log handlers."""

    def __init__(self, console: Console, drawer: _Drawer) -> None:
        self._console = console
        self._drawer = drawer
        self._taken: dict[str, tuple[TextIO, TextIO]] = {}

    def take(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if is_terminal(stream):
                proxy = cast(TextIO, _AboveProxy(self._console, stream, self._drawer))
                self._taken[name] = stream, proxy
                setattr(sys, name, proxy)
        for handler in _stream_handlers():
            for stream, proxy in self._taken.values():
                if handler.stream is stream:
                    handler.setStream(proxy)
        _takers.add(self)

    def give_back(self, flush: bool = True) -> None:
        for handler in _stream_handlers():
            for stream, proxy in self._taken.values():
                if handler.stream is proxy and flush:
                    handler.setStream(stream)
                elif handler.stream is proxy:
                    handler.stream = stream
        for name, (stream, proxy) in self._taken.items():
            if getattr(sys, name) is proxy:
                setattr(sys, name, stream)
        self._taken.clear()


_takers: WeakSet[_Above] = WeakSet()


def _in_forked_process() -> None:
    """It has no view, but would print its parent's with its own lines; flushing might wait for a lock of the parent."""
    for each in list(_takers):
        each.give_back(flush=False)


os.register_at_fork(after_in_child=_in_forked_process)


def _stream_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                yield handler
