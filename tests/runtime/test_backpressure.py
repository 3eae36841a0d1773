"""Two levels of backpressure: a full batcher lets its callers wait, and a full replica lets calls wait outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from flyte_batch.data.chunks import plan_chunks
from flyte_batch.data.sources import open_source
from tests.helpers import write_jsonl
from tests.runtime.project import backpressure
from tests.runtime.project.backpressure import CONCURRENCY, ON_DEVICE, QUEUE, Seen

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster

CALLS, ROWS = 5, 5_000
WINDOW = 4_096
"""Rows of a call that a `Pipeline` has between prompt and finish."""


@pytest.mark.parametrize("solver", ["batching", "continuous"])
async def test_a_full_batcher_holds_its_callers_and_a_full_replica_the_calls_until_there_is_room(
    cluster: Cluster, bundle: Callable[..., Path], tmp_path: Path, solver: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"row {i}"} for i in range(CALLS * ROWS)])
    (tmp_path / "out").mkdir()
    chunks = plan_chunks(open_source(source), str(tmp_path / "out"), ROWS, settings={})
    code = bundle("tests.runtime.project.backpressure")
    runs = [
        await cluster.start(backpressure.ask, code, chunk=chunk, solver=solver, folder=str(tmp_path))
        for chunk in chunks
    ]

    def begun() -> list[Seen]:
        return [Seen(**json.loads(file.read_text())) for file in tmp_path.glob("*.json")]

    full = Seen(most_ahead=WINDOW, most_queued=QUEUE, most_on_device=ON_DEVICE)
    while len(begun()) < CONCURRENCY or begun() != [full] * len(begun()):
        assert not any(run.phase for run in runs), [run.error for run in runs]
        await asyncio.sleep(0.05)
    (replica,) = cluster.pools["backpressure"].replicas
    for _ in range(2):  # heard anew from the replica, all is as it was
        async with replica.worker.heartbeat:
            await replica.worker.heartbeat.wait()
    assert begun() == [full] * CONCURRENCY
    assert replica.worker.busy == len(replica.worker.calls) == CONCURRENCY
    assert not list((tmp_path / "out").iterdir())

    (tmp_path / "open").touch()
    for run in runs:
        seen = Seen(**json.loads(await run.result()))
        assert seen.most_ahead == WINDOW
        assert seen.most_queued <= QUEUE
        assert seen.most_on_device <= ON_DEVICE
        assert [attempt.error for attempt in run.root.attempts] == [None]
    for chunk in chunks:
        part = pq.read_table(tmp_path / "out" / chunk.part)
        assert part["response"].to_pylist() == part["text"].to_pylist()
