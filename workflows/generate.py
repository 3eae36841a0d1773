"""Answer every row of a dataset with a language model.

    flyte run --local workflows/generate.py main --source questions.jsonl --output out/answers

Finds what is wrong with its input before a model loads, shows progress, survives being killed (run the same command
again: finished chunks are kept), and leaves Parquet parts with a manifest. Without ``--local`` it runs on the cluster
of your Flyte configuration, with paths that its containers can reach.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import flyte_batch as fb
from flyte_batch.engines import EngineChoice, choose_engine, start_engine
from flyte_batch.fingerprint import fingerprint
from images import cpu_image

replicas = fb.replica_environment(
    "generate-replica", image=cpu_image, cpu=2, memory="4Gi", replicas=(1, 2), concurrency=4
)
driver = fb.driver_environment("generate", image=cpu_image, depends_on=[replicas])

BATCH_ROWS = 256


@dataclass(frozen=True)
class Job:
    """What to ask of whom."""

    choice: EngineChoice
    sampling: fb.SamplingParameters
    prompt: str
    system: str | None = None

    @property
    def settings(self) -> dict[str, object]:
        """What determines the answers: the model's content, not where it lies."""
        return {
            "engine": self.choice.engine,
            "model": self.choice.identity,
            "prompt": self.prompt,
            "system": self.system,
            "sampling": self.sampling,
        }


@fb.singleton
async def solver(choice: EngineChoice, sampling: fb.SamplingParameters) -> fb.EngineBatcher:
    """The process's engine for a model, shared by all chunks that a replica works on."""
    engine = await start_engine(choice, sampling)
    # The engine cuts a batch to what its device takes at once; the budget only keeps very long prompts apart.
    return fb.EngineBatcher(
        engine, max_batch_size=BATCH_ROWS, target_batch_tokens=BATCH_ROWS * (sampling.max_tokens + 512)
    )


@replicas.task(retries=2)
async def infer_chunk(chunk: fb.Chunk, job: Job) -> fb.ChunkReport:
    """Infer one chunk and commit its part."""
    prompt = fb.PromptTemplate(job.prompt, job.system)
    return await fb.infer(chunk, lambda: solver(job.choice, job.sampling), prompt=prompt)


@driver.task
async def main(
    source: str,
    output: str,
    prompt_column: str = "question",
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    model: str = "demo",
    engine: str = "auto",
    columns: str | None = None,
    chunk_size: int | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    limit: int | None = None,
    max_failure_rate: float | None = None,
    retry_failures: bool = False,
    overwrite: bool = False,
) -> fb.RunSummary:
    """Answer every row of a dataset.

    Args:
        source: JSONL or Parquet: a file, a folder, a glob.
        output: folder for the Parquet parts and the manifest.
        prompt_column: the column to ask, where no template is given.
        prompt_template: text with {column} fields.
        system_prompt: instructions for a chat model, the same for every row.
        model: "demo" (the small arithmetic model in the package), a folder, or a Hugging Face id.
        engine: "auto", "ctranslate2" or "fake".
        columns: the source's columns to keep in the output, separated by commas; all when left out.
        chunk_size: rows per chunk; planned when left out.
        max_tokens: most tokens of a response.
        temperature: 0 is deterministic.
        limit: only the first so many rows.
        max_failure_rate: share (0-1) of failed rows above which the run fails; half of them when left out, in runs of
            at least 100 rows.
        retry_failures: do finished chunks again that hold failed rows.
        overwrite: replace an output that was made with another model, prompt or parameter.

    Returns:
        Rows, failures, tokens, seconds, utilization and the output's path.
    """
    fb.require_shared(source=source, output=output)
    choice = await asyncio.to_thread(choose_engine, engine, model)
    template = (
        fb.PromptTemplate(prompt_template)
        if prompt_template is not None
        else fb.PromptTemplate.for_column(prompt_column)
    )
    job = Job(
        choice, fb.SamplingParameters(max_tokens=max_tokens, temperature=temperature), template.text, system_prompt
    )
    most_replicas, concurrency = fb.slots(replicas)

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await infer_chunk(chunk, job)

    return await fb.run(
        source,
        output,
        run_chunk,
        settings=job.settings,
        code_version=fingerprint(infer_chunk),
        columns=[name.strip() for name in columns.split(",") if name.strip()] if columns is not None else None,
        required_columns=template.columns,
        limit=limit,
        chunk_size=chunk_size,
        replicas=most_replicas,
        concurrency=concurrency,
        batch_rows=BATCH_ROWS,
        max_failure_rate=max_failure_rate,
        retry_failures=retry_failures,
        overwrite=overwrite,
    )
