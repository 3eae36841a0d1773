"""The time by which durations are reckoned."""

from __future__ import annotations

import time

_TICKS = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while a machine sleeps, and nobody sets it; CLOCK_MONOTONIC does so on macOS."""

_SET = time.time() - time.clock_gettime(_TICKS)


def now() -> float:
    """Unix time in seconds as this process' start knew it: never goes back, whatever the machine's clock is set to."""
    return _SET + time.clock_gettime(_TICKS)
