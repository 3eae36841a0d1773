"""A million small rows go through two replicas and a driver, whose memory does not grow with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flyte_batch.data.output import iter_output
from tests.runtime.project.million import main, peak_mib

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run

ROWS, CHUNK_ROWS = 1_000_000, 1_600
WARM = ROWS // 5
"""Rows after which imports, thread stacks and the allocators' reserves are all there."""
GROWTH_MIB = 32
"""What is allowed after that, for the allocators. Less than one text of each row that a replica answers after `WARM`:
400,000 Python strings of 100 characters are 57 MiB."""


def write_rows(path: Path) -> str:
    """Rows of a number and a text of 100 characters."""
    numbers = pa.array(range(ROWS))
    texts = pc.utf8_rpad(pc.binary_join_element_wise("row", pc.cast(numbers, pa.string()), " "), 100, ".")
    pq.write_table(pa.table({"id": numbers, "text": texts}), path, row_group_size=65_536)
    return str(path)


def peaks(cluster: Cluster) -> dict[str, float]:
    """The most memory (MiB) that each replica ever had."""
    return {replica.worker.id: peak_mib(replica.executor()) for replica in cluster.pools["million"].replicas}


async def until_done(run: Run, chunks: int) -> None:
    """Wait until so many chunks are done.

    Raises:
        AssertionError: the run ended before.
    """
    while sum(action.phase == "SUCCEEDED" for action in run.children) < chunks:
        assert not run.phase, f"{run.phase} {run.error}"
        await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_memory_of_driver_and_replicas_stays_flat_while_a_million_rows_go_through(
    cluster: Cluster, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = write_rows(tmp_path / "in.parquet"), tmp_path / "out"
    code = bundle("tests.runtime.project.million")
    run = await cluster.start(main, code, source=source, output=str(output), chunk_size=CHUNK_ROWS)
    await until_done(run, WARM // CHUNK_ROWS)
    assert run.driver is not None
    warm, driver_warm = peaks(cluster), peak_mib(run.driver.pid)
    summary, driver_peak = await run.result(timeout_s=240)
    peak = peaks(cluster)
    print(f"{ROWS / summary.seconds:,.0f} rows/s; MiB: {warm} -> {peak}, driver {driver_warm} -> {driver_peak}")

    assert (summary.rows, summary.failures) == (ROWS, 0)
    assert {attempt.where for action in run.children for attempt in action.attempts} == set(peak) == set(warm)
    for name in peak:
        assert peak[name] - warm[name] < GROWTH_MIB, f"{name} grew from {warm[name]:.0f} to {peak[name]:.0f} MiB"
    assert driver_peak - driver_warm < GROWTH_MIB, f"the driver grew from {driver_warm:.0f} to {driver_peak:.0f} MiB"

    number = 0
    for part in iter_output(str(output), columns=["id", "text", "response"]):
        assert part["id"].to_pylist() == list(range(number, number + part.num_rows))
        assert pc.all(pc.equal(part["text"], part["response"])).as_py()
        number += part.num_rows
    assert number == ROWS
