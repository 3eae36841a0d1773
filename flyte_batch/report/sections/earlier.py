"""The runs over an output before its last."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from markupsafe import Markup

from flyte_batch.report.answer import elapsed, knows_times, status, utilization
from flyte_batch.report.formats import count, cut, moment
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Table


def earlier_runs(logs: Sequence[RunLog]) -> Table | None:
    """Of all but the last."""
    rows: list[list[str | Markup]] = [
        [
            moment(log.started),
            status(log),
            elapsed(log),
            count(_left_by(log, later)),
            utilization(log.time_shares()) if log.engines else "–",
            cut(log.error, 300) or "–",
        ]
        for log, later in itertools.pairwise(logs)
        if knows_times(log)
    ]
    headings = ("Began", "Outcome", "Took", "Rows done", "Utilisation", "Error")
    return Table("Earlier runs over this output", headings, rows, frozenset({1, 5})) if rows else None


def _left_by(log: RunLog, later: RunLog) -> int:
    """Rows that a run did; where it was broken off, those that the next run found, of which its log may not know."""
    found = later.plan.rows_reused - log.plan.rows_reused if log.outcome == "unfinished" else 0
    return max(log.rows_done, found)
