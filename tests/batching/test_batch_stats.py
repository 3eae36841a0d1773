from __future__ import annotations

import dataclasses

import pytest

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
