"""Percentiles, shares, and whether so many requests show anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.errors import BadInput
from flyte_batch.load.levels import ServiceLevel, at_most, latency_objective, percentile, share_objective

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=300)
SHARES = st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0])


@settings(deadline=None)
@given(VALUES, SHARES)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    values.sort()
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values)


@settings(deadline=None)
@given(VALUES, SHARES, SHARES)
def test_a_higher_percentile_is_no_smaller_and_none_exceeds_the_largest(
    values: list[float], one: float, other: float
) -> None:
    values.sort()
    low, high = sorted((one, other))
    assert values[0] <= percentile(values, low) <= percentile(values, high) <= values[-1]
    assert percentile(values, 1.0) == values[-1]


@settings(deadline=None)
@given(VALUES, st.floats(1e-3, 1e6))
def test_a_latency_objective_is_kept_where_its_percentile_is_below_the_limit(values: list[float], limit: float) -> None:
    values.sort()
    objective = latency_objective("p99", 0.99, limit, values)
    assert objective.measured == percentile(values, 0.99)
    assert objective.is_kept == (percentile(values, 0.99) < limit)


def exactly_at_most(successes: int, trials: int, share: float) -> float:
    return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes + 1))


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.001, 0.999))
def test_the_binomial_distribution_is_the_sum_of_its_terms(successes: int, trials: int, share: float) -> None:
    assert at_most(successes, trials, share) == pytest.approx(exactly_at_most(min(successes, trials), trials, share))


def test_the_binomial_distribution_stands_large_numbers() -> None:
    assert at_most(500_000, 1_000_000, 0.5) == pytest.approx(0.5, abs=0.001)
    assert at_most(999_000, 1_000_000, 0.5) == 1.0
    assert at_most(900, 1_000_000, 0.001) == pytest.approx(0.0007, abs=0.0002)


@pytest.mark.parametrize(("requests", "shown"), [(2994, False), (2995, True)])
def test_less_than_one_error_in_a_thousand_takes_about_three_thousand_requests_to_show(
    requests: int, shown: bool
) -> None:
    objective = share_objective("errors", 0.001, 0, requests)
    assert (objective.is_kept, objective.is_shown, objective.requests_needed) == (True, shown, 2995)


def test_a_single_error_takes_more_requests_to_show_that_there_are_few() -> None:
    assert not share_objective("errors", 0.001, 1, 2995).is_shown
    assert share_objective("errors", 0.001, 1, 4800).is_shown


@pytest.mark.parametrize(("requests", "shown"), [(298, False), (299, True)])
def test_a_p99_takes_299_requests_to_show(requests: int, shown: bool) -> None:
    objective = latency_objective("p99", 0.99, 2000, [1.0] * requests)
    assert (objective.is_kept, objective.is_shown, objective.requests_needed) == (True, shown, 299)


def test_a_slow_request_takes_more_of_them_to_show_a_p99() -> None:
    assert not latency_objective("p99", 0.99, 2000, [*[1.0] * 298, 2000.0]).is_shown
    assert latency_objective("p99", 0.99, 2000, [*[1.0] * 480, 2000.0]).is_shown


def test_objectives_are_strict() -> None:
    assert not latency_objective("p50", 0.5, 500, [500.0]).is_kept
    assert not share_objective("errors", 0.001, 1, 1000).is_kept
    assert share_objective("errors", 0.001, 1, 1001).is_kept
    assert not share_objective("availability", 0.999, 1, 1000).is_kept
    assert share_objective("availability", 0.999, 1, 1001).is_kept


def test_nothing_measured_keeps_nothing() -> None:
    for objective in (latency_objective("p50", 0.5, 500, []), share_objective("errors", 0.001, 0, 0)):
        assert (objective.measured, objective.is_kept, objective.is_shown) == (None, False, False)


def test_an_objective_says_what_was_wanted() -> None:
    assert str(latency_objective("p99", 0.99, 2000, [2310.0])) == "p99 2,310 ms (below 2,000 ms wanted)"
    assert str(share_objective("availability", 0.999, 25, 1000)) == "availability 97.5% (above 99.9% wanted)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p50_ms": 0}, "p50_ms must be finite and above 0"),
        ({"p99_ms": 100}, "p99_ms .100. is below p50_ms .500."),
        ({"max_error_rate": 1.5}, "max_error_rate is a share"),
        ({"max_error_rate": 0}, "max_error_rate must be finite and above 0"),
        ({"min_availability": 99.9}, "min_availability is a share below 1"),
    ],
)
def test_a_level_that_nothing_could_keep_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ServiceLevel(**options)
