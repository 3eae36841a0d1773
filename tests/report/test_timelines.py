"""Timelines: their sums are those of the counters and chunks, however they are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.monitoring.details import Sample
from flyte_batch.report.run_log import ChunkEntry, EngineLog
from flyte_batch.report.timelines import MOST_SLICES, edges, timeline, token_rates


def engine(samples: list[Sample], process: str = "one") -> EngineLog:
    return EngineLog(process, process, "FakeEngine", samples[0].at - 1, samples[0].at, samples[-1].at, samples)


STEP = st.tuples(st.floats(0.01, 50), st.floats(0, 1), st.integers(0, 1000), st.integers(0, 9), st.floats(0, 1))


@st.composite
def engines(draw: st.DrawFn) -> EngineLog:
    at, busy, starved, done, batches, fill = draw(st.floats(0, 100)), 0.0, 0.0, 0, 0, 0.0
    samples = [Sample(at, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    for seconds, share, rows, calls, full in draw(st.lists(STEP, min_size=1, max_size=30)):
        at, busy, starved = at + seconds, busy + share * seconds, starved + (1 - share) * seconds
        done, batches, fill = done + rows, batches + calls, fill + calls * full
        samples.append(Sample(at, busy, starved, 0, 0, done, batches, fill, rows, 0))
    return engine(samples, draw(st.sampled_from(["one", "two"])))


@settings(deadline=None)
@given(st.lists(engines(), max_size=3), st.integers(1, 60))
def test_slices_add_up_to_what_the_engines_counted(logs: list[EngineLog], most: int) -> None:
    end = max((log.samples[-1].at for log in logs), default=1.0)
    at = edges(-1.0, end, most)
    slices = timeline(logs, at)
    assert len(slices) == len(at) - 1 <= most
    rows = sum((each.rows_per_s or 0.0) * (each.end - each.start) for each in slices)
    assert rows == pytest.approx(sum(log.samples[-1].completed for log in logs), rel=1e-6, abs=1e-6)
    busy = 0.0
    for each in slices:
        covered = sum(max(0.0, min(each.end, log.samples[-1].at) - max(each.start, log.samples[0].at)) for log in logs)
        assert (each.utilization is None) == (each.replicas == 0)
        assert each.utilization is None or 0 <= each.utilization <= 1
        assert each.fill is None or -1e-9 <= each.fill <= 1 + 1e-9
        busy += (each.utilization or 0.0) * covered
    assert busy == pytest.approx(sum(log.samples[-1].busy_s for log in logs), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50), st.integers(0, 10**6)), max_size=20), st.floats(0.5, 60),
    st.lists(st.none() | st.floats(0, 1000), min_size=MOST_SLICES, max_size=MOST_SLICES),
)  # fmt: skip
def test_token_rates_add_up_to_the_chunks_tokens(
    chunks: list[tuple[float, float, int]], length: float, rows_per_s: list[float | None]
) -> None:
    at = edges(0.0, length)
    entries = [ChunkEntry(0, 1, 0, tokens, 0, "b", start, start + took) for start, took, tokens in chunks]
    rates = token_rates(entries, rows_per_s[: len(at) - 1], at)
    total = sum(rate * (end - start) for rate, (start, end) in zip(rates, itertools.pairwise(at), strict=True))
    assert total == pytest.approx(sum(tokens for _, _, tokens in chunks), rel=1e-6, abs=1e-6)


def test_a_chunks_tokens_are_spread_over_its_time() -> None:
    entry = ChunkEntry(0, 10, 0, 60, 40, "b", started=2.0, ended=4.0)
    assert token_rates([entry], [None] * 4, [0, 1, 2, 3, 4]) == pytest.approx([0, 0, 50, 50])
    assert token_rates([ChunkEntry(1, 10, 0, 0, 0, error="EngineDead")], [None], [0, 1]) == [0]
    early = ChunkEntry(2, 10, 0, 30, 0, "b", started=-5.0, ended=2.0)  # of a clock that is behind
    assert token_rates([early], [None] * 3, [0, 1, 2, 3]) == pytest.approx([15, 15, 0])


def test_tokens_come_as_rows_do_also_where_chunks_wait_for_each_other() -> None:
    """Three under way at a time, answered one after the other, ten rows a second."""
    chunks = [ChunkEntry(i, 10, 0, 600, 400, "b", started=max(0.0, i - 2.0), ended=i + 1.0) for i in range(6)]
    moments = [float(moment) for moment in range(7)]
    assert token_rates(chunks, [10.0] * 6, moments) == pytest.approx([1000] * 6)
    longer = [ChunkEntry(i, 10, 0, 600 * (1 + i // 3), 0, "b", started=float(i), ended=i + 1.0) for i in range(6)]
    assert token_rates(longer, [10.0] * 6, moments) == pytest.approx([600] * 3 + [1200] * 3)


def test_where_a_replica_was_not_there_nothing_is_said() -> None:
    samples = [Sample(10, 0, 0, 0, 0, 0, 0, 0, 0, 0), Sample(20, 8, 2, 0, 0, 50, 5, 4.0, 30, 8)]
    before, during, after = timeline([engine(samples)], [0, 10, 20, 30])
    assert (before.utilization, before.rows_per_s, before.queued, before.fill, before.replicas) == (None,) * 4 + (0,)
    assert (during.utilization, during.rows_per_s, during.fill) == pytest.approx((0.8, 5.0, 0.8))
    assert (during.replicas, after.replicas) == (1, 0)


def test_a_slice_tells_of_its_own_time_only() -> None:
    samples = [
        Sample(0, 0, 0, 0, 0, 0, 0, 0.0, 10, 1),
        Sample(10, 9, 1, 0, 0, 100, 10, 9.0, 20, 1),
        Sample(12, 9, 3, 0, 0, 100, 10, 9.0, 40, 1),
        Sample(20, 11, 9, 0, 0, 140, 50, 19.0, 70, 1),
    ]
    first, second = timeline([engine(samples)], [0, 10, 20])
    assert (first.utilization, first.rows_per_s, first.fill, first.queued) == pytest.approx((0.9, 10.0, 0.9, 10.0))
    assert (second.utilization, second.rows_per_s, second.fill, second.queued) == pytest.approx((0.2, 4.0, 0.25, 30.0))
    (between,) = timeline([engine(samples)], [13, 19])  # no sample in it: the neighbours' queues
    assert (between.queued, between.fill) == pytest.approx((55.0, 0.25))
    ((_, idle),) = [timeline([engine(samples)], [9, 10, 12])]
    assert (idle.fill, idle.utilization) == (None, 0.0)


def test_engines_of_one_process_are_one_replica() -> None:
    first = engine([Sample(0, 0, 0, 0, 0, 0, 0, 0, 0, 0), Sample(10, 5, 5, 0, 0, 10, 1, 1, 4, 0)])
    second = engine([Sample(0, 0, 0, 0, 0, 0, 0, 0, 0, 0), Sample(10, 10, 0, 0, 0, 30, 1, 0, 6, 0)])
    (both,) = timeline([first, second], [0, 10])
    assert (both.replicas, both.utilization, both.rows_per_s, both.fill) == (1, 0.75, 4.0, 0.5)


@pytest.mark.parametrize(("length", "slices"), [(0.0, 0), (0.2, 1), (3.0, 6), (1000.0, MOST_SLICES)])
def test_slices_are_no_shorter_than_half_a_second_and_no_more_than_can_be_drawn(length: float, slices: int) -> None:
    assert max(0, len(edges(5.0, 5.0 + length)) - 1) == slices
