from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.planning.chunks import BATCHES_IN_FLIGHT, MAX_CHUNKS, plan_chunk_rows


@given(st.integers(1, 10**9), st.integers(1, 100), st.integers(1, 64), st.integers(1, 4096))
def test_a_plan_respects_the_orchestrators_limit_and_fills_batches(
    rows: int, replicas: int, concurrency: int, batch_rows: int
) -> None:
    size = plan_chunk_rows(rows, replicas=replicas, concurrency=concurrency, batch_rows=batch_rows)
    assert -(-rows // size) <= MAX_CHUNKS
    assert size * concurrency >= BATCHES_IN_FLIGHT * batch_rows


def test_slots_see_several_chunks_where_there_are_rows_enough() -> None:
    size = plan_chunk_rows(1_000_000, replicas=4, concurrency=10, batch_rows=256)
    assert 1_000_000 / size / 40 >= 8


def test_a_dataset_that_grows_by_some_rows_is_cut_as_before() -> None:
    sizes = [plan_chunk_rows(n, replicas=2, concurrency=4, batch_rows=256) for n in (300, 5_000, 100_000, 150_000)]
    assert len(set(sizes)) == 1


def test_a_number_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="batch_rows must be at least 1"):
        plan_chunk_rows(10, replicas=1, concurrency=1, batch_rows=0)
