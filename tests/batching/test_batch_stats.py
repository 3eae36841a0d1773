from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.batching import BatchStats
from flyte_batch.batching.stats import Meter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_second_belongs_to_one_phase_and_the_running_one_counts():
    clock = Clock()
    meter = Meter(clock)
    for phase, seconds in [("off", 5), ("starved", 1), ("assembling", 2), ("busy", 6)]:
        meter.enter(phase)
        clock.now += seconds
    stats = meter.snapshot(queued=0)
    assert (stats.starved_time_s, stats.assembling_time_s, stats.busy_time_s) == (1, 2, 6)
    assert stats.idle_time_s == 3
    assert stats.utilization == pytest.approx(6 / 9)


def test_a_call_that_says_when_the_device_was_at_work_on_it_is_not_busy_before_and_after():
    clock = Clock()
    meter = Meter(clock)
    meter.enter("starved")
    clock.now = 1
    call = meter.launched(1)
    clock.now = 10
    assert meter.snapshot(queued=0).busy_time_s == 9  # nobody knows better yet
    assert not meter.is_told
    call.worked(3, 5)
    meter.landed(call, 0)
    meter.enter("starved")
    clock.now = 11
    stats = meter.snapshot(queued=0)
    assert (stats.starved_time_s, stats.late_time_s, stats.busy_time_s) == (2, 7, 2)
    assert meter.is_told


class Ticking(Clock):
    """No two readings are the same, as of a real clock between two of which another thread runs."""

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_call_that_kept_the_device_for_no_time_makes_no_time_negative():
    meter = Meter(Ticking())
    meter.enter("starved")
    for _ in range(3):
        call = meter.launched(1)
        call.worked(meter._clock.now, meter._clock.now)
        meter.landed(call, 0)
    stats = meter.snapshot(queued=0)
    assert stats.busy_time_s == 0
    assert stats.late_time_s == 6  # handing three calls over, and hearing of their ends


def test_a_snapshot_of_another_thread_is_not_negative():
    clock = Clock()

    class Elsewhere(Meter):
        @property
        def _phases(self):  # the loop's thread has its turn as soon as this one has looked
            phases, self.stored = self.stored, self.stored
            if self.lands is not None:
                clock.now, call, self.lands = 10, self.lands, None
                call.worked(1, 1)
                self.landed(call, 0)
            return phases

        @_phases.setter
        def _phases(self, phases):
            self.stored = phases

        lands = None

    meter = Elsewhere(clock)
    meter.enter("starved")
    clock.now = 1
    meter.lands = meter.launched(1)
    assert meter.snapshot(queued=0).busy_time_s >= 0


def test_times_that_can_not_be_by_the_meters_clock_are_not_believed():
    for began, ended in ((0, 5), (3, 11), (5, 3)):
        clock = Clock()
        meter = Meter(clock)
        clock.now = 1
        call = meter.launched(1)
        clock.now = 10
        call.worked(began, ended)
        meter.landed(call, 0)
        meter.enter("starved")
        stats = meter.snapshot(queued=0)
        assert (stats.busy_time_s, stats.late_time_s, meter.is_told) == (9, 0, False)


def test_what_is_known_when_a_batcher_ends_is_kept_and_what_it_waited_for_is_forgotten():
    clock = Clock()
    meter = Meter(clock)
    first = meter.launched(1)
    clock.now = 4
    meter.launched(2)
    clock.now = 5
    first.worked(0, 1)
    meter.landed(first, 1)
    clock.now = 9
    meter.enter("off")  # with the second one out
    assert (meter.snapshot(queued=0).busy_time_s, meter.snapshot(queued=0).late_time_s) == (6, 3)
    clock.now = 20
    meter.enter("starved")
    call = meter.launched(1)
    clock.now = 30
    call.worked(21, 22)
    meter.landed(call, 0)
    stats = meter.snapshot(queued=0)
    assert (stats.busy_time_s, stats.late_time_s, stats.starved_time_s) == (7, 12, 0)


def test_a_call_that_says_it_several_times_lasts_from_the_first_beginning_to_the_last_end():
    clock = Clock()
    meter = Meter(clock)
    call = meter.launched(1)
    clock.now = 10
    call.worked(3, 6)
    call.worked(1, 2)
    meter.landed(call, 0)
    assert (meter.snapshot(queued=0).busy_time_s, meter.snapshot(queued=0).late_time_s) == (5, 5)


