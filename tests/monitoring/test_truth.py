"""The demo job with all backends on: what each of them says agrees with the others and with the rows themselves."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.data.chunks import ChunkReport
from flyte_batch.demo import model_path
from flyte_batch.demo.problems import generate
from flyte_batch.monitoring.backends import VARIABLE
from flyte_batch.report.run_log import logs_from_json
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, write_jsonl

pytest.importorskip("prometheus_client")
pytest.importorskip("flyteplugins.otel")
pytest.importorskip("ctranslate2")

from tests.monitoring.otlp_collector import collecting
from tests.monitoring.tools import Gateway, value

ROWS, EMPTY, LONG = 900, 7, 3


def demo_source(folder: Path) -> str:
    """Problems, among them rows that fail: empty ones, and ones that are too long for the model."""
    rows: list[dict[str, Any]] = [{"question": problem.question} for problem in generate(ROWS, seed=5)]
    for number in range(EMPTY):
        rows[100 * number + 11]["question"] = ""
    for number in range(LONG):
        rows[200 * number + 17]["question"] = "many words " * 2000
    return write_jsonl(folder / "in.jsonl", rows)


def test_report_prometheus_traces_logs_and_manifest_agree_with_each_other_and_with_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "out"
    gateway = Gateway()
    with collecting() as collector:
        done = subprocess.run(
            [FLYTE, "run", "--local", "workflows/generate.py", "main", "--chunk_size", "64",
             "--source", demo_source(tmp_path), "--output", str(output)],
            cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
            env={**ENVIRONMENT, VARIABLE: f"logs:debug,push:http://{gateway.address},otel",
                 "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "FLYTE_BATCH_PROGRESS": "plain"},
        )  # fmt: skip
        gateway.close()
    assert done.returncode == 0, done.stderr[-3000:]

    # The rows, counted by hand.
    table = fb.read_output(str(output)).to_pylist()
    errors = Counter(row["error"].partition(":")[0] for row in table if row["error"])
    truth = {
        "rows": len(table),
        "failures": sum(errors.values()),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in table),
        "response_tokens": sum(row["response_tokens"] or 0 for row in table),
    }
    assert (truth["rows"], truth["failures"]) == (ROWS, EMPTY + LONG)
    assert errors == {"MissingValue": EMPTY, "PromptTooLong": LONG}
    chunks = -(-ROWS // 64)
    answered = ROWS - EMPTY - LONG

    # The manifest.
    totals = json.loads((output / "_manifest.json").read_text())["totals"]
    assert {name: totals[name] for name in truth} == truth
    assert totals["causes"] == errors

    # What the run says of itself, on the terminal and in its report.
    assert re.search(rf"\b{ROWS:,}/{ROWS:,} rows \(100%\).*\b{EMPTY + LONG} failed", done.stdout)
    (log,) = logs_from_json((output / "_report.json").read_bytes())
    assert {name: getattr(log, name) for name in truth} == truth
    assert (log.causes, log.outcome, len(log.chunks)) == (errors, "done", chunks)
    assert sum(log.prompt_lengths.values()) == sum(log.response_lengths.values()) == answered
    assert sum(log.latencies.values()) == answered
    page = re.sub(r"<[^>]+>", " ", (output / "_report.html").read_text())
    for number in truth.values():
        assert re.search(rf"(?<![\d,]){number:,}(?![\d,])", page), number
    assert f"{log.utilization:.0%}" in page

    # Prometheus.
    series = gateway.pushes[-1][3]
    assert value(series, "flyte_batch_rows_total", outcome="ok") == answered
    assert value(series, "flyte_batch_rows_total", outcome="failed") == EMPTY + LONG
    for cause, number in errors.items():
        assert value(series, "flyte_batch_row_failures_total", cause=cause) == number
    for kind in ("prompt", "response"):
        assert value(series, "flyte_batch_tokens_total", kind=kind) == truth[f"{kind}_tokens"]
    assert value(series, "flyte_batch_chunks_total", outcome="done") == chunks
    busy = value(series, "flyte_batch_device_seconds_total", engine="CTranslate2Engine", state="busy")
    assert busy == pytest.approx(log.time_shares().busy, rel=0.02)

    # Traces: one, whose batches and records are the rows that reached the engine.
    (trace_id,) = {span.trace_id for span in collector.spans}
    of_chunks = collector.named("chunk", trace_id)
    assert len(of_chunks) == chunks
    sums: Counter[str] = Counter()
    for span in of_chunks:
        sums.update({name: number for name, number in span.attributes.items() if isinstance(number, int)})
    assert (sums["flyte_batch.chunk.rows"], sums["flyte_batch.chunk.failures"]) == (ROWS, EMPTY + LONG)
    assert sums["gen_ai.usage.input_tokens"] == truth["prompt_tokens"]
    assert sums["gen_ai.usage.output_tokens"] == truth["response_tokens"]
    batches = collector.named("batch", trace_id)
    assert sum(span.attributes["flyte_batch.records"] for span in batches) == answered
    assert sum(point.value for point in collector.metric("flyte_batch.rows")) == ROWS

    # Logs.
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"')]
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_event.setdefault(line["event"], []).append(line)
    assert sum(line["rows"] for line in by_event["chunk_done"]) == ROWS
    assert sum(line["failures"] for line in by_event["chunk_done"]) == EMPTY + LONG
    assert sum(line["records"] for line in by_event["batch_done"]) == answered
    assert sum(line["records"] for line in by_event["records_submitted"]) == answered
    assert len(by_event["record_failed"]) == EMPTY + LONG
    assert len({line["action"] for line in by_event["chunk_done"]}) == chunks  # each chunk is an action of its own


class Witness:
    """Measures by a clock of its own, on the engine's thread, how long CTranslate2's batches take, end to end."""

    def __init__(self, engine: fb.CTranslate2Engine) -> None:
        self.busy_s = 0.0
        self._infer = engine._infer
        engine._infer = self.infer  # type: ignore[method-assign]

    def infer(self, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._infer(*args)
        finally:
            self.busy_s += time.perf_counter() - started


async def hold_the_loop(seconds: float) -> None:
    """As code of a user's does that computes on it, again and again; other threads go on."""
    while True:
        time.sleep(seconds)  # noqa: ASYNC251 - what is tested
        await asyncio.sleep(seconds / 10)


