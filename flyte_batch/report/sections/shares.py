"""Where the time of engines went."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from flyte_batch.report import charts
from flyte_batch.report.advice import doubts
from flyte_batch.report.answer import knows_times
from flyte_batch.report.formats import percent, seconds
from flyte_batch.report.run_log import RunLog, TimeShares
from flyte_batch.report.sections.elements import Chart, Table

KINDS: Mapping[str, str] = {
    "busy": "the device was at work",
    "loading": "from a replica's first chunk until it had an engine",
    "starved": "the device was free, and no records waited",
    "assembling": "the device was free, and records waited for more to fill a batch",
    "blocked": "the device was free, and the event loop was held up",
    "tail": "a replica's last chunk was done, and the run went on elsewhere or was being committed",
}


def kinds(shares: TimeShares) -> list[tuple[str, float]]:
    """(One of `KINDS`, seconds)."""
    return [(kind, getattr(shares, kind)) for kind in KINDS]


def shares_chart(shares: TimeShares) -> Chart | None:
    if shares.total <= 0:
        return None
    parts = kinds(shares)
    told = ", ".join(f"{kind} {percent(value / shares.total)}" for kind, value in parts if value > 0)
    drawing = charts.stacked(
        parts,
        ident="fb-shares",
        title="Where the seconds of all engines went",
        description=f"One bar, from left to right: {told}.",
    )
    marks, left = [], 0.0
    for kind, value in parts:
        share = value / shares.total
        if share >= 0.08:
            marks.append((100 * left, f"{kind} {percent(share)}", share >= 0.25))
        left += share
    return Chart("", "", drawing, "", marks)


def shares_table(shares: TimeShares) -> Table | None:
    if shares.total <= 0:
        return None
    told = {**KINDS, "busy": f"{KINDS['busy']}; {doubts(shares)}"} if shares.is_upper_bound else KINDS
    rows: list[list[str | Markup]] = [
        [_swatch(kind), seconds(value), percent(value / shares.total), told[kind]] for kind, value in kinds(shares)
    ]
    rows.append(["together", seconds(shares.total), "100%", "all engines, each from its first chunk to the run's end"])
    return Table("Where the time went", ("Part", "Seconds", "Share", "What it is"), rows, frozenset({3}))


def _swatch(kind: str) -> Markup:
    return Markup('<span class="fb-kind"><span class="fb-swatch fb-{}" aria-hidden="true"></span>{}</span>').format(
        kind, kind
    )


def before_first(log: RunLog) -> str:
    if not log.engines or not knows_times(log):
        return ""
    first = min(engine.started for engine in log.engines.values())
    return (
        f"Before the first replica began, {seconds(max(0.0, first - log.started))} went by: opening the source, "
        "planning, waiting for a replica. They are not in the bar."
    )
