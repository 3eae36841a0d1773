"""A run over many small rows, with an engine that takes no time and keeps nothing: what is left is ours."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import flyte_batch as fb
from flyte_batch.records import Chat, Completion, Prompt
from images import cpu_image

REPLICAS, CONCURRENCY = 2, 4

replicas = fb.replica_environment("million", image=cpu_image, replicas=REPLICAS, concurrency=CONCURRENCY)
driver = fb.driver_environment("million-driver", image=cpu_image, depends_on=[replicas])


class Parrot:
    """Repeats each text at once. `FakeEngine` would remember all batches."""

    def prepare(self, prompt: Prompt | Chat) -> str:
        assert isinstance(prompt, Prompt)
        return prompt.text

    def estimate_cost(self, record: str) -> int:
        return 1

    async def infer(self, batch: Sequence[str]) -> list[Completion | Exception]:
        await asyncio.sleep(0)
        return [Completion(text, "stop", 1, 1) for text in batch]

    async def aclose(self) -> None:
        """Nothing to free."""


@fb.singleton
async def solver() -> fb.EngineBatcher:
    return fb.EngineBatcher(Parrot())


@replicas.task
async def repeat(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{text}")


@driver.task
async def main(source: str, output: str, chunk_size: int) -> tuple[fb.RunSummary, float]:
    """The summary, and the most memory (MiB) that the driver ever had."""
    summary = await fb.run(
        source, output, repeat, settings={}, chunk_size=chunk_size, replicas=REPLICAS, concurrency=CONCURRENCY
    )
    return summary, peak_mib("self")


def peak_mib(process: int | str) -> float:
    """The most resident memory that a process ever had."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {process} has no memory")
