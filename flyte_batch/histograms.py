"""Counts by size, in buckets that add up over chunks, replicas and runs.

A histogram is a mapping from a bucket's upper bound to the values in it. Its bounds are the same everywhere, so that
histograms are added bound by bound. Keys are texts where a histogram went through JSON.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

TOKEN_BOUNDS = (0, 1, 2, 3, 4, *(step for power in range(2, 24) for step in (3 * 2 ** (power - 1), 2 ** (power + 1))))
"""Upper bounds for numbers of tokens: 0, 1, 2, 3, 4, 6, 8, 12, 16, ... 16,777,216."""

PER_DECADE = 20
LATENCY_BOUNDS = tuple(round(10 ** (step / PER_DECADE), 7) for step in range(-4 * PER_DECADE, 5 * PER_DECADE + 1))
"""Upper bounds for seconds: from 0.1 ms to 100,000 s, 12% apart."""


def bound(value: float, bounds: tuple[float, ...]) -> float:
    """The upper bound of the bucket that holds ``value``; the last one takes all that is above."""
    return bounds[min(bisect_left(bounds, value), len(bounds) - 1)]


def count_tokens(lengths: Iterable[int]) -> dict[int, int]:
    """Numbers of tokens by `TOKEN_BOUNDS`, in the bounds' order."""
    counts = Counter(lengths)
    found: Counter[int] = Counter()
    for length, number in counts.items():
        found[int(bound(length, TOKEN_BOUNDS))] += number
    return dict(sorted(found.items()))


def added(histograms: Iterable[Mapping[float, int]]) -> dict[float, int]:
    """Their sum, in the bounds' order."""
    total: Counter[float] = Counter()
    for each in histograms:
        total.update(each)
    return dict(sorted(total.items()))


def percentile(histogram: Mapping[float, int], share: float) -> float | None:
    """The upper bound of the bucket that holds the value at ``share`` (0-1) of all; None for an empty histogram."""
    number = sum(histogram.values())
    rank = max(1, math.ceil(share * number))
    for upper, count in sorted(histogram.items()):
        rank -= count
        if rank <= 0:
            return upper
    return None
