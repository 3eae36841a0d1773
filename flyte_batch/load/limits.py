"""Up to what rate a service level is kept: a ramp of doubling rates, then bisection, each step a load of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flyte_batch.batching.checks import finite_number
from flyte_batch.errors import BadInput
from flyte_batch.load.generator import Ask, LoadResult, Submitter, ask_alone, asker, check_rate, run_load
from flyte_batch.load.levels import ServiceLevel
from flyte_batch.load.underway import Underway

_FEWEST_REQUESTS = 10
"""In a step: of fewer nothing is to be learnt, so the search for a lower rate ends there."""


@dataclass(frozen=True)
class Limit:
    """Where a service level stops to be kept.

    Attributes:
        steps: in the order in which they were run; one, where only one rate was asked for.
        highest_kept_per_s: the highest rate that kept the level, below every one that did not; None if none did.
        lowest_broken_per_s: the lowest rate that did not; None if all did.
        why: which objectives that rate broke, with figures; empty if all were kept.
    """

    steps: tuple[LoadResult, ...]
    highest_kept_per_s: float | None
    lowest_broken_per_s: float | None
    why: str

    @classmethod
    def of(cls, steps: Sequence[LoadResult]) -> Limit:
        """What some loads come to."""
        broken = min((step for step in steps if not step.is_kept), key=_rate, default=None)
        below = math.inf if broken is None else broken.rate_per_s
        kept = max((step for step in steps if step.is_kept and step.rate_per_s < below), key=_rate, default=None)
        return cls(
            tuple(steps),
            None if kept is None else kept.rate_per_s,
            None if broken is None else broken.rate_per_s,
            "" if broken is None else broken.why,
        )

    @property
    def highest_kept(self) -> LoadResult | None:
        """The step at ``highest_kept_per_s``."""
        return next((step for step in self.steps if step.rate_per_s == self.highest_kept_per_s), None)


def _rate(step: LoadResult) -> float:
    return step.rate_per_s


async def find_limit(
    target: Submitter | Ask,
    records: Sequence[Any],
    *,
    level: ServiceLevel | None = None,
    start_per_s: float = 8.0,
    most_per_s: float = 100_000.0,
    precision: float = 0.1,
    seconds: float = 20.0,
    warm_up_s: float = 5.0,
    seed: int = 0,
    timeout_s: float = 10.0,
    max_in_flight: int = 10_000,
    on_progress: Callable[[Underway], object] | None = None,
    on_step: Callable[[LoadResult], object] | None = None,
) -> Limit:
    """Find the rate at which a service level stops to be kept.

    The rate doubles until a step breaks an objective (halves, if the first one does), and then lies between two
    rates that are bisected. Before each step one request is answered alone, so that it finds an empty queue and an idle
    device. A service that does not answer it any more ends the search.

    A rate just above what the service can do breaks nothing at first: of W seconds and a warm-up of U, an excess of x
    delays the median by x (U + W/2) seconds. With 20 and 5 s, 500 ms are broken from 3.3% on. A search that is to be
    finer takes longer steps.

    Args:
        target: as for `run_load`.
        records: as for `run_load`.
        level: the objectives.
        start_per_s: the first rate.
        most_per_s: no rate above it is tried.
        precision: the lowest rate that broke is at most so much above the highest that was kept, as a share: at least
            0.02.
        seconds: measured in each step.
        warm_up_s: before it, not measured.
        seed: of the first step; each has one of its own.
        timeout_s: as for `run_load`.
        max_in_flight: as for `run_load`.
        on_progress: hears of each step while it goes on, as for `run_load`.
        on_step: hears of each step when it is over.

    Raises:
        TypeError, BadInput: an option that cannot work.
        DeadlineExceeded: the very first request, made before any step, was not answered in ``timeout_s``.
        Exception: what that request raised.
    """
    level = level or ServiceLevel()
    check_rate("start_per_s", start_per_s)
    check_rate("most_per_s", most_per_s)
    check_precision(precision)
    if most_per_s < start_per_s:
        raise BadInput(f"most_per_s ({most_per_s:g}) is below start_per_s ({start_per_s:g}): raise it")
    if not records:
        raise BadInput("there are no records to ask: give at least one")
    ask = asker(target)
    await ask_alone(ask, records[0], timeout_s)
    steps: list[LoadResult] = []

    async def is_there() -> bool:
        try:
            await ask_alone(ask, records[0], timeout_s)
        except Exception:
            return False
        return True

    rate: float | None = start_per_s
    while rate is not None and (not steps or await is_there()):
        step = await run_load(
            ask,
            records,
            rate,
            seconds,
            seed=seed + len(steps),
            timeout_s=timeout_s,
            warm_up_s=warm_up_s,
            max_in_flight=max_in_flight,
            level=level,
            on_progress=on_progress,
        )
        steps.append(step)
        if on_step is not None:
            on_step(step)
        rate = next_rate(Limit.of(steps), start_per_s, most_per_s, precision, _FEWEST_REQUESTS / seconds)
    return Limit.of(steps)


def check_precision(precision: float) -> None:
    """
    Raises:
        TypeError, BadInput: no search could be so precise.
    """
    finite_number("precision", precision, above=0, remedy="0.1 is 10%")
    if precision < 0.02:
        raise BadInput(f"precision must be at least 0.02, got {precision:g}: chance moves the limit by more than that")


def next_rate(
    known: Limit, start_per_s: float, most_per_s: float, precision: float, least_per_s: float
) -> float | None:
    """The rate to try next; None when there is nothing left to learn. Rates have three significant digits.

    Args:
        known: by now.
        start_per_s: the first rate.
        most_per_s: see `find_limit`.
        precision: see `find_limit`.
        least_per_s: no rate below it is tried.
    """
    kept, broken = known.highest_kept_per_s, known.lowest_broken_per_s
    if broken is None:
        rate = start_per_s if kept is None else min(2 * kept, most_per_s)
        return rate if kept is None or rate > kept else None
    if kept is None:
        return _rounded(broken / 2) if broken / 2 >= least_per_s else None
    return _rounded(math.sqrt(kept * broken)) if broken > kept * (1 + precision) else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
