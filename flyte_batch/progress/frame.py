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
NARROW = 40
"""Columns; with fewer there is no room for labels beside what they name."""
SHORTEST_NAME = 12
"""Characters of a replica's name that are worth a place beside its figures."""


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
    """The view, for a terminal of so many columns; lines that are too long for it are broken between words."""
    rows, facts, replicas = texts.rows(moment.figures), _facts(moment), moment.figures.replicas
    lines: list[RenderableType] = []
    if width < NARROW:
        facts.insert(0, ("rows", Text(rows.replace("/", " of "))))
        lines += [Text.assemble((label, "bold"), " ", text) for label, text in facts]
    else:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("rows", _bar(moment.figures, rows, width))
        for label, text in facts:
            grid.add_row(label, text)
        lines.append(grid)
    return Group(*lines, *([_replicas(replicas, width)] if replicas else []))


def _facts(moment: Moment) -> list[tuple[str, Text]]:
    """What the view says below the rows, each line with its label."""
    figures, pace, now = moment.figures, moment.pace, moment.now
    facts = [("speed", Text(_speed(figures, pace, now))), ("time", Text(_time(moment)))]
    if figures.shares.total > 0:
        where = texts.idle(figures.shares)
        facts.append(("devices", Text(f"busy {utilization(figures.shares)}" + (f"; {where}" if where else ""))))
    if not moment.is_over and (moment.queues is not None or figures.replicas):
        queued, running = moment.queues or (figures.queued, figures.running)
        facts.append(("queue", Text(f"{queued:,} waiting, {running:,} on the devices")))
    facts.append(("failures", Text(texts.failures(figures), style="red" if figures.failures else "")))
    if figures.chunks_failed:
        facts.append(("chunks", Text(f"{figures.chunks_failed:,} calls failed", style="red")))
    if figures.engine_deaths:
        facts.append(("engines", Text(f"{figures.engine_deaths:,} died", style="red")))
    return facts


def _bar(figures: Figures, text: str, width: int) -> RenderableType:
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
    shown = [
        (f"{number(each.rows_per_s)} rows/s", f"busy {utilization(each.shares)}", f"{each.engine} {each.name}")
        for each in replicas[:MOST_REPLICAS]
    ]
    room = width - max(len(rate) for rate, _, _ in shown) - max(len(busy) for _, busy, _ in shown) - 4
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    lines: list[RenderableType] = [Text("replicas", style="bold")]
    if room >= SHORTEST_NAME:
        for rate, busy, name in shown:
            grid.add_row(rate, busy, Text(_end(name, room)))
        lines.append(grid)
    else:
        lines += [Text(f"{rate}, {busy}\n{_end(name, width)}") for rate, busy, name in shown]
    more = len(replicas) - MOST_REPLICAS
    return Group(*lines, *([f"and {more:,} more"] if more > 0 else []))


def _end(name: str, characters: int) -> str:
    """At most so many of its characters, the last ones: what tells pods apart is at the end."""
    name = texts.printable(name)
    return name if len(name) <= characters else ".." + name[2 - characters :]
