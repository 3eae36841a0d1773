"""A run's progress as a view at the end of a terminal that refreshes itself; what is printed meanwhile goes above.

Loads rich: import it only where there is a terminal.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TextIO, cast
from weakref import WeakSet

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flyte_batch.progress import texts
from flyte_batch.progress.figures import Figures, Pace, Replica
from flyte_batch.progress.terminal import is_terminal
from flyte_batch.report.formats import number, percent, seconds

logger = logging.getLogger(__name__)

FRAMES_PER_S = 4.0
WIDEST = 100
MOST_REPLICAS = 4


@dataclass(frozen=True, slots=True)
class Moment:
    """What a frame shows.

    Attributes:
        figures: at the end of the last chunk.
        pace: of the run.
        now: seconds, of the pace's clock.
        queues: records that wait, and those on devices, now; None where other processes hold them.
        is_over: whether the run has ended.
    """

    figures: Figures
    pace: Pace
    now: float
    queues: tuple[int, int] | None
    is_over: bool


class LiveView:
    """Shows a run until `stop`, which leaves the last frame where it is.

    What this process prints on a terminal meanwhile, log handlers included, is put above the view.

    Args:
        out: the terminal.
        look: gives what to show; called on a thread of the view's own.
    """

    def __init__(self, out: TextIO, look: Callable[[], Moment]) -> None:
        self._look = look
        self._frame: RenderableType = ""
        self._error: Exception | None = None
        self._console = Console(file=out, force_terminal=True, force_jupyter=False, markup=False, highlight=False)
        self._live = Live(
            console=self._console,
            refresh_per_second=FRAMES_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
            get_renderable=self._render,
        )
        self._above = _Above(self._console)

    def start(self) -> None:
        self._above.take()
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Leave the last frame, give the terminal back."""
        self._above.give_back()
        self._live.stop()
        if self._error is not None:
            logger.warning("the view of the run's progress failed: it may have shown old figures", exc_info=self._error)

    def say(self, line: str) -> None:
        """Print a line above the view."""
        self._console.print(Text(line))

    def _render(self) -> RenderableType:
        try:
            self._frame = Constrain(frame(self._look(), min(WIDEST, self._console.width)), WIDEST)
        except Exception as error:  # of a view: no reason to lose a run
            self._error = error  # logged at the end: a handler may be waiting for the view to print above it
        return self._frame


class _AboveProxy(FileProxy):
    """Prints above a live view whatever is written to it."""

    @property
    def rich_proxied_file(self) -> IO[str]:
        """Not to be had: other consoles, such as those of Flyte's log handlers, would write past the view to it."""
        raise AttributeError("rich_proxied_file")


class _Above:
    """Has what this process writes to terminals printed above a view: ``sys.stdout``, ``sys.stderr``, log handlers."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._taken: dict[str, tuple[TextIO, TextIO]] = {}

    def take(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if is_terminal(stream):
                proxy = cast(TextIO, _AboveProxy(self._console, stream))
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


def frame(moment: Moment, width: int) -> RenderableType:
    """The view, for a terminal of so many columns."""
    figures, pace, now = moment.figures, moment.pace, moment.now
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("rows", _bar(figures, width))
    grid.add_row("speed", _speed(figures, pace, now))
    grid.add_row("time", _time(moment))
    if figures.shares.total > 0:
        where = texts.idle(figures.shares)
        grid.add_row("devices", f"busy {percent(figures.shares.utilization)}" + (f"; {where}" if where else ""))
    if not moment.is_over and (moment.queues is not None or figures.replicas):
        queued, running = moment.queues or (figures.queued, figures.running)
        grid.add_row("queue", f"{queued:,} waiting, {running:,} on the devices")
    grid.add_row("failures", Text(texts.failures(figures), style="red" if figures.failures else ""))
    if figures.chunks_failed:
        grid.add_row("chunks", Text(f"{figures.chunks_failed:,} calls failed", style="red"))
    if figures.engine_deaths:
        grid.add_row("engines", Text(f"{figures.engine_deaths:,} died", style="red"))
    if not figures.replicas:
        return grid
    return Group(grid, _replicas(figures.replicas, width))


def _bar(figures: Figures, width: int) -> RenderableType:
    text = texts.rows(figures)
    row = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(max(1, figures.total), figures.done, width=min(40, width - len(text) - 13))
    row.add_row(bar, text)
    return row if width - len(text) >= 20 else Text(text)


def _speed(figures: Figures, pace: Pace, now: float) -> str:
    recent, elapsed = pace.recent_rate(now), pace.elapsed(now)
    if not pace.rate(now):
        return "no chunk has ended yet"
    text = f"{number(pace.rate(now))} rows/s"
    if recent is not None:
        text += f" (lately {number(recent)})"
    if figures.tokens and elapsed > 0:
        text += f", {number(figures.tokens / elapsed)} tokens/s"
    return text


def _time(moment: Moment) -> str:
    elapsed = timedelta(seconds=int(moment.pace.elapsed(moment.now)))
    if moment.is_over:
        return f"{elapsed}, {'stopped' if moment.figures.outcome == 'running' else moment.figures.outcome}"
    left = moment.pace.left(moment.now)
    return f"{elapsed}, " + ("time left not known yet" if left is None else f"about {seconds(left)} left")


def _replicas(replicas: Sequence[Replica], width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for each in replicas[:MOST_REPLICAS]:
        name = texts.printable(f"{each.engine} {each.name}")
        name = name if len(name) <= width - 30 else ".." + name[32 - width :]  # what tells pods apart is at the end
        grid.add_row(f"{number(each.rows_per_s)} rows/s", f"busy {percent(each.utilization)}", Text(name))
    more = len(replicas) - MOST_REPLICAS
    lines: list[RenderableType] = [Text("replicas", style="bold"), grid, *([f"and {more:,} more"] if more > 0 else [])]
    return Group(*lines)
