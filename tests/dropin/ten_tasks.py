"""The program that Flyte's documentation shows for batch inference, with this package's batcher in its place.

A reusable environment, singletons by ``alru_cache``, an ``infer_batch`` task that submits to the shared batcher, a
driver that gathers ten of them. The engine is like ``vllm.LLM``: an object whose ``generate`` blocks until all texts
are answered. Added for the test: a heartbeat, and what every batch was made of.

    flyte run --local tests/dropin/ten_tasks.py main --source in.jsonl --answers answers.json --figures figures.json
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ctranslate2
import flyte
from async_lru import alru_cache
from tokenizers import Tokenizer

from flyte_batch import TokenBatcher
from flyte_batch.demo import model_path

image = flyte.Image.from_debian_base().with_pip_packages("ctranslate2", "tokenizers", "unionai-reuse")

worker_env = flyte.TaskEnvironment(
    name="ten-tasks-worker",
    image=image,
    resources=flyte.Resources(cpu=2, memory="4Gi"),
    reusable=flyte.ReusePolicy(replicas=2, concurrency=10),
)
driver_env = flyte.TaskEnvironment(name="ten-tasks-driver", image=image, depends_on=[worker_env])

BEAT_S = 0.002


@dataclass
class Prompt:
    """One question."""

    task_id: str
    index: int
    text: str

    def estimate_tokens(self) -> int:
        return len(self.text) // 4 + 1


class LLM:
    """A model on this process's device; a call of ``generate`` occupies whoever makes it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._generator = ctranslate2.Generator(str(folder), compute_type="float32", intra_threads=1)

    def generate(self, texts: list[str]) -> list[str]:
        prompts = [f"<|user|>{text}<|assistant|>" for text in texts]
        tokens = [encoding.tokens for encoding in self._tokenizer.encode_batch(prompts, add_special_tokens=False)]
        results = self._generator.generate_batch(tokens, max_length=80, sampling_topk=1, include_prompt_in_result=False)
        return [self._tokenizer.decode(result.sequences_ids[0]) for result in results]


@dataclass
class Observed:
    """What happened in this process, in seconds of one clock."""

    longest_block_s: float = 0.0
    beats: int = 0
    batches: list[list[str]] = field(default_factory=list)
    calls: list[tuple[float, float]] = field(default_factory=list)

    async def watch_the_loop(self) -> None:
        """Never ends: notes how long others kept it from its turn on the event loop.

        Not counted is what another process of the machine took, so that a busy machine does not look like a blocked
        loop. The sleep is no 0: a loop that spins would itself take the processor, and the GIL, from what it watches.
        """
        last, waited = time.perf_counter(), waited_for_a_processor_s()
        while True:
            await asyncio.sleep(BEAT_S)
            now, waited_by_now = time.perf_counter(), waited_for_a_processor_s()
            self.longest_block_s = max(self.longest_block_s, now - last - BEAT_S - (waited_by_now - waited))
            self.beats += 1
            last, waited = now, waited_by_now


def waited_for_a_processor_s() -> float:
    """Seconds that this thread was ready to run and had no processor; 0 where the system does not say (not Linux)."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


observed = Observed()


@alru_cache(maxsize=None)
async def get_inference_fn(style: str) -> Any:
    """Load the model once a process."""
    llm = LLM(model_path())

    def generate(batch: list[Prompt]) -> list[str]:
        started = time.perf_counter()
        texts = llm.generate([prompt.text for prompt in batch])
        observed.calls.append((started, time.perf_counter()))
        observed.batches.append([prompt.task_id for prompt in batch])
        return texts

    async def generate_on_the_loop(batch: list[Prompt]) -> list[str]:
        return generate(batch)

    return {"def": generate, "async def": generate_on_the_loop}[style]


@alru_cache(maxsize=None)
async def get_batcher(style: str) -> TokenBatcher[Prompt, str]:
    """One batcher a process, shared by all the tasks that run in it."""
    batcher = TokenBatcher[Prompt, str](
        inference_fn=await get_inference_fn(style),
        target_batch_tokens=32_000,
        max_batch_size=64,
        batch_timeout_s=0.05,
        max_queue_size=5_000,
    )
    await batcher.start()
    return batcher


@worker_env.task
async def infer_batch(prompts: list[str], task_id: str, style: str) -> list[str]:
    """Submit prompts to the shared batcher and return their completions."""
    batcher = await get_batcher(style)
    futures: list[asyncio.Future[str]] = []
    for index, text in enumerate(prompts):
        futures.append(await batcher.submit(Prompt(task_id=task_id, index=index, text=text)))
    return list(await asyncio.gather(*futures))


@driver_env.task
async def main(source: str, answers: str, figures: str, tasks: int = 10, style: str = "def") -> dict[str, list[str]]:
    """Fan the questions of a JSONL file out to so many tasks.

    Args:
        source: rows with a question.
        answers: where to write the answers, in the questions' order, as JSON.
        figures: where to write what was observed, as JSON.
        tasks: how many ``infer_batch`` calls.
        style: whether the function that blocks is a "def" or an "async def".
    """
    questions = [json.loads(line)["question"] for line in Path(source).read_text().splitlines()]  # noqa: ASYNC240
    size = -(-len(questions) // tasks)
    chunks = {f"task_{start // size:02d}": questions[start : start + size] for start in range(0, len(questions), size)}
    batcher = await get_batcher(style)  # the model is loaded before the clock starts

    watch = asyncio.create_task(observed.watch_the_loop())
    started = time.perf_counter()
    results = await asyncio.gather(*(infer_batch(chunk, task_id, style) for task_id, chunk in chunks.items()))
    seconds = time.perf_counter() - started
    watch.cancel()

    stats = batcher.stats
    await batcher.stop()
    Path(answers).write_text(json.dumps([answer for result in results for answer in result]))  # noqa: ASYNC240
    Path(figures).write_text(  # noqa: ASYNC240
        json.dumps(
            {
                "seconds": seconds,
                "longest_block_s": observed.longest_block_s,
                "beats": observed.beats,
                "batches": observed.batches,
                "device_s": sum(end - start for start, end in observed.calls),
                "longest_call_s": max(end - start for start, end in observed.calls),
                "stats": {
                    name: getattr(stats, name, None)
                    for name in (
                        "total_submitted", "total_completed", "total_failed", "total_batches", "total_batch_records",
                        "busy_time_s", "idle_time_s", "utilization", "avg_batch_size", "loop_blocked_s",
                    )
                },
            }
        )
    )  # fmt: skip
    return dict(zip(chunks, results, strict=True))
