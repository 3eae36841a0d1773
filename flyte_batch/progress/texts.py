"""Figures as people read them."""

from __future__ import annotations

from dataclasses import asdict

from flyte_batch.progress.figures import Figures, Pace
from flyte_batch.report.run_log import TimeShares

MOST_CAUSES = 3


def line(figures: Figures, pace: Pace, now: float) -> str:
    """``1,200/5,000 rows (24%), 512 rows/s, 7 s left, 0 failed, 9,120 tokens/s, device busy 91%``."""
    left = pace.left(now)
    parts = [
        rows(figures),
        f"{rate(pace.rate(now))} rows/s",
        "starting" if left is None else f"{duration(left)} left",
        failures(figures),
    ]
    if figures.tokens and pace.elapsed(now) > 0:
        parts.append(f"{rate(figures.tokens / pace.elapsed(now))} tokens/s")
    if figures.shares.total > 0:
        parts.append(f"device busy {figures.shares.utilization:.0%}")
    return ", ".join(parts)


def rows(figures: Figures) -> str:
    """``1,200/5,000 rows (24%)``."""
    return f"{figures.done:,}/{figures.total:,} rows ({100 * figures.done // max(1, figures.total)}%)"


def failures(figures: Figures) -> str:
    """``12 failed (BadRecord 10, QueueFull 2)``."""
    text = f"{figures.failures:,} failed"
    if not figures.causes:
        return text
    causes = [f"{printable(cause)} {number:,}" for cause, number in figures.causes[:MOST_CAUSES]]
    if len(figures.causes) > MOST_CAUSES:
        causes.append(f"{len(figures.causes) - MOST_CAUSES} more causes")
    return f"{text} ({', '.join(causes)})"


def idle(shares: TimeShares) -> str:
    """``starved 10%, loading 6%``: where the devices' time went that they were not at work."""
    parts = {name: seconds / shares.total for name, seconds in asdict(shares).items() if name != "busy"}
    told = sorted((item for item in parts.items() if item[1] >= 0.005), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in told)


def rate(value: float) -> str:
    """A number a second: ``512``, ``3.1``."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """``7 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def printable(text: str) -> str:
    """A text that moves no cursor and rings no bell: what can't be printed is escaped, newlines and tabs apart."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )
