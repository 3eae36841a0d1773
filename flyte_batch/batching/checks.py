"""Options that cannot work are refused when they are given, by name, with the remedy."""

from __future__ import annotations

import math
from typing import Any

from flyte_batch.errors import BadInput


def whole_number(name: str, value: Any, *, at_least: int, remedy: str) -> int:
    """
    Raises:
        TypeError: not an int (a bool is none).
        BadInput: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}); {remedy}")
    if value < at_least:
        raise BadInput(f"{name} must be {at_least} or more, got {value}; {remedy}")
    return value


def finite_number(name: str, value: Any, *, above: float | None = None, remedy: str) -> float:
    """A number that is 0 or more or, where ``above`` is given, above that.

    Raises:
        TypeError: not an int or float (a bool is none).
        BadInput: NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}); {remedy}")
    in_range = value >= 0 if above is None else value > above
    if not in_range or not math.isfinite(value):
        wanted = "0 or more" if above is None else f"above {above:g}"
        raise BadInput(f"{name} must be finite and {wanted}, got {value!r}; {remedy}")
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Raises:
        BadInput: not one of the choices.
    """
    if value not in choices:
        raise BadInput(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
