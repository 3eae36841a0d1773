from __future__ import annotations

import heapq
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.planning.chunks import (
    BATCHES_IN_FLIGHT,
    MAX_CHUNKS,
    MOST_LOST,
    few_at_once,
    plan_chunk_rows,
    stretch,
    tail,
)
from flyte_batch.planning.overheads import CHUNK_GAP_S, FAN_OUT_PER_S, USUAL_ROWS_PER_S

ROWS = st.integers(1, 10**9)
SPEEDS = st.floats(0.01, 1e5)
SHAPES = st.fixed_dictionaries(
    {"replicas": st.integers(1, 200), "concurrency": st.integers(1, 64), "batch_rows": st.integers(1, 4096)}
)
NO_OVERHEADS = 1e-9
"""Rows a second at which they are nothing."""


def stretched(size: int, rows: int, shape: dict[str, Any], speed: float) -> float:
    shape = {name: shape[name] for name in ("replicas", "concurrency")}
    return stretch(min(size, rows), **shape, rows_per_s=speed)


def run_time(size: int, rows: int, shape: dict[str, Any], speed: float) -> float:
    """By the planner's own model, in units of what the rows alone take."""
    return stretched(size, rows, shape, speed) + tail(size, rows, slots=shape["replicas"] * shape["concurrency"])


# -- Any plan ---------------------------------------------------------------


@given(ROWS, SHAPES, st.none() | SPEEDS)
def test_a_plan_respects_the_orchestrators_limit_and_fills_batches(
    rows: int, shape: dict[str, Any], speed: float | None
) -> None:
    size = plan_chunk_rows(rows, **shape, rows_per_s=speed)
    assert -(-rows // size) <= MAX_CHUNKS
    assert size * shape["concurrency"] >= BATCHES_IN_FLIGHT * shape["batch_rows"]


@given(ROWS, SHAPES, SPEEDS)
def test_a_plan_loses_no_more_than_allowed_unless_longer_chunks_would_make_the_run_longer(
    rows: int, shape: dict[str, Any], speed: float
) -> None:
    size = plan_chunk_rows(rows, **shape, rows_per_s=speed)
    if 1 - 1 / stretched(size, rows, shape, speed) > MOST_LOST:
        longer = (run_time(size * 2**doublings, rows, shape, speed) for doublings in range(1, 40))
        assert run_time(size, rows, shape, speed) <= min(longer)


@given(ROWS, SHAPES, SPEEDS)
def test_what_overheads_add_to_the_tail_is_less_than_what_they_would_take(
    rows: int, shape: dict[str, Any], speed: float
) -> None:
    short = plan_chunk_rows(rows, **shape, rows_per_s=NO_OVERHEADS)
    long = plan_chunk_rows(rows, **shape, rows_per_s=speed)
    assert long >= short
    if long > short:
        assert run_time(long, rows, shape, speed) < run_time(short, rows, shape, speed)


@given(ROWS, ROWS, SHAPES, SPEEDS, SPEEDS)
def test_more_rows_and_faster_replicas_never_make_chunks_shorter(
    rows: int, more: int, shape: dict[str, Any], speed: float, faster: float
) -> None:
    size = plan_chunk_rows(rows, **shape, rows_per_s=speed)
    assert plan_chunk_rows(rows + more, **shape, rows_per_s=speed) >= size
    assert plan_chunk_rows(rows, **shape, rows_per_s=speed + faster) >= size


@given(ROWS, SHAPES, st.none() | SPEEDS)
def test_every_size_is_the_smallest_that_fills_batches_some_times_doubled(
    rows: int, shape: dict[str, Any], speed: float | None
) -> None:
    size = plan_chunk_rows(rows, **shape, rows_per_s=speed)
    smallest = plan_chunk_rows(1, **shape, rows_per_s=NO_OVERHEADS)
    assert size in [smallest * 2**doublings for doublings in range(64)]


# -- The model, against a simulation ----------------------------------------


def simulate(chunks: int, *, replicas: int, concurrency: int, device_s: float) -> float:
    """Seconds of a run whose replicas share their device evenly among their chunks, with a gap before each."""
    todo = itertools.count()
    coming = [(CHUNK_GAP_S, replica) for _ in range(concurrency) for replica in range(replicas) if next(todo) < chunks]
    heapq.heapify(coming)
    left: list[list[float]] = [[] for _ in range(replicas)]  # device seconds that each chunk still needs
    now = 0.0
    while coming or any(left):
        next_end = min((min(needs) * len(needs) for needs in left if needs), default=float("inf"))
        step = min(next_end, coming[0][0] - now if coming else float("inf"))
        now += step
        for replica, needs in enumerate(left):
            rest = [need - step / len(needs) for need in needs]
            left[replica] = [need for need in rest if need > 1e-9]
            for _ in range(len(rest) - len(left[replica])):
                if next(todo) < chunks:
                    heapq.heappush(coming, (now + CHUNK_GAP_S, replica))
        while coming and coming[0][0] <= now + 1e-9:
            left[heapq.heappop(coming)[1]].append(device_s)
    return now


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 6), st.floats(0.05, 10))
def test_a_simulated_run_takes_no_longer_than_stretch_and_tail_say(
    chunks: int, replicas: int, concurrency: int, device_s: float
) -> None:
    seconds = simulate(chunks, replicas=replicas, concurrency=concurrency, device_s=device_s)
    rows_alone_s = chunks * device_s / replicas
    stretched = stretch(1000, replicas=replicas, concurrency=concurrency, rows_per_s=1000 / device_s)
    most = stretched + tail(1000, 1000 * chunks, slots=replicas * concurrency)
    assert seconds <= CHUNK_GAP_S + rows_alone_s * most + 1e-6


