"""What is promised to interactive callers, and whether a number of requests shows that it is kept.

Pure arithmetic. Every objective is of one kind: that less than a share of the requests breaks a rule. "p99 below 2 s"
is that less than 1% take 2 s or more. So one exact test, the binomial one, says of each whether so many requests show
it. It takes requests for independent; those that share a batch are not, which makes it somewhat too confident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flyte_batch.batching.checks import finite_number
from flyte_batch.errors import BadInput

CONFIDENCE = 0.95
"""How sure an objective must be kept to be called shown."""

ObjectiveName = Literal["p50", "p99", "errors", "availability"]


@dataclass(frozen=True)
class ServiceLevel:
    """Objectives for interactive use. Each is strict: a p99 of exactly ``p99_ms`` does not keep it.

    Attributes:
        p50_ms: the median latency is below it.
        p99_ms: 99 of 100 latencies are below it.
        max_error_rate: the share of requests that fail is below it.
        min_availability: the share of requests that find the service there is above it.

    Raises:
        TypeError, BadInput: names the objective that no service could keep.
    """

    p50_ms: float = 500.0
    p99_ms: float = 2000.0
    max_error_rate: float = 0.001
    min_availability: float = 0.999

    def __post_init__(self) -> None:
        finite_number("p50_ms", self.p50_ms, above=0, remedy="give milliseconds")
        finite_number("p99_ms", self.p99_ms, above=0, remedy="give milliseconds")
        if self.p99_ms < self.p50_ms:
            raise BadInput(f"p99_ms ({self.p99_ms:g}) is below p50_ms ({self.p50_ms:g}): raise it, or swap the two")
        finite_number("max_error_rate", self.max_error_rate, above=0, remedy="0.001 is one request in a thousand")
        if self.max_error_rate > 1:
            raise BadInput(f"max_error_rate is a share of at most 1, got {self.max_error_rate:g}; 0.001 is 0.1%")
        finite_number("min_availability", self.min_availability, remedy="0.999 is all but one request in a thousand")
        if self.min_availability >= 1:
            raise BadInput(f"min_availability is a share below 1, got {self.min_availability:g}; 0.999 is 99.9%")


@dataclass(frozen=True)
class Objective:
    """One objective of a `ServiceLevel`, and what was measured.

    Attributes:
        name: which one.
        limit: milliseconds, or a share; below it is kept, for ``availability`` above it.
        measured: in the same unit; None where no request had anything to measure.
        is_kept: whether ``measured`` keeps it; False where nothing was measured.
        is_shown: whether so many requests show that it is kept, with `CONFIDENCE`.
        requests: those that say something about it.
        requests_needed: so many show it if none of them breaks the rule.
    """

    name: ObjectiveName
    limit: float
    measured: float | None
    is_kept: bool
    is_shown: bool
    requests: int
    requests_needed: int

    def __str__(self) -> str:
        relation = "above" if self.name == "availability" else "below"
        return f"{self.name} {self._said(self.measured)} ({relation} {self._said(self.limit)} wanted)"

    def _said(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:,.0f} ms" if self.name in ("p50", "p99") else f"{value * 100:.6g}%"


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the values that at least ``share`` of them do not exceed: one of them, nothing interpolated.

    Args:
        ordered: at least one value, in ascending order.
        share: in (0, 1].
    """
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def latency_objective(name: ObjectiveName, share: float, limit_ms: float, ordered_ms: Sequence[float]) -> Objective:
    """Whether ``share`` of the latencies are below a limit.

    Args:
        name: of the objective.
        share: 0.5 for the median.
        limit_ms: milliseconds.
        ordered_ms: the latencies, ascending.
    """
    measured = percentile(ordered_ms, share) if ordered_ms else None
    slow = sum(each >= limit_ms for each in ordered_ms)
    kept = measured is not None and measured < limit_ms
    return _objective(name, limit_ms, measured, kept, slow, len(ordered_ms), 1 - share)


def share_objective(name: ObjectiveName, limit: float, bad: int, requests: int) -> Objective:
    """Whether the bad ones are a share of the requests that a limit allows.

    Args:
        name: ``errors``, whose limit is the share of bad ones, or ``availability``, whose limit is that of the others.
        limit: share.
        bad: requests that break the rule.
        requests: all of them.
    """
    allowed = 1 - limit if name == "availability" else limit
    share = bad / requests if requests else None
    measured = None if share is None else 1 - share if name == "availability" else share
    kept = share is not None and share < allowed - 1e-12
    return _objective(name, limit, measured, kept, bad, requests, allowed)


def _objective(
    name: ObjectiveName, limit: float, measured: float | None, kept: bool, bad: int, requests: int, allowed: float
) -> Objective:
    needed = 1 if allowed >= 1 else math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-allowed) - 1e-9)
    shown = kept and at_most(bad, requests, allowed) <= 1 - CONFIDENCE
    return Objective(name, limit, measured, kept, shown, requests, needed)


def at_most(successes: int, trials: int, share: float) -> float:
    """The probability of at most so many successes in so many trials: the binomial distribution's.

    With no success it is ``(1 - share) ** trials``: below 0.05 from about ``3 / share`` trials on (the rule of three).

    Args:
        successes: 0 or more.
        trials: 0 or more.
        share: of successes, in (0, 1].
    """
    if successes >= trials:
        return 1.0
    if share >= 1:
        return 0.0
    if successes > trials * share:  # the other end has fewer terms, that do not vanish
        return 1 - at_most(trials - successes - 1, trials, 1 - share)
    chances = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    term = math.exp(chances + successes * math.log(share) + (trials - successes) * math.log1p(-share))
    total = 0.0
    for k in range(successes, -1, -1):
        total += term
        if term < total * 1e-12:
            break
        term *= k / (trials - k + 1) * (1 - share) / share
    return min(1.0, total)
