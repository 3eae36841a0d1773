"""Whole runs are one trace each: with flyteplugins-otel in Flyte's local mode, and without Flyte."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("flyteplugins.otel", reason="needs the extra monitoring")

import flyte_batch as fb
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, questions
from tests.monitoring.otlp_collector import collecting, tracing

WORKFLOW = """
import flyte_batch as fb
from flyteplugins import otel

otel.init(service_name="solve")

if {own_hook}:
    from flyte_batch.monitoring import hooks
    from flyte_batch.monitoring.otel import OtelHook

    hooks.subscribe(OtelHook(sample_records=1))

replicas = fb.replica_environment("solver", image="unused", cpu=1, replicas=(1, 1), concurrency=4)
driver = fb.driver_environment("solve", image="unused", depends_on=[replicas])


@fb.singleton
async def solver():
    return fb.EngineBatcher(fb.FakeEngine(fail_on={{"question 7"}}), batch_timeout_s=0.05)


@replicas.task
async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{{question}}")


@driver.task
async def main(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk, chunk_size=10, settings={{"engine": "fake"}})
"""


@pytest.mark.parametrize("attached", ["by environment", "by hand"])
def test_with_flyteplugins_otel_driver_and_chunks_are_one_trace(attached: str, tmp_path: Path) -> None:
    own_hook = attached == "by hand"
    (tmp_path / "traced.py").write_text(WORKFLOW.format(own_hook=own_hook))
    source = questions(tmp_path / "questions.jsonl", 40)
    with collecting() as collector:
        environment = {
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "FLYTE_BATCH_MONITORING": "" if own_hook else "otel",
        }
        run = subprocess.run(
            [FLYTE, "run", "--local", "traced.py", "main", "--source", source, "--output", str(tmp_path / "out")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert len({span.trace_id for span in collector.spans}) == 1
    paths = Counter(" > ".join(collector.path(span)) for span in collector.spans)
    to_chunk = "solve.main > run > solver.infer_chunk > chunk"
    assert paths["solve.main"] == paths["solve.main > run"] == 1
    assert paths[to_chunk] == 4
    assert paths[f"{to_chunk} > load"] == 1
    assert sum(span.attributes["flyte_batch.records"] for span in collector.named("batch")) == 40
    assert sum(span.attributes["flyte_batch.failed"] for span in collector.named("batch")) == 1
    assert sum(span.attributes["flyte_batch.chunk.rows"] for span in collector.named("chunk")) == 40
    assert collector.one("run").attributes["flyte_batch.run.rows"] == 40
    assert collector.one("run").attributes["flyte_batch.run.failures"] == 1
    if own_hook:
        assert paths[f"{to_chunk} > batch > record"] == 40
    else:
        assert paths[f"{to_chunk} > batch"] >= 1
    for chunk in collector.named("chunk"):
        task = collector.by_id()[chunk.parent_id]
        for name in ("flyte.run_name", "flyte.action_name"):
            assert chunk.attributes[name] == task.attributes[name]


async def test_a_run_without_flyte_is_one_trace(tmp_path: Path) -> None:
    source = questions(tmp_path / "questions.jsonl", 20)

    @fb.singleton
    async def solver() -> fb.EngineBatcher:
        return fb.EngineBatcher(fb.FakeEngine())

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    with tracing(sample_records=1) as (collector, _):
        await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=5, code_version="1")
    assert len({span.trace_id for span in collector.spans}) == 1
    paths = Counter(" > ".join(collector.path(span)) for span in collector.spans)
    assert (paths["run"], paths["run > chunk"]) == (1, 4)
    assert paths["run > chunk > batch > record"] == 20
    assert collector.one("run").attributes["flyte_batch.run.rows"] == 20


async def test_a_run_whose_engine_dies_again_and_again_says_so_on_chunk_and_run(tmp_path: Path) -> None:
    source = questions(tmp_path / "questions.jsonl", 4)

    @fb.singleton
    async def solver() -> fb.EngineBatcher:
        return fb.EngineBatcher(fb.FakeEngine(dies_after=0))

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    with tracing() as (collector, _), pytest.raises(fb.ChunkFailed):
        await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=4, code_version="1")
    run, *others = collector.named("run")
    assert not others
    assert (run.failed, run.attributes["error.type"]) == (True, "ChunkFailed")
    reported = [event for event in run.events if event.name == "flyte_batch.chunk.failed"]
    chunks = collector.named("chunk")
    assert len(reported) == len(chunks) >= 1
    for chunk in chunks:
        assert chunk.failed
        assert chunk.attributes["error.type"] in ("EngineDead", "BatcherDied")
        died = [event for event in chunk.events if "flyte_batch.lost" in event.attributes]
        assert [event.attributes["exception.type"] for event in died] == ["EngineDead", "EngineDead"]
    assert len(collector.named("load")) == 2 * len(chunks)
