"""What `ContinuousBatcher` decides by: how long a response will be, and in which order records should start.

Pure and synchronous: no event loop, no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MEMORY = 0.998
"""Weight that an observation keeps with each that follows: the last 500 or so count."""
_GUESS_WEIGHT = 8.0
"""Observations that the first guess is worth in the beginning."""
_GUESS_FADES = 0.97
"""Share of that which is left with each observation."""


class ResponseLengths:
    """How many tokens responses have, learnt from those that came out.

    A line through prompt lengths and response lengths, by least squares, in which older responses count ever less. Its
    slope is trusted as far as it explains the lengths (times r squared), so that where prompts say nothing about
    responses the estimate is their mean. The first responses to come out are the shortest of those that started
    together; the first guess, which counts as a few observations, keeps them from being taken for all.

    Args:
        guess: tokens to expect before anything is known; None for half of what a record may generate.
    """

    def __init__(self, guess: float | None = None) -> None:
        self._guess = guess
        self._weight = _GUESS_WEIGHT
        self._n = self._x = self._y = self._xx = self._xy = self._yy = 0.0

    def observe(self, prompt_tokens: float, response_tokens: float) -> None:
        """A record is done."""
        x, y = prompt_tokens, response_tokens
        self._weight *= _GUESS_FADES
        self._n = self._n * _MEMORY + 1
        self._x = self._x * _MEMORY + x
        self._y = self._y * _MEMORY + y
        self._xx = self._xx * _MEMORY + x * x
        self._xy = self._xy * _MEMORY + x * y
        self._yy = self._yy * _MEMORY + y * y

    def expect(self, prompt_tokens: float, limit: float) -> float:
        """Tokens that the response to a prompt will have, at most ``limit``."""
        guess = limit / 2 if self._guess is None else self._guess
        learnt = self._line(prompt_tokens) if self._n else 0.0
        expected = (self._weight * guess + self._n * learnt) / (self._weight + self._n)
        return min(limit, max(1.0, expected))

    def _line(self, x: float) -> float:
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread_x = self._xx / self._n - mean_x * mean_x
        spread_y = self._yy / self._n - mean_y * mean_y
        together = self._xy / self._n - mean_x * mean_y
        if spread_x < 1e-9 or spread_y < 1e-9:
            return mean_y
        explained = min(1.0, together * together / (spread_x * spread_y))
        return mean_y + explained * together / spread_x * (x - mean_x)


def admission_order(prompts: Sequence[Any], costs: Sequence[float], *, shared: int) -> list[int]:
    """In which order records of one call should start: the longest first, those that share a prefix together.

    What takes longest must not start last, or the device runs nearly empty at the end (the rule of longest processing
    time first: Graham, "Bounds on multiprocessing timing anomalies", 1969). Records that share a prefix find it in the
    engine's cache if they run at about the same time.

    Args:
        prompts: the tokens of each record's prompt, of types that compare with each other.
        costs: what each record is expected to cost.
        shared: tokens that neighbours must have in common, beyond what all prompts have in common, to count as a group;
            0 groups nothing.

    Returns:
        The records' positions. Groups come in the order of their costliest record, and so do the records in a group.
    """
    by_cost = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    if not shared or len(prompts) < 3:
        return by_cost
    common = _shared_by_all(prompts)
    needed = common + shared
    groups: dict[Any, list[int]] = {}
    for position in by_cost:
        prompt = prompts[position]
        key = tuple(prompt[common:needed]) if len(prompt) >= needed else position
        groups.setdefault(key, []).append(position)
    return [position for group in groups.values() for position in group]


def _shared_by_all(prompts: Sequence[Any]) -> int:
    """Tokens at the beginning that all prompts have in common."""
    start = prompts[0]
    for prompt in prompts:
        if prompt[: len(start)] != start:
            start = start[: _common(start, prompt)]
    return len(start)


def _common(a: Any, b: Any) -> int:
    """Tokens at the beginning that two prompts have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
