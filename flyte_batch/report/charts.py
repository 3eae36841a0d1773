"""Charts as SVG: pure functions from numbers to shapes.

The drawings hold no text, so that they can be stretched to any width: axes and labels are the page's. Colours are CSS
variables of the page's style sheet. Each drawing says what it shows to those who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH = 600.0
HEIGHT = 120.0
BAR_HEIGHT = 40.0
SMALLEST = 1e-12
"""Values below count as nothing."""


def nice_top(values: Sequence[float | None]) -> float:
    """The end of an axis that holds these values, a round number; 1 where all are nothing."""
    most = max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
    if most < SMALLEST:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next((step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if most <= step * power), 10 * power)


def steps(values: Sequence[float | None], top: float, *, ident: str, title: str, description: str) -> Markup:
    """Equal slices of a time, each at its value; a gap where there is none."""
    width = WIDTH / max(1, len(values))
    areas, lines = [], []
    for known, group in itertools.groupby(enumerate(values), key=lambda pair: pair[1] is not None):
        if not known:
            continue
        points = []
        for index, value in group:
            y = _y(value or 0.0, top)
            points += [(index * width, y), ((index + 1) * width, y)]
        line = " L".join(f"{_short(x)} {_short(y)}" for x, y in points)
        lines.append(f"M{line}")
        areas.append(f"M{_short(points[0][0])} {_short(HEIGHT)} L{line} L{_short(points[-1][0])} {_short(HEIGHT)} Z")
    shapes = Markup("")
    if lines:
        shapes = Markup('<path class="fb-area" d="{}"/><path class="fb-line" d="{}"/>').format(
            " ".join(areas), " ".join(lines)
        )
    return _drawing(shapes, HEIGHT, ident, title, description)


def bars(values: Sequence[float], top: float, *, ident: str, title: str, description: str) -> Markup:
    """One bar a value."""
    width = WIDTH / max(1, len(values))
    shapes = Markup("").join(
        Markup('<rect class="fb-bar" x="{}" y="{}" width="{}" height="{}"/>').format(
            _short(index * width + width * 0.06), _short(_y(value, top)), _short(width * 0.88),
            _short(HEIGHT - _y(value, top)),
        )
        for index, value in enumerate(values)
        if value > 0
    )  # fmt: skip
    return _drawing(shapes, HEIGHT, ident, title, description)


def stacked(parts: Sequence[tuple[str, float]], *, ident: str, title: str, description: str) -> Markup:
    """One bar of parts (kind, value), as long as the drawing; a kind is a class of the style sheet."""
    total = sum(max(0.0, value) for _, value in parts)
    shapes, left = [], 0.0
    for kind, value in parts:
        width = max(0.0, value) / total * WIDTH if total > 0 else 0.0
        if width > 0:
            shapes.append(
                Markup('<rect class="fb-part fb-{}" x="{}" y="0" width="{}" height="{}"/>').format(
                    kind, _short(left), _short(min(width, WIDTH - left)), _short(BAR_HEIGHT)
                )
            )
        left += width
    return _drawing(Markup("").join(shapes), BAR_HEIGHT, ident, title, description)


def dots(
    points: Sequence[tuple[float, float, str]], right: float, top: float, *, ident: str, title: str, description: str
) -> Markup:
    """Points (x, y, kind); x from 0 to ``right``. A kind is a class of the style sheet."""
    groups: dict[str, list[str]] = {}
    for x, y, kind in points:
        place = min(1.0, max(0.0, x / right)) * WIDTH if right > 0 else 0.0
        groups.setdefault(kind, []).append(f"M{_short(place)} {_short(_y(y, top))}h0")
    shapes = Markup("").join(
        Markup('<path class="fb-dots fb-{}" d="{}"/>').format(kind, "".join(found)) for kind, found in groups.items()
    )
    return _drawing(shapes, HEIGHT, ident, title, description)


def _y(value: float, top: float) -> float:
    share = value / top if top > 0 and math.isfinite(value) else 0.0
    return HEIGHT * (1 - min(1.0, max(0.0, share)))


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _drawing(shapes: Markup, height: float, ident: str, title: str, description: str) -> Markup:
    return Markup(
        '<svg class="fb-chart" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" '
        'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{title}</title>'
        '<desc id="{ident}-d">{description}</desc>{shapes}</svg>'
    ).format(_short(WIDTH), _short(height), ident=ident, title=title, description=description, shapes=shapes)
