"""Numbers and times as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

from markupsafe import Markup


def count(value: float) -> str:
    """``1,234,567``."""
    return f"{value:,.0f}"


def number(value: float) -> str:
    """Three significant digits, more for whole thousands: ``0.0123``, ``12.3``, ``5``, ``12,345``."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return _plain(f"{rounded:.{max(0, digits)}f}") if abs(rounded) < 100 else f"{value:,.0f}"


def _plain(text: str) -> str:
    """Without zeros that say nothing."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """``38%``, ``3.8%``; what is not nothing is never said to be 0%, what is not all never 100%."""
    if share <= 0:
        return "0%"
    if share < 0.001:
        return "<0.1%"
    if share >= 1:
        return f"{share:.0%}"
    if share >= 0.995:
        return f"{math.floor(share * 1000) / 10:.1f}%"
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def seconds(value: float) -> str:
    """``12 ms``, ``6.3 s``, ``2 min 5 s``, ``1 h 4 min``, ``2 d 3 h``."""
    if not math.isfinite(value):
        return "unknown"
    if value < 0.0995:
        return f"{number(value * 1000)} ms" if value > 0 else "0 s"
    if value < 9.95:
        return f"{_plain(f'{value:.1f}')} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole, 60, "min", 1, "s")
    minutes = round(value / 60)
    if minutes < 24 * 60:
        return _two(minutes, 60, "h", 1, "min")
    return _two(round(value / 3600), 24, "d", 1, "h")


def latency(value: float) -> str:
    """Seconds, with three significant digits where it is less than a minute: ``12.6 ms``, ``355 ms``, ``1.41 s``."""
    if value < 0.9995:
        return f"{number(value * 1000)} ms"
    return f"{number(value)} s" if value < 59.95 else seconds(value)


def _two(value: int, large: int, large_name: str, small: int, small_name: str) -> str:
    first, rest = divmod(value, large)
    return f"{first} {large_name} {rest // small} {small_name}" if rest // small else f"{first} {large_name}"


def money(value: float) -> str:
    """``1,234.50``; two significant digits of what is less than a tenth: ``0.0073``."""
    if not math.isfinite(value):
        return "unknown"
    if value >= 0.0995 or value <= 0:
        return f"{value:,.2f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def size(value: float) -> str:
    """Bytes: ``12 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def moment(unix_time: float) -> Markup:
    """A ``<time>`` element in UTC; ``unknown`` for a time that no calendar has."""
    try:
        at = datetime.fromtimestamp(unix_time, UTC)
    except (OverflowError, OSError, ValueError):
        return Markup("unknown")
    return Markup('<time datetime="{}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), at.strftime("%Y-%m-%d %H:%M:%S UTC")
    )


def said(value: float | None, say: Callable[[float], str]) -> str:
    """What ``say`` makes of a value; a dash, as tables have it, where it is not known."""
    return "–" if value is None else say(value)


def plural(number_of: int, one: str, many: str = "") -> str:
    """``1 row``, ``2 rows``."""
    return f"{count(number_of)} {one if number_of == 1 else many or one + 's'}"


def cut(text: str, characters: int) -> str:
    """At most so many characters, with the mark of a cut."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
