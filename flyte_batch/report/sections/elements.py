"""What sections are made of: tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flyte_batch.report.formats import seconds

MOST_ROWS = 200
"""Of a table; a run's chunks and stalls can be thousands."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others are aligned as numbers unless they are in ``texts``."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    texts: frozenset[int] = frozenset()
    left_out: int = 0


@dataclass(frozen=True)
class Chart:
    """A drawing with its axes; ``marks`` below it are (percent of the width, label, whether narrow screens show it)."""

    title: str
    note: str
    drawing: Markup
    top: str
    marks: Sequence[tuple[float, str, bool]]


def bounded_table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Markup]],
    texts: Iterable[int] = (),
) -> Table:
    """A table of a number of rows that has no bound of its own."""
    return Table(caption, headings, rows[:MOST_ROWS], frozenset(texts), max(0, len(rows) - MOST_ROWS))


def time_marks(at: Sequence[float]) -> list[tuple[float, str, bool]]:
    length = at[-1] - at[0] if at else 0.0
    return [(0.0, "0 s", True), (50.0, seconds(length / 2), False), (100.0, seconds(length), True)]
