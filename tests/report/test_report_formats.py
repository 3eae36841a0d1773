"""Numbers and times as the report writes them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.histograms import LATENCY_BOUNDS
from flyte_batch.report import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (1.0, "1"), (1.005, "1"), (2.60, "2.6"), (12.34, "12.3"), (99.94, "99.9"),
     (99.97, "100"), (123.6, "124"), (12_345.6, "12,346"), (-1.5, "-1.5"), (math.inf, "unknown"), (math.nan, "unknown"),
     (100.4, "100"), (10.0, "10")],
)  # fmt: skip
def test_numbers_have_three_digits_that_say_something(value: float, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-9, "<0.1%"), (0.001, "0.1%"), (0.0994, "9.9%"), (0.0996, "10%"), (0.38, "38%"), (0.994, "99%"),
     (0.9951, "99.5%"), (0.99999, "99.9%"), (1, "100%"), (1.5, "150%"), (-0.1, "0%")],
)  # fmt: skip
def test_what_is_not_nothing_is_not_0_percent_and_what_is_not_all_not_100(share: float, text: str) -> None:
    assert formats.percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.000_84, "0.84 ms"), (0.0123, "12.3 ms"), (0.0994, "99.4 ms"), (0.0996, "0.1 s"), (2, "2 s"),
     (6.34, "6.3 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"),
     (3599.4, "59 min 59 s"), (3599.6, "1 h"), (3840, "1 h 4 min"), (86_380, "1 d"), (183_600, "2 d 3 h")],
)  # fmt: skip
def test_durations_have_at_most_two_units(value: float, text: str) -> None:
    assert formats.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (0.0001259, "0.126 ms"), (0.3548134, "355 ms"), (0.9994, "999 ms"), (0.9996, "1 s"),
     (1.4125, "1.41 s"),
     (12.589, "12.6 s"), (59.94, "59.9 s"), (59.96, "1 min"), (125, "2 min 5 s"), (math.inf, "unknown")],
)  # fmt: skip
def test_latencies_that_differ_by_a_bucket_differ_in_words(value: float, text: str) -> None:
    assert formats.latency(value) == text


def test_the_buckets_of_latencies_up_to_a_minute_have_names_of_their_own() -> None:
    names = [formats.latency(bound) for bound in LATENCY_BOUNDS if bound < 60]
    assert len(names) == len(set(names))


@settings(deadline=None)
@given(st.floats(0, 1e12))
def test_any_duration_and_number_can_be_said(value: float) -> None:
    for text in (formats.seconds(value), formats.number(value), formats.size(value), formats.count(value)):
        assert text[0].isdigit()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (24 * 2**30, "24 GiB"), (3 * 2**40, "3 TiB")]
)
def test_sizes_have_binary_units(value: float, text: str) -> None:
    assert formats.size(value) == text


def test_moments_are_utc_for_people_and_programs() -> None:
    assert formats.moment(1_795_000_000.9) == (
        '<time datetime="2026-11-18T11:06:40Z">2026-11-18 11:06:40 UTC</time>'
    )  # fmt: skip


def test_one_is_singular_and_long_texts_end_with_a_mark() -> None:
    assert [formats.plural(each, "row") for each in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert formats.plural(2, "replica died", "replicas died") == "2 replicas died"
    assert (formats.cut("abcd", 4), formats.cut("abcde", 4)) == ("abcd", "abc…")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.00735, "0.0073"), (0.042, "0.042"), (0.0996, "0.10"), (1.234, "1.23"), (12_345.678, "12,345.68")],
)
def test_money_has_hundredths_or_two_digits(value: float, text: str) -> None:
    assert formats.money(value) == text
