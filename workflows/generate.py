"""Answer every row of a dataset with a language model.

    flyte run --local workflows/generate.py main --source questions.jsonl --output out/answers
    flyte run workflows/generate.py main --source s3://bucket/questions/ --output s3://bucket/answers \\
        --engine vllm --model Qwen/Qwen2.5-7B-Instruct

Finds what is wrong with its input before a model loads, shows progress, survives being killed (run the same command
again: finished chunks are kept), and leaves Parquet parts with a manifest. Without ``--local`` it runs on the cluster
of your Flyte configuration, with paths that its containers can reach: vLLM on GPU replicas, all else on CPU replicas.
Which GPU, and how many of them at most, say the environment variables ``FLYTE_BATCH_GPU`` and ``FLYTE_BATCH_REPLICAS``
of the shell that submits the run; ``FLYTE_BATCH_MONITORING`` says who hears of it, ``FLYTE_BATCH_GRAFANA`` where
the dashboard is that Flyte's UI links to (docs/monitoring.md).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import timedelta

import flyte

import flyte_batch as fb
from flyte_batch.engines import EngineChoice, check_engine_options, choose_engine, start_engine
from flyte_batch.fingerprint import fingerprint
from flyte_batch.monitoring.links import GrafanaDashboard
from flyte_batch.options import parse_object, parse_schema, sampling_parameters
from images import cpu_image, vllm_image

GPU = os.environ.get("FLYTE_BATCH_GPU", "A10G:1")
REPLICAS = int(os.environ.get("FLYTE_BATCH_REPLICAS", "4"))
MONITORING = os.environ.get("FLYTE_BATCH_MONITORING", "logs")
GRAFANA = os.environ.get("FLYTE_BATCH_GRAFANA", "")
LINKS = (GrafanaDashboard(GRAFANA),) if GRAFANA else ()

# At once, a retry may land on the very replica that is about to end.
RETRIES = flyte.RetryStrategy(2, backoff=flyte.Backoff(timedelta(seconds=2), factor=5, cap=timedelta(minutes=1)))

cpu_replicas = fb.replica_environment(
    "generate-cpu", image=cpu_image, cpu=2, memory="4Gi", replicas=(1, 2), concurrency=4, monitoring=MONITORING
)
gpu_replicas = fb.replica_environment(
    "generate-gpu",
    image=vllm_image,
    gpu=GPU,
    cpu=4,
    memory="24Gi",
    replicas=(1, REPLICAS),
    concurrency=10,
    monitoring=MONITORING,
)
driver = fb.driver_environment(
    "generate",
    image=cpu_image,
    depends_on=[cpu_replicas, gpu_replicas],
    monitoring=MONITORING,
    # The driver imports this file again, and asks for the replicas.
    env_vars={"FLYTE_BATCH_GPU": GPU, "FLYTE_BATCH_REPLICAS": str(REPLICAS), "FLYTE_BATCH_GRAFANA": GRAFANA},
)

BATCH_ROWS = 256


@dataclass(frozen=True)
class Job:
    """What to ask of whom.

    Attributes:
        choice: engine and model.
        sampling: how responses are continued.
        engine_options: further parameters of the engine's ``start``: the text of a JSON object.
        template: a text with {column} fields; not used where ``messages_column`` is.
        messages_column: a column with conversations.
        image_column: a column with pictures.
        system: instructions for a chat model.
        timeout_s: seconds for a chunk.
    """

    choice: EngineChoice
    sampling: fb.SamplingParameters
    engine_options: str
    template: str
    messages_column: str | None = None
    image_column: str | None = None
    system: str | None = None
    timeout_s: float = 3600.0

    def to_json(self) -> str:
        """What travels to the tasks: one text; nested dataclasses take Flyte 28 ms a call."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        job = json.loads(text)
        choice, sampling = EngineChoice(**job.pop("choice")), sampling_parameters(job.pop("sampling"))
        return cls(choice, sampling, **job)

    @property
    def prompt(self) -> fb.PromptTemplate | fb.ChatColumn:
        if self.messages_column is not None:
            return fb.ChatColumn(self.messages_column, self.system, self.image_column)
        return fb.PromptTemplate(self.template, self.system, self.image_column)

    @property
    def settings(self) -> dict[str, object]:
        """What determines the answers: the model's content, not where it lies."""
        return {
            "engine": self.choice.engine,
            "model": self.choice.identity,
            "engine_options": self.engine_options,
            "prompt": self.prompt,
            "sampling": self.sampling,
        }


@fb.singleton
async def solver(
    choice: EngineChoice, sampling: fb.SamplingParameters, engine_options: str
) -> fb.ContinuousBatcher | fb.EngineBatcher:
    """The process's engine for a model, shared by all chunks that a replica works on."""
    engine = await start_engine(choice, sampling, **json.loads(engine_options))
    if isinstance(engine, fb.ContinuousEngine):
        return fb.ContinuousBatcher(engine)
    # The engine cuts a batch to what its device takes at once; the budget only keeps very long prompts apart.
    return fb.EngineBatcher(
        engine, max_batch_size=BATCH_ROWS, target_batch_tokens=BATCH_ROWS * (sampling.max_tokens + 512)
    )


async def infer(chunk: fb.Chunk, job_json: str) -> fb.ChunkReport:
    """Infer one chunk and commit its part."""
    job = Job.from_json(job_json)
    return await fb.infer(
        chunk,
        lambda: solver(job.choice, job.sampling, job.engine_options),
        prompt=job.prompt,
        timeout_s=job.timeout_s,
    )


async def wake(job_json: str) -> None:
    """Load the replica's engine, for chunks that are still to come."""
    job = Job.from_json(job_json)
    await fb.warm_up(lambda: solver(job.choice, job.sampling, job.engine_options))


