"""``workflows/load.py``, whole: a real driver, and the load in a real replica."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flyte_batch.load.report import read_report
from workflows import load as workflow

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster


async def test_the_load_runs_in_a_replica_and_its_report_comes_back(
    cluster: Cluster, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "load.json"
    run = await cluster.start(
        workflow.main,
        bundle("workflows.load"),
        output=output.as_uri(),
        rate=20.0,
        seconds=3.0,
        warm_up_s=1.0,
        p50_ms=5000.0,
        p99_ms=9000.0,
    )
    report = await run.result()
    (step,) = report.limit.steps
    assert step.ok == step.requests > 20
    assert report.limit.highest_kept_per_s == 20
    assert report == read_report(output.as_uri())
    (action,) = run.children
    (replica,) = cluster.pools["load-cpu"].replicas
    assert [attempt.where for attempt in action.attempts] == [replica.worker.id]
    assert "is kept at 20 requests/s." in run.log
