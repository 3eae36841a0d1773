"""GSM8K, the well-known example: grade-school word problems, solved in chunks, scored against the ground truth.

    flyte run --local workflows/gsm8k.py main --num_questions 500 --chunk_size 50
    flyte run workflows/gsm8k.py main --engine vllm --model Qwen/Qwen2.5-7B-Instruct

The questions stream from Hugging Face (``openai/gsm8k``; needs a network and the extra ``hf``), or come from a file
given by ``--source PATH``. The demo model knows only its own kind of problem: from it expect an accuracy near zero
here, and a real one from a real model.

Unlike ``generate.py`` this one passes its few questions by value and uses the lower level directly: a driver that
gathers ``infer_batch`` tasks, and replicas that share one engine and batcher: vLLM on GPU replicas, all else on CPU
replicas. Which GPU says the environment variable ``FLYTE_BATCH_GPU`` of the shell that submits the run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import flyte

import flyte_batch as fb
from flyte_batch.data.sources import open_source
from flyte_batch.demo.problems import is_right
from flyte_batch.engines import EngineChoice, choose_engine, start_engine
from images import cpu_image, vllm_image

GPU = os.environ.get("FLYTE_BATCH_GPU", "A10G:1")

# At once, a retry may land on the very replica that is about to end.
RETRIES = flyte.RetryStrategy(2, backoff=flyte.Backoff(timedelta(seconds=2), factor=5, cap=timedelta(minutes=1)))

TIMEOUT = timedelta(hours=1)

cpu_replicas = fb.replica_environment("gsm8k-cpu", image=cpu_image, cpu=2, memory="4Gi", replicas=2, concurrency=10)
gpu_replicas = fb.replica_environment(
    "gsm8k-gpu",
    image=vllm_image,
    gpu=GPU,
    cpu=4,
    memory="24Gi",
    replicas=(2, 4),
    concurrency=10,
)
driver = fb.driver_environment(
    "gsm8k",
    image=cpu_image,
    depends_on=[cpu_replicas, gpu_replicas],
    env_vars={"FLYTE_BATCH_GPU": GPU},  # the driver imports this file again, and asks for the replicas
)

SYSTEM = "Solve the problem step by step. End with a line that holds #### and the number."
"""GSM8K's own form of an answer. The demo model needs no telling: it knows no other."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solved:
    """What one call of `infer_batch` made of its questions.

    Attributes:
        answers: in the questions' order; None where there is none, the replica's log says why.
        utilization: share (0-1) of its time that the replica's device was at work, so far.
        in_flight: records that it worked on side by side, on average over that time.
    """

    answers: list[str | None]
    utilization: float
    in_flight: float


@fb.singleton
async def solver(choice: EngineChoice, max_tokens: int) -> fb.ContinuousBatcher | fb.EngineBatcher:
    """The process's engine and batcher, shared by the calls that a replica works on at the same time."""
    engine = await start_engine(choice, fb.SamplingParameters(max_tokens=max_tokens))
    return fb.ContinuousBatcher(engine) if isinstance(engine, fb.ContinuousEngine) else fb.EngineBatcher(engine)


async def solve(questions: list[str], choice: EngineChoice, max_tokens: int) -> Solved:
    """Answer some questions."""
    batcher = await solver(choice, max_tokens)
    system = None if choice.model == "demo" else SYSTEM

    def prepare(question: str) -> object:
        return batcher.engine.prepare(fb.Prompt(question, system))

    pipeline = fb.Pipeline(prepare, batcher, finish=lambda _, completion: completion.text)
    answers: list[str | None] = []
    async for answer in pipeline.run(questions, errors="yield"):
        if isinstance(answer, fb.Failure):
            logger.warning("no answer to %r: %s", answer.item, answer)
            answers.append(None)
        else:
            answers.append(answer)
    stats = batcher.stats
    logger.info("utilization %.1f%%, %.1f records in flight", 100 * stats.utilization, stats.avg_in_flight)
    return Solved(answers, stats.utilization, stats.avg_in_flight)


@cpu_replicas.task(retries=RETRIES, timeout=TIMEOUT)
async def infer_batch(questions: list[str], choice: EngineChoice, max_tokens: int) -> Solved:
    """`solve` on a CPU replica."""
    return await solve(questions, choice, max_tokens)