def test_chunks_that_all_end_together_take_as_long_as_stretch_says() -> None:
    seconds = simulate(400, replicas=1, concurrency=4, device_s=1.0)
    assert seconds == pytest.approx(400 * stretch(1000, replicas=1, concurrency=4, rows_per_s=1000), rel=1e-6)


# -- Examples ---------------------------------------------------------------


def test_slots_see_several_chunks_where_there_are_rows_enough() -> None:
    size = plan_chunk_rows(1_000_000, replicas=4, concurrency=10, batch_rows=256)
    assert 1_000_000 / size / 40 >= 8


@pytest.mark.parametrize("speed", [None, 1, 1000])
def test_a_tiny_dataset_keeps_the_smallest_chunks(speed: float | None) -> None:
    assert plan_chunk_rows(200, replicas=4, concurrency=10, batch_rows=256, rows_per_s=speed) == 77


def test_a_hundred_replicas_do_not_want_chunks_faster_than_one_driver_hands_them_out() -> None:
    def wanted_per_s(chunk_rows: int) -> float:
        return 100 * 100 / chunk_rows

    size = plan_chunk_rows(1_000_000, replicas=100, concurrency=10, batch_rows=256, rows_per_s=100)
    assert wanted_per_s(size) <= FAN_OUT_PER_S < wanted_per_s(size // 2)


def test_a_run_that_is_over_in_a_minute_is_not_cut_into_one_chunk_for_every_slot() -> None:
    size = plan_chunk_rows(1_000_000, replicas=100, concurrency=10, batch_rows=256, rows_per_s=200)
    assert tail(size, 1_000_000, slots=1000) <= 0.5
    assert 100 * 200 / size > FAN_OUT_PER_S  # longer chunks would cost more than the wait for the driver


def test_one_chunk_at_a_time_gets_chunks_that_outweigh_their_gaps() -> None:
    alone: dict[str, Any] = {"replicas": 1, "concurrency": 1, "batch_rows": 256, "rows_per_s": 100}
    size = plan_chunk_rows(10_000_000, **alone)
    assert CHUNK_GAP_S / (size / 100) <= MOST_LOST / (1 - MOST_LOST)


def test_chunks_that_lose_next_to_nothing_stay_short_though_longer_ones_would_lose_less() -> None:
    alone: dict[str, Any] = {"replicas": 1, "concurrency": 1, "batch_rows": 256}
    sizes = {plan_chunk_rows(700_000, **alone, rows_per_s=speed) for speed in (NO_OVERHEADS, 10, 20)}
    assert sizes == {BATCHES_IN_FLIGHT * 256}


def test_a_slow_model_gets_short_chunks_however_many_replicas_there_are() -> None:
    sizes = [
        plan_chunk_rows(300_000, replicas=replicas, concurrency=10, batch_rows=256, rows_per_s=5)
        for replicas in (80, 100, 200)
    ]
    assert set(sizes) == {77}


def test_replicas_of_unknown_speed_are_taken_for_usual_ones() -> None:
    pool: dict[str, Any] = {"replicas": 4, "concurrency": 4, "batch_rows": 64}
    planned = [plan_chunk_rows(400_000, **pool, rows_per_s=speed) for speed in (None, USUAL_ROWS_PER_S, 1_000)]
    assert planned[0] == planned[1] < planned[2]


def test_a_dataset_that_grows_by_some_rows_is_cut_as_before() -> None:
    for lengths in [(300, 5_000, 30_000), (100_000, 200_000), (400_000, 700_000)]:
        assert len({plan_chunk_rows(rows, replicas=2, concurrency=4, batch_rows=256) for rows in lengths}) == 1


def test_a_number_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="batch_rows must be at least 1"):
        plan_chunk_rows(10, replicas=1, concurrency=1, batch_rows=0)
    for speed in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rows_per_s must be a positive number"):
            plan_chunk_rows(10, replicas=1, concurrency=1, batch_rows=1, rows_per_s=speed)


# -- Too few rows at once -----------------------------------------------------


@given(st.integers(1, 10_000), ROWS, SHAPES)
def test_either_cure_of_too_few_rows_at_once_is_one(chunk_rows: int, rows: int, shape: dict[str, Any]) -> None:
    few = few_at_once(chunk_rows, rows, **shape)
    share = -(-rows // shape["replicas"])
    assert (few is not None) is (chunk_rows * shape["concurrency"] < min(shape["batch_rows"], share))
    if few is not None:
        assert few.rows == chunk_rows * shape["concurrency"]
        assert few.chunk_rows > chunk_rows
        assert few.concurrency > shape["concurrency"]
        assert few_at_once(few.chunk_rows, rows, **shape) is None
        assert few_at_once(chunk_rows, rows, **{**shape, "concurrency": few.concurrency}) is None


def test_of_chunks_of_unknown_size_nothing_is_said() -> None:
    assert few_at_once(0, 1_000, replicas=1, concurrency=1, batch_rows=64) is None
