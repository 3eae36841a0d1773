"""Whether a replica keeps its service level for interactive callers, and up to what rate.

    flyte run --local workflows/load.py main --rate 100
    flyte run workflows/load.py main --source s3://bucket/questions/ --engine vllm --model Qwen/Qwen2.5-7B-Instruct

The load is made inside a replica, against the batcher that its callers share: what travels to it and back over Flyte is
not in the latencies. Without ``--source`` it asks the demo model's problems; without ``--rate`` it searches the highest
rate that keeps the level. Which GPU says the environment variable ``FLYTE_BATCH_GPU`` of the shell that submits the
run. `flyte batch load` does the same in its own process, without Flyte.
"""

from __future__ import annotations

import asyncio
import json
import os

import flyte_batch as fb
from flyte_batch.engines import EngineChoice, start_engine
from flyte_batch.load import ServiceLevel
from flyte_batch.load.measure import measure
from flyte_batch.load.plan import InteractiveBatching, LoadTest, plan_load_test
from flyte_batch.load.report import LoadReport, conclusions, prepare_output, write_report
from flyte_batch.load.view import LoadView
from images import cpu_image, vllm_image

GPU = os.environ.get("FLYTE_BATCH_GPU", "A10G:1")

# A run's own replica: nobody else's work is to be measured.
cpu_replicas = fb.replica_environment(
    "load-cpu", image=cpu_image, cpu=2, memory="4Gi", replicas=1, concurrency=2, scope="run"
)
gpu_replicas = fb.replica_environment(
    "load-gpu", image=vllm_image, gpu=GPU, cpu=4, memory="24Gi", replicas=1, concurrency=2, scope="run"
)
driver = fb.driver_environment(
    "load",
    image=cpu_image,
    depends_on=[cpu_replicas, gpu_replicas],
    env_vars={"FLYTE_BATCH_GPU": GPU},  # the driver imports this file again, and asks for the replicas
)


@fb.singleton
async def solver(
    choice: EngineChoice, sampling: fb.SamplingParameters, engine_options: str, batching: InteractiveBatching
) -> fb.ContinuousBatcher | fb.EngineBatcher:
    """The replica's engine, behind a batcher for callers who wait."""
    engine = await start_engine(choice, sampling, **json.loads(engine_options))
    return batching.batcher(engine, sampling)


async def load(test_json: str) -> str:
    """Load this process's engine."""
    test = LoadTest.from_json(test_json)
    with LoadView() as view:
        report = await measure(
            test,
            lambda: solver(test.choice, test.sampling, test.engine_options, test.batching),
            on_progress=view.hear,
            on_step=lambda step: print(step, flush=True),
        )
    return report.to_json()


@cpu_replicas.task
async def load_cpu(test: str) -> str:
    """`load` on a CPU replica."""
    return await load(test)


@gpu_replicas.task
async def load_gpu(test: str) -> str:
    """`load` on a GPU replica."""
    return await load(test)


@driver.task
async def main(
    source: str | None = None,
    output: str | None = None,
    prompt: str | None = None,
    prompt_column: str = "question",
    prompt_template: str | None = None,
    model: str = "demo",
    engine: str = "auto",
    engine_options: str = "{}",
    max_tokens: int = 256,
    sampling_options: str = "{}",
    rate: float | None = None,
    start_rate: float = 8.0,
    seconds: float = 20.0,
    warm_up_s: float = 5.0,
    timeout_s: float = 10.0,
    precision: float = 0.1,
    seed: int = 0,
    p50_ms: float = 500.0,
    p99_ms: float = 2000.0,
    max_error_rate: float = 0.001,
    min_availability: float = 0.999,
    max_batch_size: int = 64,
    batch_timeout_s: float = 0.005,
    max_queue_size: int = 256,
) -> LoadReport:
    """Load a replica with requests, as many independent callers make them.

    Args:
        source: prompts, JSONL or Parquet: a file, a folder, a glob; the demo model's problems when left out.
        output: file that gets the report, as JSON; for `flyte batch check`.
        prompt: one text to ask again and again instead.
        prompt_column: the column to ask, where no template is given.
        prompt_template: text with {column} fields.
        model: as in generate.py.
        engine: as in generate.py.
        engine_options: as in generate.py.
        max_tokens: most tokens of a response.
        sampling_options: further sampling parameters, a JSON object.
        rate: requests a second; the highest that keeps the level is searched when left out.
        start_rate: the first rate of a search.
        seconds: to measure, in each step of a search.
        warm_up_s: seconds before that, not measured.
        timeout_s: seconds after which a request is given up.
        precision: of a search; 0.1 finds the rate within 10%.
        seed: of the arrivals.
        p50_ms: the median latency must be below.
        p99_ms: 99% of the latencies must be below.
        max_error_rate: the share of errors must be below.
        min_availability: the share of requests that is served must be above.
        max_batch_size: most prompts in a batch, for engines that take batches.
        batch_timeout_s: seconds that a lone prompt waits for others on a free device.
        max_queue_size: most prompts that wait; others are rejected.

    Returns:
        What was measured, on what, and the rate up to which the level was kept.
    """
    fb.require_shared(**{name: path for name, path in (("source", source), ("output", output)) if path is not None})
    if output is not None:
        await asyncio.to_thread(prepare_output, output)
    test = await asyncio.to_thread(
        plan_load_test,
        source=source,
        prompt=prompt,
        prompt_column=prompt_column,
        prompt_template=prompt_template,
        engine=engine,
        model=model,
        engine_options=engine_options,
        max_tokens=max_tokens,
        sampling_options=sampling_options,
        batching=InteractiveBatching(max_batch_size, batch_timeout_s, max_queue_size),
        here=fb.runs_here(),
        rate_per_s=rate,
        start_per_s=start_rate,
        seconds=seconds,
        warm_up_s=warm_up_s,
        timeout_s=timeout_s,
        precision=precision,
        seed=seed,
        level=ServiceLevel(p50_ms, p99_ms, max_error_rate, min_availability),
    )
    task = load_gpu if test.choice.engine == "vllm" else load_cpu
    report = LoadReport.from_json(await task(test.to_json()))
    print(*conclusions(report), sep="\n", flush=True)
    if output is not None:
        await asyncio.to_thread(write_report, report, output)
    return report
