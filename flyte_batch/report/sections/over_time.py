"""Replicas over time, all together and each of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flyte_batch.report import charts
from flyte_batch.report.advice import mean_fill
from flyte_batch.report.answer import utilization
from flyte_batch.report.formats import count, number, percent, plural, said, seconds
from flyte_batch.report.run_log import EngineLog, TimeShares
from flyte_batch.report.sections.elements import Chart, Table, bounded_table, time_marks
from flyte_batch.report.sections.shares import KINDS, kinds
from flyte_batch.report.timelines import Slice, timeline

MANY_REPLICAS = 8
"""With more, only the least and the most utilised are drawn."""
OF_MANY = 3


@dataclass(frozen=True)
class Replica:
    """One process over time."""

    name: str
    note: str
    charts: Sequence[Chart]
    table: Table


def drawn(process_shares: Mapping[str, TimeShares]) -> list[str]:
    """The processes to draw: all, or the least and the most utilised."""
    if len(process_shares) <= MANY_REPLICAS:
        return list(process_shares)
    ranked = sorted(process_shares, key=lambda process: process_shares[process].utilization)
    return [*ranked[:OF_MANY], *ranked[-OF_MANY:]]


def overview_charts(
    slices: Sequence[Slice], tokens: Sequence[float], at: Sequence[float], shares: TimeShares
) -> list[Chart]:
    """All replicas together; ``tokens`` a second in each slice."""
    if not slices or not any(each.replicas for each in slices):
        return []
    whose = "all replicas"
    mean = utilization(shares)
    return [
        _steps("fb-all-u", "Utilisation", whose, [each.utilization for each in slices], at, percent, 1.0, mean),
        _steps("fb-all-r", "Rows/s answered", whose, [each.rows_per_s for each in slices], at, number),
        _steps("fb-all-t", "Tokens/s", whose, tokens, at, number),
        _steps("fb-all-n", "Replicas at work", whose, [each.replicas for each in slices], at, number),
    ]


def replica(index: int, process: str, engines: Sequence[EngineLog], shares: TimeShares, at: Sequence[float]) -> Replica:
    slices = timeline(engines, at)
    ident = f"fb-r{index}"
    lives = plural(len(engines), "engine")
    mean, fill = utilization(shares), mean_fill(engines)
    rows = plural(sum(engine.rows for engine in engines), "row")
    return Replica(
        name=process,
        note=f"{rows}, busy {utilization(shares)} of {seconds(shares.total)}, {lives}",
        charts=[
            _steps(f"{ident}-u", "Utilisation", process, [each.utilization for each in slices], at, percent, 1.0, mean),
            _steps(f"{ident}-t", "Rows/s answered", process, [each.rows_per_s for each in slices], at, number),
            _steps(f"{ident}-q", "Queue, records", process, [each.queued for each in slices], at, number),
            _steps(
                f"{ident}-f",
                "Batch fill",
                process,
                [each.fill for each in slices],
                at,
                percent,
                1.0,
                "" if fill is None else percent(fill),
            ),
        ],
        table=slices_table(f"Replica {process} over time", slices, at, None),
    )


def _steps(
    ident: str,
    name: str,
    whose: str,
    values: Sequence[float | None],
    at: Sequence[float],
    say: Callable[[float], str],
    top: float | None = None,
    mean: str = "",
) -> Chart:
    """A line over the slices; ``mean`` is said of it where the mean of the slices would not be that of the run."""
    known = [value for value in values if value is not None]
    end = top if top is not None else charts.nice_top(known)
    mean = mean or (say(statistics.fmean(known)) if known else "")
    told = f"From {say(min(known))} to {say(max(known))}, mean {mean}." if known else "Nothing was measured."
    drawing = charts.steps(values, end, ident=ident, title=f"{name}, {whose}", description=told)
    note = f"mean {mean}" if known else "none"
    return Chart(name, note, drawing, say(end), time_marks(at))


def slices_table(caption: str, slices: Sequence[Slice], at: Sequence[float], tokens: Sequence[float] | None) -> Table:
    """The numbers of the charts; with ``tokens``, those of all replicas together."""
    rows = [
        [
            f"{number(each.start - at[0])} s",
            said(each.utilization, percent),
            said(each.rows_per_s, number),
            *([number(tokens[index]), count(each.replicas)] if tokens is not None else []),
            said(each.queued, number),
            said(each.fill, percent),
        ]
        for index, each in enumerate(slices)
    ]
    more = ("Tokens/s", "Replicas") if tokens is not None else ()
    return Table(caption, ("From", "Utilisation", "Rows/s answered", *more, "Queue", "Batch fill"), rows)


def replicas_table(
    by_process: Mapping[str, Sequence[EngineLog]], process_shares: Mapping[str, TimeShares]
) -> Table | None:
    if not by_process:
        return None
    rows = []
    for process in sorted(by_process, key=lambda each: process_shares[each].utilization):
        engines, shares = by_process[process], process_shares[process]
        rows.append(
            [
                process,
                ", ".join(dict.fromkeys(engine.engine for engine in engines)),
                count(sum(engine.rows for engine in engines)),
                count(sum(engine.tokens for engine in engines)),
                utilization(shares),
                *(seconds(value) for _, value in kinds(shares)),
            ]
        )
    headings = ("Replica", "Engine", "Rows", "Tokens", "Utilisation", *KINDS)
    return bounded_table("Replicas, the least utilised first", headings, rows, {1})
