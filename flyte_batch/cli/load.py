"""``flyte batch load``: whether the engine keeps its service level, and up to what rate."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import textwrap
from typing import Any

import click

from flyte_batch.batching.engine_batcher import EngineOwner
from flyte_batch.engines import start_engine
from flyte_batch.errors import FlyteBatchError
from flyte_batch.load.generator import LoadResult
from flyte_batch.load.levels import ServiceLevel
from flyte_batch.load.measure import measure
from flyte_batch.load.plan import InteractiveBatching, LoadTest, plan_load_test
from flyte_batch.load.report import TABLE_HEADER, LoadReport, conclusions, prepare_output, table_row, write_report
from flyte_batch.load.view import LoadView
from flyte_batch.records import Completion
from flyte_batch.singletons import close_all, singleton


@click.command("load")
@click.option("--source", help="Prompts: JSONL or Parquet, a file, a folder or a glob. Left out: the demo's problems.")
@click.option("--prompt", help="One text to ask again and again, instead of a source.")
@click.option("--prompt_column", default="question", show_default=True, help="The source's column to ask.")
@click.option("--prompt_template", help="A text with {column} fields to ask instead.")
@click.option("--engine", default="auto", show_default=True, help="auto, ctranslate2, vllm or fake.")
@click.option("--model", default="demo", show_default=True, help="demo, a folder or a Hugging Face id.")
@click.option("--engine_options", default="{}", help="Further options of the engine, a JSON object.")
@click.option("--max_tokens", default=256, show_default=True, help="Most tokens of a response.")
@click.option("--sampling_options", default="{}", help="Further sampling parameters, a JSON object.")
@click.option("--rate", "rate_per_s", type=float, help="Requests a second; without it, the highest rate is searched.")
@click.option("--start_rate", "start_per_s", default=8.0, show_default=True, help="The first rate of a search.")
@click.option("--seconds", default=20.0, show_default=True, help="To measure, in each step of a search.")
@click.option("--warm_up_s", default=5.0, show_default=True, help="Seconds before that, not measured.")
@click.option("--timeout_s", default=10.0, show_default=True, help="A request is given up after so many seconds.")
@click.option("--precision", default=0.1, show_default=True, help="Of a search: 0.1 finds the rate within 10%.")
@click.option("--seed", default=0, show_default=True, help="Of the arrivals.")
@click.option("--p50_ms", default=500.0, show_default=True, help="The median latency must be below.")
@click.option("--p99_ms", default=2000.0, show_default=True, help="99% of the latencies must be below.")
@click.option("--max_error_rate", default=0.001, show_default=True, help="The share of errors must be below.")
@click.option("--min_availability", default=0.999, show_default=True, help="The share that is served must be above.")
@click.option("--max_batch_size", default=64, show_default=True, help="Most prompts in a batch.")
@click.option("--batch_timeout_s", default=0.005, show_default=True, help="A lone prompt waits so long for others.")
@click.option("--max_queue_size", default=256, show_default=True, help="Most prompts that wait; others are rejected.")
@click.option("--output", help="Write the report, as JSON, here.")
def command(
    output: str | None,
    p50_ms: float,
    p99_ms: float,
    max_error_rate: float,
    min_availability: float,
    max_batch_size: int,
    batch_timeout_s: float,
    max_queue_size: int,
    **options: Any,
) -> None:
    """Find the rate up to which an engine of this machine keeps its service level, or try one rate.

    Requests come as those of many independent callers do (Poisson), whether the engine keeps up or not, and their
    latency counts from when they were due. The exit code is 1 if the level is not kept at --rate, or at no rate.
    """
    try:
        if output is not None:
            prepare_output(output)
        test = plan_load_test(
            level=ServiceLevel(p50_ms, p99_ms, max_error_rate, min_availability),
            batching=InteractiveBatching(max_batch_size, batch_timeout_s, max_queue_size),
            **options,
        )
        click.echo(f"{test.choice.engine}, {test.choice.model}: loading ...")
        report = asyncio.run(_run(test))
        if output is not None:
            write_report(report, output)
    except (FlyteBatchError, OSError) as error:
        raise click.ClickException(str(error)) from error
    width = min(shutil.get_terminal_size().columns, 100)
    for paragraph in conclusions(report):
        click.echo(textwrap.fill(paragraph, width, subsequent_indent="  "))
    if not report.is_kept:
        raise SystemExit(1)


async def _run(test: LoadTest) -> LoadReport:
    @singleton
    async def solver() -> EngineOwner[Any, Completion, Any]:
        engine = await start_engine(test.choice, test.sampling, **json.loads(test.engine_options))
        return test.batching.batcher(engine, test.sampling)

    header = [TABLE_HEADER]

    def show(step: LoadResult) -> None:
        while header:
            click.echo(header.pop())
        click.echo(table_row(step))

    try:
        with LoadView(sys.stderr) as view:
            return await measure(test, solver, on_progress=view.hear, on_step=show)
    finally:
        await close_all()
