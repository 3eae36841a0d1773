"""What the orchestration costs: a whole run through Flyte's local mode against a bare loop over the same engine.

    python benchmarks/end_to_end.py [--rows 4000] [--rounds 3]

Both in one process, on one engine's worth of model and the same rows, in turns (loop, run, loop, run, ...) after a
warm-up of each, so that drift of the machine hits both. The loop reads the rows, prepares them, infers batch after
batch and keeps the responses; the run reads, plans, fans chunks out as Flyte tasks, infers, writes parts and commits
a manifest. Prints records per second of both and their ratio, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["DO_NOT_TRACK"] = "1"

import flyte

import flyte_batch as fb
from flyte_batch.demo import model_path
from flyte_batch.demo.problems import generate, is_right
from flyte_batch.load.report import conditions
from workflows import generate as workflow

BATCH = workflow.BATCH_ROWS


async def bare_loop(engine: fb.CTranslate2Engine, source: Path) -> float:
    """Seconds to answer the file's rows with nothing around the engine."""
    started = time.perf_counter()
    rows = read(source)
    records = [engine.prepare(fb.Prompt(row["question"])) for row in rows]
    responses = []
    for start in range(0, len(records), BATCH):
        responses += await engine.infer(records[start : start + BATCH])
    seconds = time.perf_counter() - started
    right = sum(is_right(r.text, row["answer"]) for r, row in zip(responses, rows, strict=True))
    assert right >= 0.95 * len(rows), f"only {right} of {len(rows)} right"
    return seconds


def read(source: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in source.read_text().splitlines()]


def whole_run(source: Path, output: Path, rows: int) -> tuple[float, fb.RunSummary]:
    """Seconds of `workflows/generate.py` in Flyte's local mode, and its summary."""
    started = time.perf_counter()
    run = flyte.with_runcontext(mode="local").run(workflow.main, source=str(source), output=str(output))
    run.wait()
    seconds = time.perf_counter() - started
    summary: fb.RunSummary = run.outputs()[0]
    assert (summary.rows, summary.failures) == (rows, 0)
    return seconds, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(conditions())
    flyte.init()
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(fb.CTranslate2Engine.start(model_path("ctranslate2")))
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "problems.jsonl"
        source.write_text("".join(problem.to_json() + "\n" for problem in generate(args.rows, seed=1)))
        small = Path(folder) / "warm-up.jsonl"
        small.write_text("".join(problem.to_json() + "\n" for problem in generate(300, seed=2)))
        loop.run_until_complete(bare_loop(engine, small))
        whole_run(small, Path(folder) / "warm-up", 300)
        for number in range(args.rounds):
            bare = loop.run_until_complete(bare_loop(engine, source))
            whole, summary = whole_run(source, Path(folder) / f"out-{number}", args.rows)
            ratios.append(bare / whole)
            print(
                f"round {number + 1}: bare loop {args.rows / bare:,.0f} rows/s, "
                f"whole run {args.rows / whole:,.0f} rows/s, ratio {bare / whole:.3f}, "
                f"utilization {summary.utilization:.1%}, {summary.chunks} chunks"
            )
    loop.run_until_complete(engine.aclose())
    loop.close()
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
