"""A run over drivers and replicas is one trace, with flyteplugins-otel, whoever else uses the replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("flyteplugins.otel", reason="make test-runtime")
pytest.importorskip("uvicorn", reason="make test-runtime")

from tests.helpers import write_jsonl
from tests.monitoring.otlp_collector import collecting
from tests.runtime.cluster import Cluster
from tests.runtime.project import traced

ROWS = 30


async def test_two_runs_on_one_replica_are_a_trace_each_from_the_driver_to_shared_batches(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    def asked() -> int:
        return len(list(tmp_path.glob("asked *")))

    code = bundle("tests.runtime.project.traced")
    with collecting() as collector:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds; the replica is killed at the end
            "TRACED_FOLDER": str(tmp_path),
        }
        async with Cluster(tmp_path / "cluster", replicas=1, env=env).up() as cluster:
            runs = []
            for name in ("first", "second"):
                source = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(ROWS)])
                runs.append(await cluster.start(traced.main, code, source=source, output=str(tmp_path / f"{name}-out")))
            async with asyncio.timeout(60):
                while asked() < 2 * ROWS:
                    assert not any(run.phase for run in runs), [run.error + run.log for run in runs]
                    await asyncio.sleep(0.05)
            (tmp_path / "open").touch()
            for run in runs:
                assert (await run.result()).rows == ROWS
            async with asyncio.timeout(30):  # the last to end on the replica are the spans of the tasks
                while len(collector.named("traced.infer_chunk")) < 2 * ROWS / 10:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    roots = {root.attributes["flyte.run_name"]: root for root in collector.named("traced-driver.main")}
    assert set(roots) == {run.name for run in runs}
    assert len({root.trace_id for root in roots.values()}) == 2
    shared = 0
    for name, root in roots.items():
        mine = [span for span in collector.spans if span.trace_id == root.trace_id]
        to_chunk = "traced-driver.main > run > traced.infer_chunk > chunk"
        for path in (to_chunk, f"{to_chunk} > batch", f"{to_chunk} > batch > record"):
            kind = path.rpartition(" ")[2]
            assert {" > ".join(collector.path(span)) for span in mine if span.name == kind} <= {path}
        chunks = [span for span in mine if span.name == "chunk"]
        batches = [span for span in mine if span.name == "batch"]
        for total in (
            sum(chunk.attributes["flyte_batch.chunk.rows"] for chunk in chunks),
            sum(chunk.attributes["flyte_batch.records"] for chunk in chunks),
            sum(batch.attributes["flyte_batch.records"] for batch in batches),
            sum(span.attributes["flyte_batch.run.rows"] for span in mine if span.name == "run"),
        ):
            assert total == ROWS
        assert {span.attributes["flyte.run_name"] for span in (*chunks, *batches)} == {name}
        shared += sum(any(link.trace_id != root.trace_id for link in batch.links) for batch in batches)
    assert shared, "no batch was shared"