@gpu_replicas.task(retries=RETRIES, timeout=TIMEOUT)
async def infer_batch_on_gpu(questions: list[str], choice: EngineChoice, max_tokens: int) -> Solved:
    """`solve` on a GPU replica."""
    return await solve(questions, choice, max_tokens)


@cpu_replicas.task
async def wake_cpu(choice: EngineChoice, max_tokens: int) -> None:
    """Load a CPU replica's engine, for calls that are still to come."""
    await fb.warm_up(lambda: solver(choice, max_tokens))


@gpu_replicas.task
async def wake_gpu(choice: EngineChoice, max_tokens: int) -> None:
    """Load a GPU replica's engine, for calls that are still to come."""
    await fb.warm_up(lambda: solver(choice, max_tokens))


@driver.task
async def main(
    num_questions: int = 500,
    chunk_size: int = 50,
    source: str | None = None,
    model: str = "demo",
    engine: str = "auto",
    max_tokens: int = 256,
    warm_up: bool = False,
) -> tuple[dict[str, list[str | None]], float]:
    """Answer questions of GSM8K's test set and score the answers.

    Args:
        num_questions: how many, from the start.
        chunk_size: questions per ``infer_batch`` call.
        source: JSONL or Parquet with the columns question and answer; by default openai/gsm8k from Hugging Face.
        model: "demo", a folder, or a Hugging Face id.
        engine: "auto", "ctranslate2", "vllm" or "fake".
        max_tokens: most tokens of an answer.
        warm_up: on a cluster, let replicas load the model while the questions are still read.

    Returns:
        The answers by chunk, whose names sort in the questions' order (null where there is none), and the share (0-1)
        whose final number is right.
    """
    for name, value in (("num_questions", num_questions), ("chunk_size", chunk_size)):
        if value < 1:
            raise fb.BadInput(f"{name} must be at least 1, got {value}")
    choice = await asyncio.to_thread(choose_engine, engine, model, here=fb.runs_here())
    on_gpu = choice.engine == "vllm"
    task, wake_one = (infer_batch_on_gpu, wake_gpu) if on_gpu else (infer_batch, wake_cpu)
    most_replicas, concurrency = fb.slots(gpu_replicas if on_gpu else cpu_replicas)
    to_wake = most_replicas if warm_up and not fb.runs_here() else 0
    async with fb.waking_replicas(lambda: wake_one(choice, max_tokens), to_wake, concurrency):
        rows = await asyncio.to_thread(_read, source, num_questions)
        chunks = [rows[start : start + chunk_size] for start in range(0, len(rows), chunk_size)]
        solved = await asyncio.gather(*(task([q for q, _ in chunk], choice, max_tokens) for chunk in chunks))
    answers = [answer for each in solved for answer in each.answers]
    right = sum(
        answer is not None and is_right(answer, truth) for answer, (_, truth) in zip(answers, rows, strict=True)
    )
    failed = answers.count(None)
    if failed == len(rows):
        raise fb.TooManyFailures(f"none of {failed} questions was answered; the log says why")
    accuracy = right / len(rows)
    print(f"{len(rows):,} questions in {len(chunks)} chunks, {failed} failed, {right} right: accuracy {accuracy:.1%}")
    print(f"utilization {solved[-1].utilization:.1%}, {solved[-1].in_flight:.1f} records in flight on average")
    return {f"chunk-{index:04d}": each.answers for index, each in enumerate(solved)}, accuracy


def _read(source: str | None, count: int) -> list[tuple[str, str]]:
    """The first questions with their reference answers."""
    if source is not None:
        opened = open_source(source, columns=["question", "answer"])
        for field in opened.schema:
            if str(field.type) not in ("string", "large_string"):
                raise fb.BadInput(f"column {field.name!r} of {source} is {field.type}, not text")
        return [(row["question"] or "", row["answer"] or "") for row in opened.head(count).to_pylist()]
    try:
        from datasets import load_dataset

        rows = load_dataset("openai/gsm8k", "main", split="test", streaming=True)
        return [(row["question"], row["answer"]) for row in islice(rows, count)]
    except ImportError as error:
        raise fb.BadInput(
            "openai/gsm8k needs the extra hf: install flyte-batch with its extra 'hf', or give --source"
        ) from error
    except OSError as error:
        raise fb.BadInput(f"openai/gsm8k can't be read from Hugging Face ({error}); give a file by --source") from error