def test_calls_say_when_the_device_was_at_work_only_if_all_with_results_do():
    meter = Meter(Clock())

    def call(*, says: bool, has_results: bool) -> bool:
        made = meter.launched(1)
        if says:
            made.worked(0, 0)
        meter.landed(made, 0, has_results=has_results)
        return meter.is_told

    assert not call(says=False, has_results=False)
    assert call(says=True, has_results=True)
    assert call(says=False, has_results=False)  # refused, or cancelled: there was nothing to say
    assert not call(says=False, has_results=True)  # said to another call, by a task that serves many
    assert not call(says=True, has_results=True)


def test_a_call_that_hangs_does_not_keep_all_that_follow_it():
    clock = Clock()
    meter = Meter(clock)
    hangs = meter.launched(1)
    for _ in range(30_000):
        clock.now += 1
        call = meter.launched(2)
        call.worked(clock.now, clock.now)
        meter.landed(call, 1)
    assert len(meter._calls) + len(meter._spells) <= 200_000  # objects, not records
    before = meter.snapshot(queued=0)
    clock.now += 10
    meter.landed(hangs, 0)
    meter.enter("starved")
    after = meter.snapshot(queued=0)
    assert after.busy_time_s + after.late_time_s == 30_010
    assert after.busy_time_s >= before.busy_time_s
    assert before.busy_time_s >= 10_000


LATER = st.integers(0, 5)


@given(calls=st.lists(st.tuples(LATER, LATER, LATER, LATER, st.booleans()), max_size=12))
def test_busy_is_the_time_with_a_call_at_work_and_no_other(calls: list[tuple[int, int, int, int, bool]]):
    """Of calls that overlap as they like, heard of whenever the loop has time, some of which say nothing."""
    clock = Clock()
    meter = Meter(clock)
    meter.enter("starved")
    at = 0
    events: list[tuple[int, int, int]] = []  # when, 0 to launch or 1 to land, which
    spells: list[tuple[int, int, bool]] = []
    for number, (gap, until_begun, work, until_heard, says) in enumerate(calls):
        at += gap
        began = at + until_begun
        ended = began + work
        events += [(at, 0, number), (ended + until_heard, 1, number)]
        spells.append((began, ended, True) if says else (at, ended + until_heard, False))
    under_way = {}
    for when, lands, number in sorted(events):
        clock.now = when
        if not lands:
            under_way[number] = meter.launched(1)
        else:
            call = under_way.pop(number)
            began, ended, says = spells[number]
            if says:
                call.worked(began, ended)
            meter.landed(call, len(under_way))
            if not under_way:
                meter.enter("starved")
    stats = meter.snapshot(queued=0)
    seconds = {second for began, ended, _ in spells for second in range(began, ended)}
    assert stats.busy_time_s == len(seconds)
    assert stats.busy_time_s + stats.idle_time_s == clock.now


def test_averages_fill_and_padding_follow_from_the_batches():
    meter = Meter(Clock())
    meter.batch_finished(records=2, cost=20, record_cost=12, padded_cost=20, fill=1.0)
    meter.batch_finished(records=4, cost=8, record_cost=6, padded_cost=8, fill=0.5)
    stats = meter.snapshot(queued=3)
    assert (stats.total_batches, stats.avg_batch_size, stats.avg_batch_cost, stats.fill) == (2, 3, 14, 0.75)
    assert stats.padding_efficiency == 18 / 28
    assert stats.queued == 3


def test_stats_of_replicas_add_up_and_their_ratios_follow():
    one = BatchStats(total_batches=1, total_batch_records=10, busy_time_s=1, starved_time_s=1)
    two = BatchStats(total_batches=3, total_batch_records=50, busy_time_s=3, assembling_time_s=1)
    both = sum([one, two])
    assert both == one + two == two + one
    assert both.avg_batch_size == 15
    assert both.utilization == 4 / 6


def test_stats_are_a_copy_nobody_can_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BatchStats().total_batches = 1  # type: ignore[misc]


def test_stats_before_any_batch_are_zero_rather_than_a_division_by_zero():
    stats = BatchStats()
    assert (stats.utilization, stats.avg_batch_size, stats.avg_batch_cost, stats.fill) == (0, 0, 0, 0)
    assert stats.padding_efficiency == 1
