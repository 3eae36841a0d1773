"""GSM8K, the well-known example: grade-school word problems, solved in chunks, scored against the ground truth.

    flyte run --local workflows/gsm8k.py main --num_questions 500 --chunk_size 50

The questions come from Hugging Face (``openai/gsm8k``; needs a network and the extra ``hf``), or from a file given
by ``--source PATH``. The demo model knows only its own kind of problem: from it expect an accuracy near zero here, and
a real one from a real model.

Unlike ``generate.py`` this one passes its few questions by value and uses the lower level directly: a driver that
gathers ``infer_batch`` tasks, replicas that share one engine and batcher.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import islice

import flyte_batch as fb
from flyte_batch.data.sources import open_source
from flyte_batch.demo.problems import is_right
from flyte_batch.engines import EngineChoice, choose_engine, start_engine
from images import cpu_image

replicas = fb.replica_environment("gsm8k-replica", image=cpu_image, cpu=2, memory="4Gi", replicas=2, concurrency=10)
driver = fb.driver_environment("gsm8k", image=cpu_image, depends_on=[replicas])

logger = logging.getLogger(__name__)


@fb.singleton
async def solver(choice: EngineChoice, max_tokens: int) -> fb.EngineBatcher:
    """The process's engine and batcher, shared by the calls that a replica works on at the same time."""
    return fb.EngineBatcher(await start_engine(choice, fb.SamplingParameters(max_tokens=max_tokens)))


@replicas.task(retries=2)
async def infer_batch(questions: list[str], choice: EngineChoice, max_tokens: int) -> list[str]:
    """Answer some questions, in order; an empty text where one got no answer (the log says why)."""
    batcher = await solver(choice, max_tokens)

    def prepare(question: str) -> object:
        return batcher.engine.prepare(fb.Prompt(question))

    pipeline = fb.Pipeline(prepare, batcher, finish=lambda _, completion: completion.text)
    answers: list[str] = []
    async for answer in pipeline.run(questions, errors="yield"):
        if isinstance(answer, fb.Failure):
            logger.warning("no answer to %r: %s", answer.item, answer)
            answers.append("")
        else:
            answers.append(answer)
    logger.info("utilization %.1f%%", 100 * batcher.stats.utilization)
    return answers


@driver.task
async def main(
    num_questions: int = 500,
    chunk_size: int = 50,
    source: str | None = None,
    model: str = "demo",
    engine: str = "auto",
    max_tokens: int = 256,
) -> tuple[dict[str, list[str]], float]:
    """Answer questions of GSM8K's test set and score the answers.

    Args:
        num_questions: how many, from the start.
        chunk_size: questions per ``infer_batch`` call.
        source: JSONL or Parquet with the columns question and answer; by default openai/gsm8k from Hugging Face.
        model: "demo", a folder, or a Hugging Face id.
        engine: "auto", "ctranslate2" or "fake".
        max_tokens: most tokens of an answer.

    Returns:
        The answers by chunk, whose names sort in the questions' order, and the share (0-1) whose final number is right.
    """
    for name, value in (("num_questions", num_questions), ("chunk_size", chunk_size)):
        if value < 1:
            raise fb.BadInput(f"{name} must be at least 1, got {value}")
    choice = await asyncio.to_thread(choose_engine, engine, model)
    rows = await asyncio.to_thread(_read, source, num_questions)
    chunks = [rows[start : start + chunk_size] for start in range(0, len(rows), chunk_size)]
    answered = await asyncio.gather(*(infer_batch([q for q, _ in chunk], choice, max_tokens) for chunk in chunks))
    right = sum(
        is_right(answer, truth)
        for chunk, answers in zip(chunks, answered, strict=True)
        for (_, truth), answer in zip(chunk, answers, strict=True)
    )
    failed = sum(not answer for answers in answered for answer in answers)
    if failed == len(rows):
        raise fb.TooManyFailures(f"none of {failed} questions was answered; the log says why")
    accuracy = right / len(rows)
    print(f"{len(rows):,} questions in {len(chunks)} chunks, {failed} failed, {right} right: accuracy {accuracy:.1%}")
    return {f"chunk-{index:04d}": answers for index, answers in enumerate(answered)}, accuracy


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
