"""Charts: whatever the data, the drawing stays in its frame, has no broken number, and says what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from flyte_batch.report import charts

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.lists(st.one_of(st.none(), st.floats(0, 1e12), st.floats(allow_nan=True, allow_infinity=True)), max_size=60)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)
_NUMBER = re.compile(r"-?[\d.]+")


def parsed(drawing: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))  # noqa: S314


def points(root: ElementTree.Element) -> list[tuple[float, float]]:
    """All corners of all shapes."""
    found = []
    for shape in root.iter():
        if shape.tag == f"{SVG}rect":
            x, y, width, height = (float(shape.attrib[name]) for name in ("x", "y", "width", "height"))
            assert width >= 0
            assert height >= 0
            found += [(x, y), (x + width, y + height)]
        elif shape.tag == f"{SVG}path":
            path = shape.attrib["d"].replace("h0", "")
            numbers = [float(number) for number in _NUMBER.findall(path)]
            assert re.fullmatch(r"([ML]?-?\d+(\.\d)? \d+(\.\d)? ?|Z ?)+", path), path
            found += list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def assert_sound(drawing: Markup, title: str, description: str) -> ElementTree.Element:
    assert "nan" not in re.sub("<(title|desc).*?</(title|desc)>", "", str(drawing), flags=re.DOTALL).lower()
    root = parsed(drawing)
    left, top, width, height = (float(number) for number in root.attrib["viewBox"].split())
    for x, y in points(root):
        assert left - 0.11 <= x <= left + width + 0.11
        assert top <= y <= top + height
    assert root.attrib["role"] == "img"
    named = [
        element.text or ""
        for ident in root.attrib["aria-labelledby"].split()
        for element in root
        if element.get("id") == ident
    ]
    assert named == [title, description]
    return root


@settings(deadline=None)
@given(VALUES, st.floats(0, 1e12), TEXT, TEXT)
def test_any_values_make_a_sound_drawing(values: list[float | None], top: float, title: str, description: str) -> None:
    known = [value for value in values if value is not None]
    says = {"ident": "x", "title": title, "description": description}
    assert_sound(charts.steps(values, top, **says), title, description)
    assert_sound(charts.bars(known, top, **says), title, description)
    numbers = [value if value == value and abs(value) < 1e300 else 0.0 for value in known]
    assert_sound(charts.stacked([("busy", value) for value in numbers], **says), title, description)
    assert_sound(charts.dots([(value, value, "usual") for value in numbers], top, top, **says), title, description)


@pytest.mark.parametrize(
    "draw",
    [
        lambda **says: charts.steps([], 1.0, **says),
        lambda **says: charts.steps([None, None], 1.0, **says),
        lambda **says: charts.bars([], 1.0, **says),
        lambda **says: charts.bars([0.0], 0.0, **says),
        lambda **says: charts.stacked([], **says),
        lambda **says: charts.stacked([("busy", 0.0)], **says),
        lambda **says: charts.dots([], 0.0, 0.0, **says),
    ],
)
def test_nothing_draws_nothing(draw: Callable[..., Markup]) -> None:
    assert points(assert_sound(draw(ident="x", title="t", description="d"), "t", "d")) == []


def test_steps_stand_at_their_values_and_break_where_there_is_none() -> None:
    root = parsed(charts.steps([1.0, 0.5, None, 2.0], 1.0, ident="x", title="t", description="d"))
    area, line = root.findall(f"{SVG}path")
    # four slices of 150; 1 is the top, 2 is cut off there
    assert line.attrib["d"] == "M0 0 L150 0 L150 60 L300 60 M450 0 L600 0"
    assert area.attrib["d"].count("Z") == 2


def test_the_parts_of_a_stacked_bar_are_as_wide_as_their_shares() -> None:
    root = parsed(charts.stacked([("busy", 3.0), ("tail", 1.0)], ident="x", title="t", description="d"))
    assert [(rect.get("class"), rect.get("x"), rect.get("width")) for rect in root.findall(f"{SVG}rect")] == [
        ("fb-part fb-busy", "0", "450"), ("fb-part fb-tail", "450", "150"),
    ]  # fmt: skip


def test_dots_of_a_kind_are_one_shape() -> None:
    drawing = charts.dots(
        [(0, 0, "usual"), (5, 1, "straggler"), (10, 2, "usual")], 10, 2, ident="x", title="t", description="d"
    )
    assert [path.get("d") for path in parsed(drawing).findall(f"{SVG}path")] == ["M0 120h0M600 0h0", "M300 60h0"]


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([], 1),
        ([0.0], 1),
        ([None, 7.0], 8),
        ([5e-324], 1),
        ([0.3], 0.3),
        ([1.01], 1.5),
        ([9.1], 10),
        ([560], 600),
        ([1000], 1000),
    ],
)
def test_an_axis_ends_at_a_round_number(values: list[float | None], top: float) -> None:
    assert charts.nice_top(values) == pytest.approx(top)


@settings(deadline=None)
@given(VALUES)
def test_an_axis_holds_all_values_and_wastes_less_than_half(values: list[float | None]) -> None:
    top = charts.nice_top(values)
    most = max((value for value in values if value is not None and value < float("inf")), default=0.0)
    assert top > 0
    if most >= charts.SMALLEST:
        assert most <= top * (1 + 1e-9)
        assert top <= 2 * most * (1 + 1e-9)


def test_hostile_texts_stay_texts() -> None:
    hostile = "</title><script>alert('x')</script>\"&"
    root = assert_sound(charts.steps([1.0], 1.0, ident="x", title=hostile, description=hostile), hostile, hostile)
    assert not list(root.iter(f"{SVG}script"))
