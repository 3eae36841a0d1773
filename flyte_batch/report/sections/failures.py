"""Rows that got no response."""

from __future__ import annotations

from flyte_batch.report.formats import count, percent
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Table


def causes(log: RunLog) -> Table | None:
    if not log.causes:
        return None
    rows = [
        [cause, count(failed), percent(failed / log.rows) if log.rows else "–"] for cause, failed in log.causes.items()
    ]
    return Table("Failed rows by cause", ("Cause", "Rows", "Of all rows"), rows)


def examples(log: RunLog) -> Table | None:
    if not log.examples:
        return None
    # Tracebacks and bodies of answers have many lines, and would be most of the page.
    rows = [[count(each.row), each.cause, " ".join(each.message.split())] for each in log.examples]
    return Table("Failed rows of this run, for example", ("Row", "Cause", "Message"), rows, frozenset({1, 2}))