@cpu_replicas.task(retries=RETRIES)
async def infer_chunk(chunk: fb.Chunk, job: str) -> fb.ChunkReport:
    """`infer` on a CPU replica."""
    return await infer(chunk, job)


@gpu_replicas.task(retries=RETRIES)
async def infer_chunk_on_gpu(chunk: fb.Chunk, job: str) -> fb.ChunkReport:
    """`infer` on a GPU replica."""
    return await infer(chunk, job)


@cpu_replicas.task
async def wake_cpu(job: str) -> None:
    """`wake` a CPU replica."""
    await wake(job)


@gpu_replicas.task
async def wake_gpu(job: str) -> None:
    """`wake` a GPU replica."""
    await wake(job)


@driver.task(report=True, links=LINKS)
async def main(
    source: str,
    output: str,
    prompt_column: str = "question",
    prompt_template: str | None = None,
    messages_column: str | None = None,
    image_column: str | None = None,
    system_prompt: str | None = None,
    model: str = "demo",
    engine: str = "auto",
    engine_options: str = "{}",
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
    json_schema: str | None = None,
    sampling_options: str = "{}",
    columns: str | None = None,
    chunk_size: int | None = None,
    chunk_timeout_s: float = 3600.0,
    rows_per_s: float | None = None,
    limit: int | None = None,
    max_failure_rate: float | None = None,
    retry_failures: bool = False,
    overwrite: bool = False,
    warm_up: bool = False,
    price_per_hour: float | None = None,
) -> fb.RunSummary:
    """Answer every row of a dataset.

    Args:
        source: JSONL or Parquet: a file, a folder, a glob.
        output: folder for the Parquet parts and the manifest.
        prompt_column: the column to ask, where no template is given.
        prompt_template: text with {column} fields.
        messages_column: a column with conversations to ask instead: a list of {role, content} in each row.
        image_column: a column with pictures for a vision model: bytes, a path, or {bytes, path}, or lists of them.
        system_prompt: instructions for a chat model, the same for every row.
        model: "demo" (the small arithmetic model in the package), a folder, a Hugging Face id, or, for vLLM, the URI
            of a folder in an object store.
        engine: "auto", "ctranslate2", "vllm" or "fake".
        engine_options: further options of the engine, a JSON object: {"max_model_len": 4096, "quantization": "fp8"}.
        max_tokens: most tokens of a response.
        temperature: 0 is deterministic.
        seed: of sampling; with it, and an engine that can, each row is sampled alike in every run.
        json_schema: a JSON schema that every response must have: its text, or, with --local, a file that holds it.
        sampling_options: further sampling parameters, a JSON object: {"top_p": 0.9, "stop": ["END"]}.
        columns: the source's columns to keep in the output, separated by commas; all when left out.
        chunk_size: rows per chunk; planned when left out.
        chunk_timeout_s: seconds for a chunk, the model's load included; one that takes longer is tried again elsewhere.
        rows_per_s: rows that one replica answers a second, where it is known, for planning chunks.
        limit: only the first so many rows.
        max_failure_rate: share (0-1) of failed rows above which the run fails; half of them when left out, in runs of
            at least 100 rows.
        retry_failures: do finished chunks again that hold failed rows.
        overwrite: replace an output that was made with another model, prompt or parameter.
        warm_up: on a cluster, let replicas load the model while the source is still opened and planned: before its
            faults are found, and also if it turns out that nothing is left to do.
        price_per_hour: of one replica, in any currency, for the report.

    Returns:
        Rows, failures, tokens, seconds, utilization and the output's path.
    """
    fb.require_shared(source=source, output=output)
    if not 0 < chunk_timeout_s < math.inf:
        raise fb.BadInput(f"chunk_timeout_s must be a positive number of seconds, got {chunk_timeout_s}")
    sampling_given = parse_object("sampling_options", sampling_options)
    if json_schema is not None:
        schema = parse_schema("json_schema", json_schema, files=fb.runs_here())
        sampling_given["structured"] = {"json_schema": schema}
    sampling = sampling_parameters(
        {"max_tokens": max_tokens, "temperature": temperature, "seed": seed} | sampling_given
    )
    options = parse_object("engine_options", engine_options)
    choice = await asyncio.to_thread(choose_engine, engine, model, here=fb.runs_here())
    check_engine_options(choice.engine, options, sampling)
    template = prompt_template if prompt_template is not None else fb.PromptTemplate.for_column(prompt_column).text
    job = Job(
        choice,
        sampling,
        json.dumps(options, sort_keys=True),
        template,
        messages_column,
        image_column,
        system_prompt,
        chunk_timeout_s,
    )
    replicas, task = (gpu_replicas, infer_chunk_on_gpu) if choice.engine == "vllm" else (cpu_replicas, infer_chunk)
    most_replicas, concurrency = fb.slots(replicas)

    job_json = job.to_json()

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await task(chunk, job_json)

    wake_one = wake_gpu if replicas is gpu_replicas else wake_cpu
    to_wake = most_replicas if warm_up and not fb.runs_here() else 0
    async with fb.waking_replicas(lambda: wake_one(job_json), to_wake, concurrency):
        return await fb.run(
            source,
            output,
            run_chunk,
            settings=job.settings,
            code_version=fingerprint(infer),
            columns=[name.strip() for name in columns.split(",") if name.strip()] if columns is not None else None,
            required_columns=job.prompt.columns,
            limit=limit,
            chunk_size=chunk_size,
            rows_per_s=rows_per_s,
            replicas=most_replicas,
            concurrency=concurrency,
            batch_rows=BATCH_ROWS,
            max_failure_rate=max_failure_rate,
            retry_failures=retry_failures,
            overwrite=overwrite,
            price_per_hour=price_per_hour,
        )