@pytest.mark.parametrize(
    ("rest", "held_s"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.4)],
    ids=["kept busy", "starved half of the time", "held up by the event loop"],
)  # fmt: skip
async def test_utilisation_agrees_with_a_clock_of_its_own_on_the_engines_thread(
    tmp_path: Path, rest: float, held_s: float
) -> None:
    witnesses: list[Witness] = []

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        engine = await fb.CTranslate2Engine.start(model_path())
        witnesses.append(Witness(engine))
        return fb.EngineBatcher(engine, max_batch_size=128)

    spans: list[tuple[float, float]] = []

    async def infer_chunk(chunk: fb.Chunk) -> ChunkReport:
        started = time.perf_counter()
        report = await fb.infer(chunk, solver, prompt="{question}")
        spans.append((started, time.perf_counter()))
        await asyncio.sleep(rest * (spans[-1][1] - started))
        return report

    source = write_jsonl(tmp_path / "in.jsonl", [{"question": each.question} for each in generate(1600, seed=9)])
    concurrency = 1 if rest else 4
    holding = asyncio.create_task(hold_the_loop(held_s)) if held_s else None
    summary = await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=200, concurrency=concurrency)
    if holding is not None:
        holding.cancel()
    (log,) = logs_from_json((tmp_path / "out" / "_report.json").read_bytes())
    wall = log.ended - log.engines[next(iter(log.engines))].started
    seen = spans[-1][1] + rest * (spans[-1][1] - spans[-1][0]) - spans[0][0]
    assert wall == pytest.approx(seen, rel=0.1, abs=0.1)
    measured = witnesses[0].busy_s / wall
    assert abs(summary.utilization - measured) < 0.02, (summary.utilization, measured, log.time_shares())
    assert not log.time_shares().is_upper_bound
    if rest:
        assert measured < 0.6
    if held_s:
        assert log.time_shares().blocked > 0.1 * wall
