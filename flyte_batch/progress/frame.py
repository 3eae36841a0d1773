"""What the live view of a run shows.

Loads rich: import it only where there is a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flyte_batch.progress import texts
from flyte_batch.progress.figures import Figures, Pace, Replica
from flyte_batch.report.answer import utilization
from flyte_batch.report.formats import number, seconds

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
        grid.add_row("devices", f"busy {utilization(figures.shares)}" + (f"; {where}" if where else ""))
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
        return f"{elapsed}, {texts.ending(moment.figures)}"
    left = moment.pace.left(moment.now)
    return f"{elapsed}, " + ("time left not known yet" if left is None else f"about {seconds(left)} left")


def _replicas(replicas: Sequence[Replica], width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for each in replicas[:MOST_REPLICAS]:
        name = texts.printable(f"{each.engine} {each.name}")
        name = name if len(name) <= width - 30 else ".." + name[32 - width :]  # what tells pods apart is at the end
        grid.add_row(f"{number(each.rows_per_s)} rows/s", f"busy {utilization(each.shares)}", Text(name))
    more = len(replicas) - MOST_REPLICAS
    lines: list[RenderableType] = [Text("replicas", style="bold"), grid, *([f"and {more:,} more"] if more > 0 else [])]
    return Group(*lines)
