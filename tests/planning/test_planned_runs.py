from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flyte_batch as fb
from tests.helpers import questions


async def run(source: str, output: Path, **options: Any) -> fb.RunSummary:
    async def load() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(fb.FakeEngine())

    solver = fb.singleton(load)

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    return await fb.run(source, str(output), run_chunk, code_version="1", batch_rows=2, **options)


async def test_a_run_told_that_its_replicas_are_fast_makes_longer_chunks(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 400)
    slow = await run(source, tmp_path / "slow", concurrency=2, rows_per_s=0.01)
    fast = await run(source, tmp_path / "fast", concurrency=2, rows_per_s=1000)
    assert slow.chunks == 134  # of three rows each: together three batches
    assert fast.chunks < slow.chunks / 4


async def test_an_output_that_was_begun_keeps_its_chunks_whatever_is_known_of_the_speed_now(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 400)
    begun = await run(source, tmp_path / "out", concurrency=2, rows_per_s=0.01, limit=200)
    told = await run(source, tmp_path / "out", concurrency=2, rows_per_s=1000)
    assert (begun.chunks, told.chunks, told.chunks_reused) == (67, 134, 66)  # the limit cut the 67th short


@pytest.mark.parametrize("speed", [0, -1.0, float("inf"), float("nan")])
async def test_a_speed_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, speed: float) -> None:
    with pytest.raises(fb.BadInput, match=r"rows_per_s must be a positive number.*leave it out"):
        await run(questions(tmp_path / "in.jsonl", 4), tmp_path / "out", rows_per_s=speed)
    assert not (tmp_path / "out").exists()
