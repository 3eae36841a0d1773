"""Packing is pure: these tests need no event loop."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.batching.packing import Backlog, Batch, Lane


def fill(backlog: Backlog, *callers: list[int]) -> list[Lane]:
    """One lane a caller; a record is (caller, place, cost) and its ticket its place."""
    lanes = []
    for caller, costs in enumerate(callers):
        lane: Lane = Lane()
        lanes.append(lane)
        if costs:
            records = [(caller, place, cost) for place, cost in enumerate(costs)]
            backlog.push(lane, records, list(costs), list(range(len(costs))), now=float(caller))
    return lanes


def drain(backlog: Backlog, budget: float) -> list[Batch]:
    batches = []
    while len(backlog):
        batches.append(backlog.take(budget))
    return batches


def places(batch: Batch) -> list[tuple[int, int]]:
    return [(caller, place) for caller, place, _ in batch.records]


costs = st.integers(min_value=0, max_value=40)
callers = st.lists(st.lists(costs, max_size=30), min_size=1, max_size=6)
backlogs = st.builds(
    Backlog,
    max_batch_size=st.integers(1, 12),
    batch_cost=st.sampled_from(["sum", "padded"]),
    length_window=st.sampled_from([0, 12, 30]),
    turn_size=st.sampled_from([1, 3, 64]),
)


@given(callers, backlogs, st.integers(1, 60))
def test_no_batch_of_two_or_more_exceeds_the_budget_or_the_size(callers, backlog, budget):
    fill(backlog, *callers)
    for batch in drain(backlog, budget):
        assert 1 <= len(batch) <= backlog._max_batch_size
        assert len(batch) == 1 or batch.cost <= budget


@given(callers, backlogs, st.integers(1, 60))
def test_every_record_leaves_exactly_once_with_its_own_cost_and_ticket(callers, backlog, budget):
    lanes = fill(backlog, *callers)
    left = []
    for batch in drain(backlog, budget):
        owners = [(lane, ticket) for lane, tickets in batch.parts for ticket in tickets]
        for record, cost, (lane, ticket) in zip(batch.records, batch.costs, owners, strict=True):
            assert record == (lanes.index(lane), ticket, cost)
            left.append(record)
    assert sorted(left) == [(c, p, cost) for c, own in enumerate(callers) for p, cost in enumerate(own)]
    assert backlog.oldest_arrival() is None


@given(callers, st.integers(1, 12), st.sampled_from(["sum", "padded"]), st.integers(1, 60))
def test_a_callers_records_leave_in_its_order(callers, size, batch_cost, budget):
    backlog: Backlog = Backlog(max_batch_size=size, batch_cost=batch_cost)
    fill(backlog, *callers)
    left = [record for batch in drain(backlog, budget) for record in batch.records]
    for caller, own in enumerate(callers):
        assert [place for c, place, _ in left if c == caller] == list(range(len(own)))


@given(callers, st.integers(1, 12), st.integers(1, 60))
def test_no_waiting_caller_is_ever_more_than_one_turn_ahead_of_another(callers, size, budget):
    backlog: Backlog = Backlog(max_batch_size=size)
    fill(backlog, *([1] * len(own) for own in callers))
    gone = [0] * len(callers)
    for batch in drain(backlog, budget):
        for caller, _, _ in batch.records:
            gone[caller] += 1
        waiting = [gone[caller] for caller, own in enumerate(callers) if gone[caller] < len(own)]
        assert not waiting or max(waiting) - min(waiting) <= 1


def test_with_longer_turns_callers_end_one_after_the_other_also_across_batches():
    backlog = Backlog(max_batch_size=3, turn_size=4)
    fill(backlog, [1] * 6, [1] * 6)
    order = [caller for batch in drain(backlog, 100) for caller, _ in places(batch)]
    assert order == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(1, 12), st.integers(1, 20))
def test_a_caller_waits_for_at_most_one_turn_of_each_other(sizes, size, turn_size):
    backlog = Backlog(max_batch_size=size, turn_size=turn_size)
    fill(backlog, *([1] * count for count in sizes))
    batches = [[caller for caller, _ in places(batch)] for batch in drain(backlog, 1000)]
    for caller in range(len(sizes)):
        own = next(index for index, batch in enumerate(batches) if caller in batch)
        before = [other for batch in batches[:own] for other in batch]
        assert all(before.count(other) <= turn_size for other in range(len(sizes)) if other != caller)


def test_a_small_caller_is_in_the_next_batch_however_many_a_big_one_has_queued():
    backlog: Backlog = Backlog(max_batch_size=4)
    fill(backlog, [1] * 1000, [1, 1])
    assert places(backlog.take(100)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_caller_whose_record_does_not_fit_comes_first_in_the_next_batch():
    backlog: Backlog = Backlog(max_batch_size=10)
    fill(backlog, [6, 6], [6], [3])
    first, second, third = drain(backlog, budget=10)
    assert places(first) == [(0, 0), (2, 0)], "the gap was filled by a caller with a small record"
    assert places(second) == [(1, 0)]
    assert places(third) == [(0, 1)]


def test_an_oversized_record_goes_alone_and_first_even_while_small_ones_keep_arriving():
    backlog: Backlog = Backlog(max_batch_size=10)
    lanes = fill(backlog, [1], [50])
    assert places(backlog.take(10)) == [(0, 0)]
    backlog.push(lanes[0], [(0, 1, 1)], [1], [1], now=9.0)
    assert places(backlog.take(10)) == [(1, 0)]


def test_a_padded_batch_costs_its_rows_times_its_longest():
    backlog: Backlog = Backlog(max_batch_size=10, batch_cost="padded")
    fill(backlog, [1, 1, 1, 10, 10])
    first, second = drain(backlog, budget=20)
    assert (first.costs, first.cost) == ([1, 1, 1], 3), "a fourth row of 10 would make it 40"
    assert (second.costs, second.cost) == ([10, 10], 20)


def test_a_length_window_puts_similar_records_together():
    backlog: Backlog = Backlog(max_batch_size=4, batch_cost="padded", length_window=8)
    fill(backlog, [5, 100, 5, 100, 5, 100, 5, 100])
    assert [batch.costs for batch in drain(backlog, budget=1000)] == [[5] * 4, [100] * 4]


@given(st.lists(costs, min_size=1, max_size=30), st.integers(1, 8), st.sampled_from(["sum", "padded"]))
def test_with_a_length_window_a_record_is_passed_over_at_most_once_for_each_one_before_it(own, size, batch_cost):
    """The age limit, while others keep arriving that suit each other better."""
    backlog: Backlog = Backlog(max_batch_size=size, batch_cost=batch_cost, length_window=8)
    (lane,) = fill(backlog, own)
    place = count(len(own))
    taken: set[int] = set()
    for number in range(len(own)):
        if lane.records:
            taken.update(p for _, p in places(backlog.take(60)))
        assert number in taken, "each batch holds the record that waits longest"
        newcomers = [(0, next(place), 1) for _ in range(size)]
        backlog.push(lane, newcomers, [1] * size, [p for _, p, _ in newcomers], now=1.0)


def test_with_a_length_window_a_caller_of_odd_records_gets_its_turn_too():
    backlog: Backlog = Backlog(max_batch_size=4, length_window=8)
    fill(backlog, [1] * 100, [50])
    assert places(backlog.take(100)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert (1, 0) in places(backlog.take(100))


def test_dropped_records_neither_leave_nor_count():
    backlog: Backlog = Backlog(max_batch_size=10)
    (lane,) = fill(backlog, [4, 4, 4])
    backlog.drop(lane, 0, 4)
    backlog.drop(lane, 2, 4)
    assert len(backlog) == 1
    assert not backlog.fills_a_batch(5)
    assert places(backlog.take(5)) == [(0, 1)]


def test_the_oldest_arrival_is_that_of_a_record_somebody_wants():
    backlog: Backlog = Backlog(max_batch_size=10)
    lanes = fill(backlog, [1], [1])
    backlog.drop(lanes[0], 0, 1)
    assert backlog.oldest_arrival() == 1.0
    backlog.discard(lanes[1])
    assert backlog.oldest_arrival() is None
    assert len(backlog) == 0


@pytest.mark.parametrize(("own", "full"), [([1, 1, 1], True), ([1, 1], False), ([9], True), ([], False)])
def test_a_batch_is_full_by_size_or_by_budget(own, full):
    backlog: Backlog = Backlog(max_batch_size=3)
    fill(backlog, own)
    assert backlog.fills_a_batch(9) is full


def test_emptying_the_backlog_leaves_no_rounding_errors_behind():
    backlog: Backlog = Backlog(max_batch_size=1)
    fill(backlog, [0.1, 0.2, 0.3])  # type: ignore[list-item]
    drain(backlog, budget=1)
    assert backlog._cost == 0


@given(callers, st.integers(1, 60), st.data())
def test_halves_and_selections_of_a_batch_keep_records_costs_and_tickets_together(callers, budget, data):
    backlog: Backlog = Backlog(max_batch_size=12)
    lanes = fill(backlog, [1], *callers)
    batch = backlog.take(budget)
    for part in (*batch.halves(), batch.select(sorted(data.draw(st.sets(st.sampled_from(range(len(batch)))))))):
        owners = [(lanes.index(lane), ticket) for lane, tickets in part.parts for ticket in tickets]
        assert owners == places(part)
        assert part.costs == [cost for _, _, cost in part.records]
    first, second = batch.halves()
    assert first.records + second.records == batch.records


@given(st.integers(2, 64), st.integers(10, 60))
def test_a_turn_that_the_budget_cuts_short_goes_on_in_the_next_batch_and_then_ends(turn_size, budget):
    backlog: Backlog = Backlog(max_batch_size=256, turn_size=turn_size)
    fill(backlog, [10] * 500, [10] * 3)
    before_the_second = 0
    while len(backlog):
        callers = [caller for caller, _ in places(backlog.take(budget))]
        if 1 in callers:
            break
        before_the_second += len(callers)
    assert before_the_second <= turn_size
