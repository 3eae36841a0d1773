"""Two runs at once on two real replicas, with all backends on: whose is what, and does it add up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.demo.problems import generate
from flyte_batch.monitoring.backends import VARIABLE
from flyte_batch.report.run_log import logs_from_json
from tests.helpers import write_jsonl
from workflows import generate as workflow

pytest.importorskip("flyteplugins.otel")
pytest.importorskip("prometheus_client")

from tests.monitoring.otlp_collector import collecting
from tests.monitoring.tools import Gateway, value
from tests.runtime.jobs import SLOW

ROWS, CHUNK_ROWS = 250, 25


def json_lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith('{"event"')]


def records(batches: list[Any]) -> int:
    return sum(span.attributes["flyte_batch.records"] for span in batches)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not condition():  # noqa: ASYNC110 - other processes' work
            await asyncio.sleep(0.1)


async def test_two_runs_on_shared_replicas_each_have_their_own_trace_logs_report_and_sums(
    generate_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.runtime.cluster import Cluster

    gateway = Gateway()
    async with contextlib.AsyncExitStack() as stack:
        collector = stack.enter_context(collecting())
        variables = {
            VARIABLE: f"logs:debug,otel,push:http://{gateway.address}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        # What the shell would have had when it submitted; the driver passes it on to its replicas.
        monkeypatch.setattr(workflow.main, "env_vars", {**(workflow.main.env_vars or {}), **variables})
        cluster = await stack.enter_async_context(
            Cluster(tmp_path / "cluster", env={"OTEL_BSP_SCHEDULE_DELAY": "200"}).up()
        )
        bundle, runs, outputs = generate_bundle(SLOW), [], [tmp_path / "a", tmp_path / "b"]
        for number, output in enumerate(outputs):
            rows = [{"question": problem.question} for problem in generate(ROWS, number)]
            source = Path(write_jsonl(tmp_path / f"{number}.jsonl", rows)).as_uri()
            options = {"source": source, "output": output.as_uri(), "chunk_size": CHUNK_ROWS}
            runs.append(await cluster.start(workflow.main, bundle, **options))
        summaries = await asyncio.gather(*(run.result() for run in runs))
        replicas = list(cluster.pools["generate-cpu"].replicas)
        # What replicas push and export comes a little later.
        await until(lambda: _rows_pushed(gateway) == 2 * ROWS)
        await until(lambda: len(collector.named("chunk")) == 2 * ROWS // CHUNK_ROWS)
        await until(
            lambda: sum(span.attributes["flyte_batch.records"] for span in collector.named("batch")) >= 2 * ROWS
        )
    gateway.close()
    assert [summary.rows for summary in summaries] == [ROWS, ROWS]

    # Logs: what a shared batcher does is its callers', by run and by action.
    done: dict[str, Counter[str]] = defaultdict(Counter)
    for replica in replicas:
        for line in json_lines(replica.log):
            if line["event"] == "batch_done":
                done[line["run"]][line["action"]] += line["records"]
    for run in runs:
        assert done[run.name] == {action.name: CHUNK_ROWS for action in run.children}

    # Traces: one a run, from the driver's task to the batches, whole.
    for run in runs:
        (of_run,) = [span for span in collector.named("run") if span.attributes["flyte.run_name"] == run.name]
        trace = of_run.trace_id
        assert len(collector.named("chunk", trace)) == ROWS // CHUNK_ROWS
        assert records(collector.named("batch", trace)) == ROWS
        path = collector.path(collector.named("batch", trace)[0])
        assert path[-2:] == ["chunk", "batch"]
        assert path.index("run") < path.index("chunk")

    # Reports: of both replicas, with a time of their own.
    for output, summary in zip(outputs, summaries, strict=True):
        (log,) = logs_from_json((output / "_report.json").read_bytes())
        assert (log.rows, log.outcome, log.utilization) == (ROWS, "done", pytest.approx(summary.utilization, abs=1e-4))
        assert len({engine.process for engine in log.engines.values()}) == len(log.engines) == 2
        assert sum(engine.rows for engine in log.engines.values()) == ROWS
        assert sum(log.latencies.values()) == ROWS
        assert (output / "_report.html").stat().st_size > 10_000


def _rows_pushed(gateway: Gateway) -> float:
    """Of the last push of each process."""
    latest = {path: series for _, path, _, series in list(gateway.pushes)}
    return sum(value(series, "flyte_batch_rows_total", outcome="ok") or 0 for series in latest.values())
