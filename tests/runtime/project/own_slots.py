"""Drivers that run on the replicas that they wait for, and one that only has their variables."""

from __future__ import annotations

import flyte_batch as fb
from images import cpu_image

one_slot = fb.replica_environment("one-slot", image=cpu_image, replicas=1, concurrency=1)
two_slots = fb.replica_environment("two-slots", image=cpu_image, replicas=1, concurrency=2)
driver = one_slot.clone_with("one-slot-driver", reusable=None, depends_on=[one_slot, two_slots])


@fb.singleton
async def solver() -> fb.EngineBatcher:
    return fb.EngineBatcher(fb.FakeEngine())


@one_slot.task
async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")


@one_slot.task
async def main_in_the_only_slot(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk)


@two_slots.task
async def infer_chunk_beside(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")


@two_slots.task
async def main_in_one_of_two_slots(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk_beside, chunk_size=5)


@driver.task
async def main_in_a_container_of_its_own(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk, chunk_size=5)
