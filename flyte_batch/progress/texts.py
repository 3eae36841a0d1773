"""Figures as people read them."""

from __future__ import annotations

from dataclasses import asdict

from flyte_batch.progress.figures import Figures, Pace
from flyte_batch.report.answer import utilization
from flyte_batch.report.formats import number, percent, seconds
from flyte_batch.report.run_log import TimeShares

MOST_CAUSES = 3


def line(figures: Figures, pace: Pace, now: float, *, is_over: bool) -> str:
    """``1,200/5,000 rows (24%), 512 rows/s, 7 s left, 0 failed, 9,120 tokens/s, device busy 91%``; see `rows`.

    Of a run that is over, and did not come through, `ending` stands in place of the time left.
    """
    left = pace.left(now)
    later = "time left not known yet" if left is None else f"{seconds(left)} left"
    parts = [
        rows(figures),
        f"{number(pace.rate(now))} rows/s",
        ending(figures) if is_over else later,
        failures(figures),
    ]
    if figures.done >= figures.total:
        del parts[2]
    if figures.tokens and pace.elapsed(now) > 0:
        parts.append(f"{number(figures.tokens / pace.elapsed(now))} tokens/s")
    if figures.shares.total > 0:
        parts.append(f"device busy {utilization(figures.shares)}")
    return ", ".join(parts)


def ending(figures: Figures) -> str:
    """How a run that is over ended: ``done``, ``failed``, ``cancelled``; ``stopped`` where nobody told."""
    return "stopped" if figures.outcome == "running" else figures.outcome


def rows(figures: Figures) -> str:
    """``1,200/5,000 rows (24%), 300 by earlier runs``."""
    text = f"{figures.done:,}/{figures.total:,} rows ({percent(figures.done / max(1, figures.total))})"
    return text + by_earlier_runs(figures.done, figures.reused)


def by_earlier_runs(rows: int, reused: int) -> str:
    """``, 300 by earlier runs``: what follows the number of rows where not all of them are this run's."""
    return f", {'all' if reused == rows else f'{reused:,}'} by earlier runs" if reused else ""


def failures(figures: Figures) -> str:
    """``12 failed (BadRecord 10, QueueFull 2)``."""
    text = f"{figures.failures:,} failed"
    if not figures.causes:
        return text
    causes = [f"{printable(cause)} {failed:,}" for cause, failed in figures.causes[:MOST_CAUSES]]
    if len(figures.causes) > MOST_CAUSES:
        causes.append(f"{len(figures.causes) - MOST_CAUSES} more causes")
    return f"{text} ({', '.join(causes)})"


def idle(shares: TimeShares) -> str:
    """``starved 10%, loading 6%``: where the devices' time went that they were not at work."""
    parts = {name: part / shares.total for name, part in asdict(shares).items() if name != "busy"}
    told = sorted((item for item in parts.items() if item[1] >= 0.005), key=lambda item: -item[1])
    return ", ".join(f"{name} {percent(share)}" for name, share in told)


def printable(text: str) -> str:
    """A text that moves no cursor and rings no bell: what can't be printed is escaped, newlines and tabs apart."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )
