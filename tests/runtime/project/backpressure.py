"""Chunks that are larger than all that a replica takes at once, before an engine that a test holds."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import flyte_batch as fb
from images import cpu_image

CONCURRENCY, QUEUE, ON_DEVICE = 3, 16, 8

replicas = fb.replica_environment("backpressure", image=cpu_image, replicas=1, concurrency=CONCURRENCY)
driver = fb.driver_environment("backpressure-driver", image=cpu_image, depends_on=[replicas])


@dataclass
class Seen:
    """What a call saw, its batcher and its engine included.

    Attributes:
        most_ahead: the most rows of the call that were between prompt and finish.
        most_queued: the most records of all calls that the batcher held.
        most_on_device: the most records that the engine held.
    """

    most_ahead: int = 0
    most_queued: int = 0
    most_on_device: int = 0


class Gate:
    """Opens when a file is there: a call could not open it while all slots of the replica are taken."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self._seen = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def passed(self) -> None:
        if self._watch is None:
            self._watch = asyncio.create_task(self._until_there())
        await self._seen.wait()

    async def _until_there(self) -> None:
        assert self.file is not None
        while not self.file.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
        self._seen.set()


gate = Gate()


async def answer(text: str) -> str:
    await gate.passed()
    return text


@fb.singleton
async def batching() -> fb.EngineBatcher:
    return fb.EngineBatcher(fb.FakeEngine(answer), max_batch_size=ON_DEVICE, max_queue_size=QUEUE)


@fb.singleton
async def continuous() -> fb.ContinuousBatcher:
    engine = fb.FakeContinuousEngine(answer, slots=ON_DEVICE)
    return fb.ContinuousBatcher(engine, max_in_flight=ON_DEVICE, max_queue_size=QUEUE)


SOLVERS = {"batching": batching, "continuous": continuous}


@replicas.task
async def ask(chunk: fb.Chunk, solver: str, folder: str) -> str:
    """Answer a chunk; gives `Seen` as JSON. ``<chunk>.json`` in the folder says how it is, while it goes on."""
    gate.file = Path(folder) / "open"
    seen, counting, ahead = Seen(), threading.Lock(), 0
    batcher = await SOLVERS[solver]()
    report = Path(folder) / f"{chunk.id}.json"

    def prompt(row: dict[str, object]) -> str:
        nonlocal ahead
        with counting:
            ahead += 1
            seen.most_ahead = max(seen.most_ahead, ahead)
        return str(row["text"])

    def finish(row: dict[str, object], completion: fb.Completion) -> str:
        nonlocal ahead
        with counting:
            ahead -= 1
        return completion.text

    async def tell() -> None:
        while True:
            stats = batcher.stats
            seen.most_queued = max(seen.most_queued, stats.queued)
            seen.most_on_device = max(seen.most_on_device, stats.running)
            written = report.with_suffix(".tmp")
            written.write_text(json.dumps(asdict(seen)))
            written.rename(report)
            await asyncio.sleep(0.02)

    telling = asyncio.create_task(tell())
    try:
        result = await fb.infer(chunk, SOLVERS[solver], prompt=prompt, finish=finish)
    finally:
        telling.cancel()
    assert result.failures == 0
    return json.dumps(asdict(seen))
