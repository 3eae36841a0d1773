"""Tasks that answer chunks with one engine a replica, held up and watched by the tests that call them."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import flyte

import flyte_batch as fb
from flyte_batch.records import Completion
from images import cpu_image

replicas = fb.replica_environment("sharing", image=cpu_image, replicas=(1, 2), concurrency=24)
driver = fb.driver_environment("sharing-driver", image=cpu_image, depends_on=[replicas])


@dataclass
class Journal:
    """What happened in this process.

    Attributes:
        pid: the process.
        package: where flyte_batch was imported from.
        calls: run of each call of `ask`, in order of their beginning.
        cancelled: run of each call that got a CancelledError.
        loads: for each load of the engine, the run whose context it saw: empty is a clean one.
        loads_cancelled: loads that got a CancelledError.
        batches: what the engine was given, batch by batch.
        begun: texts that the engine began to answer.
        freed: texts whose answering was cancelled.
        attributed: the run that prompt, finish and the task's end saw, by text.
        closed: engines that were closed.
    """

    pid: int = field(default_factory=os.getpid)
    package: str = fb.__file__
    calls: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    loads_cancelled: int = 0
    batches: list[list[str]] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    attributed: dict[str, list[str]] = field(default_factory=dict)
    closed: int = 0


@dataclass
class Controls:
    """What holds a process up, until a test says otherwise."""

    loads_to_fail: int = 0
    loading: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Event = field(default_factory=asyncio.Event)


journal = Journal()
controls = Controls()


def run_here() -> str:
    """The run of the Flyte context that this code sees; empty without one."""
    context = flyte.ctx()
    action = context.action if context is not None else None  # there are contexts without one
    return (action.run_name or "") if action is not None else ""


async def answer(text: str) -> str:
    journal.begun.append(text)
    try:
        await controls.answering.wait()
    except asyncio.CancelledError:
        journal.freed.append(text)
        raise
    return f"echo: {text}"


class Batching(fb.FakeEngine):
    def __init__(self) -> None:
        super().__init__(answer)
        self.batches = journal.batches

    async def aclose(self) -> None:
        journal.closed += 1
        await super().aclose()


async def load() -> None:
    journal.loads.append(run_here())
    try:
        await controls.loading.wait()
    except asyncio.CancelledError:
        journal.loads_cancelled += 1
        raise
    if controls.loads_to_fail:
        controls.loads_to_fail -= 1
        raise OSError("the weights are not there yet")


@fb.singleton
async def batching() -> fb.EngineBatcher:
    await load()
    return fb.EngineBatcher(Batching(), max_batch_size=64)


@fb.singleton
async def continuous() -> fb.ContinuousBatcher:
    await load()
    return fb.ContinuousBatcher(fb.FakeContinuousEngine(answer, slots=64))


SOLVERS = {"batching": batching, "continuous": continuous}


@replicas.task
async def ask(chunk: fb.Chunk, solver: str) -> fb.ChunkReport:
    """Answer a chunk. Its rows have one column, ``text``."""
    run = run_here()
    journal.calls.append(run)

    def prompt(row: dict[str, object]) -> str:
        text = str(row["text"])
        journal.attributed.setdefault(text, []).append(run_here())
        return text

    def finish(row: dict[str, object], completion: Completion) -> str:
        journal.attributed[str(row["text"])].append(run_here())
        return completion.text

    try:
        report = await fb.infer(chunk, SOLVERS[solver], prompt=prompt, finish=finish)
    except asyncio.CancelledError:
        journal.cancelled.append(run)
        raise
    assert run_here() == run
    return report


@driver.task
async def main(source: str, output: str, solver: str) -> fb.RunSummary:
    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await ask(chunk, solver)

    return await fb.run(source, output, run_chunk, settings={"of": Path(source).name}, concurrency=4, chunk_size=5)


@replicas.task
async def look() -> str:
    """The `Journal`, as JSON."""
    return json.dumps(asdict(journal))


@replicas.task
async def let(load: bool, answer: bool, loads_to_fail: int = 0) -> None:
    """Let loads and answers go on, or hold them."""
    controls.loads_to_fail = loads_to_fail
    for event, go in ((controls.loading, load), (controls.answering, answer)):
        if go:
            event.set()
        else:
            event.clear()
