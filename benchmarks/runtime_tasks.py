"""What `benchmarks/runtime.py` runs: a task that does nothing, and chunks for a simulated device."""

from __future__ import annotations

import asyncio
import time

import flyte

import flyte_batch as fb
from images import cpu_image

replicas = fb.replica_environment("overheads", image=cpu_image, replicas=1, concurrency=24)
driver = fb.driver_environment("overheads-driver", image=cpu_image, depends_on=[replicas])

DEVICE_ROWS_PER_S = 200
SLOTS, STEPS = 64, 8
"""Of the device that steps: records side by side, and steps that one takes on average."""


@replicas.task
async def nothing(number: int) -> int:
    """The smallest call there is."""
    return number


@driver.task
async def one_by_one(calls: int) -> list[float]:
    """Seconds of each of so many calls, one after the other."""
    seconds = []
    for number in range(calls):
        started = time.perf_counter()
        await nothing(number)
        seconds.append(time.perf_counter() - started)
    return seconds


@driver.task
async def all_at_once(calls: int) -> list[float]:
    """Seconds until all of so many calls are back, and CPU seconds of this process meanwhile."""
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(nothing(number) for number in range(calls)))
    return [time.perf_counter() - started, time.process_time() - cpu]


@driver.task
async def chunks_of_one_row(calls: int, source: str, output: str) -> list[float]:
    """As `all_at_once`, of a run over so many rows, whose device takes no time."""

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await infer_chunk(chunk, "free")

    started, cpu = time.perf_counter(), time.process_time()
    summary = await fb.run(source, output, run_chunk, chunk_size=1, concurrency=24)
    assert summary.chunks == calls
    return [time.perf_counter() - started, time.process_time() - cpu]


class Device:
    """Where an engine's device time passes.

    Attributes:
        begun: Unix time at which it began to work; 0 before.
        ended: Unix time at which it last stopped.
        busy: seconds that it worked.
    """

    def __init__(self) -> None:
        self.begun = self.ended = self.busy = 0.0

    async def sleep(self, seconds: float) -> None:
        started = time.time()
        self.begun = self.begun or started
        await asyncio.sleep(seconds)
        self.ended = time.time()
        self.busy += self.ended - started


def steps(text: str) -> str:
    """A response of 4 to 12 words, `STEPS` on average, so that records of a chunk do not end all at once."""
    return "word " * (STEPS - 4 + int(text) % 9)


devices: dict[str, Device] = {}


@fb.singleton
async def solver(kind: str, run: str) -> fb.EngineBatcher | fb.ContinuousBatcher:
    """An engine with a device of its own for every run, of `DEVICE_ROWS_PER_S` unless it is free."""
    device = devices[run] = Device()
    if kind == "free":
        return fb.EngineBatcher(fb.FakeEngine(str))
    if kind == "batches":
        # A row is two words: its prompt and its response.
        engine = fb.FakeEngine(str, seconds_per_token=0.5 / DEVICE_ROWS_PER_S, sleep=device.sleep)
        return fb.EngineBatcher(engine, max_batch_size=SLOTS)
    return fb.ContinuousBatcher(
        fb.FakeContinuousEngine(
            steps, slots=SLOTS, seconds_per_step=SLOTS / STEPS / DEVICE_ROWS_PER_S, sleep=device.sleep
        )
    )


def run_name() -> str:
    context = flyte.ctx()
    assert context is not None
    return context.action.run_name or ""


@replicas.task
async def infer_chunk(chunk: fb.Chunk, kind: str) -> fb.ChunkReport:
    run = run_name()
    return await fb.infer(chunk, lambda: solver(kind, run), prompt="{text}")


@driver.task
async def answer(source: str, output: str, kind: str, chunk_rows: int, concurrency: int) -> fb.RunSummary:
    """A whole run on one replica."""

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await infer_chunk(chunk, kind)

    return await fb.run(source, output, run_chunk, chunk_size=chunk_rows, concurrency=concurrency)


@replicas.task
async def device_times(run: str, kind: str) -> list[float]:
    """Begin and end (Unix time) and busy seconds of a run's device, and the mean share of its slots that were taken."""
    device = devices[run]
    engine = (await solver(kind, run)).engine
    taken = engine.record_steps / engine.steps / SLOTS if isinstance(engine, fb.FakeContinuousEngine) else 1.0
    return [device.begun, device.ended, device.busy, taken]
