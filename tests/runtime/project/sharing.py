"""Tasks that answer chunks with one engine a replica, held up and watched by the tests that call them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

import flyte
import flyte.report

import flyte_batch as fb
from flyte_batch.data import storage
from flyte_batch.errors import BadRecord, EngineDead
from flyte_batch.records import Completion
from images import cpu_image

logger = logging.getLogger(__name__)

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
        answered_for: the run that the engine saw, by text; empty where it saw none.
        paths: the folders for the task's files that prompt and finish saw, by text.
        cancelling: as each call of `ask` ended, how often its task was asked to cancel, by run.
        reached: what came to a stage that `let` can hold, by stage.
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
    answered_for: dict[str, str] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    cancelling: dict[str, int] = field(default_factory=dict)
    reached: dict[str, list[str]] = field(default_factory=dict)
    closed: int = 0


STAGES = "prepare", "finish", "write"
"""What a call does on threads."""


@dataclass
class Controls:
    """What holds a process up, until a test says otherwise."""

    loads_to_fail: int = 0
    deaths: int = 0
    leaks: int = 0
    loading: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    threads: dict[str, threading.Event] = field(default_factory=lambda: {each: threading.Event() for each in STAGES})


journal = Journal()
controls = Controls()


def run_here() -> str:
    """The run of the Flyte context that this code sees; empty without one."""
    context = flyte.ctx()
    action = context.action if context is not None else None  # there are contexts without one
    return (action.run_name or "") if action is not None else ""


def path_here() -> str:
    """Where the Flyte context that this code sees puts a task's files; empty without one."""
    context = flyte.ctx()
    return context.raw_data_path.path if context is not None and run_here() else ""


def hold(stage: str, what: str) -> None:
    """Stand still, on a thread, until a test lets the stage go on."""
    journal.reached.setdefault(stage, []).append(what)
    assert controls.threads[stage].wait(60)


_write = storage.write_atomically


def _held_write(location: storage.Location, data: bytes) -> None:
    hold("write", location.path)
    _write(location, data)


async def answer(text: str) -> str:
    journal.begun.append(text)
    journal.answered_for[text] = run_here()
    logger.warning("answering %s", text)
    try:
        await controls.answering.wait()
    except asyncio.CancelledError:
        journal.freed.append(text)
        raise
    if controls.deaths:
        controls.deaths -= 1
        raise EngineDead("the device is gone")
    if "bad" in text:
        raise BadRecord("no good")
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
    logger.warning("loading")
    storage.write_atomically = _held_write  # in replicas only
    try:
        await controls.loading.wait()
    except asyncio.CancelledError:
        journal.loads_cancelled += 1
        raise
    if controls.loads_to_fail:
        controls.loads_to_fail -= 1
        raise OSError("the weights are not there yet")
    if controls.leaks:
        controls.leaks -= 1
        raise asyncio.CancelledError


@fb.singleton
async def batching() -> fb.EngineBatcher:
    await load()
    return fb.EngineBatcher(Batching(), max_batch_size=64)


@fb.singleton
async def continuous() -> fb.ContinuousBatcher:
    await load()
    return fb.ContinuousBatcher(fb.FakeContinuousEngine(answer, slots=64))


SOLVERS = {"batching": batching, "continuous": continuous}


@replicas.task(report=True)
async def ask(chunk: fb.Chunk, solver: str) -> fb.ChunkReport:
    """Answer a chunk. Its rows have one column, ``text``."""
    run, task = run_here(), asyncio.current_task()
    assert task is not None
    journal.calls.append(run)

    def note(what: str, text: str) -> None:
        journal.attributed.setdefault(text, []).append(run_here())
        journal.paths.setdefault(text, []).append(path_here())
        logger.warning("%s %s", what, text)

    def prompt(row: dict[str, object]) -> str:
        text = str(row["text"])
        note("asking", text)
        hold("prepare", text)
        if "leak" in text:
            raise asyncio.CancelledError
        return text

    def finish(row: dict[str, object], completion: Completion) -> str:
        text = str(row["text"])
        note("finishing", text)
        flyte.report.get_tab("main").log(f"<p>{completion.text}</p>")
        hold("finish", text)
        return completion.text

    try:
        report = await fb.infer(chunk, SOLVERS[solver], prompt=prompt, finish=finish)
    except asyncio.CancelledError:
        journal.cancelled.append(run)
        raise
    finally:
        journal.cancelling[run] = task.cancelling()
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
async def let(
    load: bool, answer: bool, hold: str = "", loads_to_fail: int = 0, deaths: int = 0, leaks: int = 0
) -> None:
    """Let loads and answers go on, or hold them; of `STAGES` hold one or none."""
    controls.loads_to_fail, controls.deaths, controls.leaks = loads_to_fail, deaths, leaks
    going = {controls.loading: load, controls.answering: answer}
    threads = {event: stage != hold for stage, event in controls.threads.items()}
    for event, goes in [*going.items(), *threads.items()]:
        if goes:
            event.set()
        else:
            event.clear()
