"""What monitoring costs at 10,000 records a second: the same work with and without it, in turns, in one run.

    python benchmarks/monitoring.py [--rounds N] [--seconds S] [--way WAY]...

The device is simulated: it takes 10,000 records a second and no more. Eight callers keep it busy. Four ways to it:

- batches: `DynamicBatcher`, a plain function on a thread, 256 records a batch, `map`;
- records: the same, 1,000 callers that each submit a record and wait for it;
- steps: `ContinuousBatcher`, 100 records a step of 10 ms; the engine steps in a process of its own, as vLLM's does;
- steps in here: the same, but the engine steps on the event loop, and waits whenever that is busy.

"All" is the recorder that workers use for the report, JSON lines (to /dev/null), Prometheus (scraped every second), and
OpenTelemetry's spans and metrics through its SDK (to an exporter that throws them away). Throughput is what users lose;
CPU time is what it takes of the process, lost or not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry, generate_latest

import flyte_batch as fb
from flyte_batch.load.report import conditions
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.json_logs import JsonLogs, Level
from flyte_batch.monitoring.otel import OtelHook
from flyte_batch.monitoring.prometheus import PrometheusHook
from flyte_batch.monitoring.recorder import recorder
from flyte_batch.monitoring.scope import new_scope, scope_entered

RATE = 10_000
BATCH = 256
STEP_RECORDS = 100
COUNT = struct.Struct("=I")
CALLERS = 8
WARM_UP_S = 0.3


class NowhereExporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


@contextmanager
def logs(level: Level = "info") -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        unsubscribe = hooks.subscribe(JsonLogs(nowhere, level=level))
        yield
        unsubscribe()


@contextmanager
def prometheus() -> Iterator[None]:
    registry, stop = CollectorRegistry(), threading.Event()
    unsubscribe = hooks.subscribe(PrometheusHook(registry))

    def scrape() -> None:
        while not stop.wait(1.0):
            generate_latest(registry)

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    stop.set()
    thread.join()
    unsubscribe()


@contextmanager
def otel() -> Iterator[None]:
    tracers, meters = TracerProvider(), MeterProvider([InMemoryMetricReader()])
    tracers.add_span_processor(BatchSpanProcessor(NowhereExporter()))
    hook = OtelHook(tracers, meters)
    unsubscribe = hooks.subscribe(hook)
    yield
    unsubscribe()
    hook.close()
    tracers.shutdown()
    meters.shutdown()


BACKENDS: dict[str, list[Any]] = {
    "none": [],
    "report": ["recorder"],
    "report, logs": ["recorder", logs],
    "report, logs:debug": ["recorder", partial(logs, "debug")],
    "report, prometheus": ["recorder", prometheus],
    "report, otel": ["recorder", otel],
    "all": ["recorder", logs, prometheus, otel],
}


# -- The ways to the device ---------------------------------------------------


def device(batch: list[Any]) -> list[Any]:
    time.sleep(len(batch) / RATE)
    return batch


def batches() -> Any:
    return fb.DynamicBatcher[int, int](device, max_batch_size=BATCH, max_queue_size=20 * BATCH, turn_size=64)


class EngineElsewhere(fb.FakeContinuousEngine):
    """Steps in a process of its own; both sides say over a socket how many records go, in the order they came."""

    def __init__(self) -> None:
        super().__init__(slots=STEP_RECORDS)
        self._socket, others = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--device", str(others.fileno())], pass_fds=[others.fileno()]
        )
        others.close()
        self._socket.recv(COUNT.size)  # it is there
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._received)
        self._inside: deque[asyncio.Future[fb.Completion]] = deque()
        self._unsent = 0

    async def generate(self, record: Any) -> fb.Completion:
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent += 1
        future: asyncio.Future[fb.Completion] = self._loop.create_future()
        self._inside.append(future)
        return await future

    def _send(self) -> None:
        self._socket.send(COUNT.pack(self._unsent))
        self._unsent = 0

    def _received(self) -> None:
        for (records,) in COUNT.iter_unpack(self._socket.recv(64 * COUNT.size)):
            for _ in range(records):
                self._inside.popleft().set_result(fb.Completion("x", "stop", 1, 1))

    async def aclose(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._process.wait()
        await super().aclose()


def step_for_others(connection: socket.socket) -> None:
    """What `EngineElsewhere`'s process does, until the other side is gone."""
    waiting, next_at = 0, 0.0
    connection.sendall(COUNT.pack(0))
    while True:
        pause = max(0.0, next_at - time.monotonic()) if waiting else None
        if select.select([connection], [], [], pause)[0]:
            received = connection.recv(64 * COUNT.size)
            if not received:
                return
            if not waiting:
                next_at = max(next_at, time.monotonic()) + STEP_RECORDS / RATE
            waiting += sum(records for (records,) in COUNT.iter_unpack(received))
        elif waiting:
            done = min(STEP_RECORDS, waiting)
            waiting -= done
            next_at += STEP_RECORDS / RATE
            connection.sendall(COUNT.pack(done))


def steps() -> Any:
    return fb.ContinuousBatcher(EngineElsewhere())


def steps_in_here() -> Any:
    engine = fb.FakeContinuousEngine(lambda text: "x", slots=STEP_RECORDS, seconds_per_step=STEP_RECORDS / RATE)
    return fb.ContinuousBatcher(engine)


async def with_map(batcher: Any, deadline: float, block: Sequence[Any]) -> int:
    done = 0
    while time.monotonic() < deadline:
        done += len(await batcher.map(block))
    return done


async def with_submit(batcher: Any, deadline: float, block: Sequence[Any]) -> int:
    async def caller() -> int:
        done = 0
        while time.monotonic() < deadline:
            await (await batcher.submit(block[0]))
            done += 1
        return done

    return sum(await asyncio.gather(*(caller() for _ in range(1000 // CALLERS))))


Way = tuple[Callable[[], Any], Callable[[Any, float, Sequence[Any]], Awaitable[int]]]
WAYS: dict[str, Way] = {
    "batches": (batches, with_map),
    "records": (batches, with_submit),
    "steps": (steps, with_map),
    "steps in here": (steps_in_here, with_map),
}


async def measured(way: Way, backends: list[Any], seconds: float) -> tuple[float, float]:
    """(records/s, CPU microseconds a record) of one round."""
    make, work = way
    with ExitStack() as stack:
        for backend in backends:
            if backend != "recorder":
                stack.enter_context(backend())
        async with make() as batcher:
            block = [batcher.engine.prepare(fb.Prompt("x")) if hasattr(batcher, "engine") else 0] * 2 * BATCH

            async def caller(number: int) -> None:
                scope = new_scope(f"chunk{number}", number)
                with ExitStack() as mine:
                    if "recorder" in backends:
                        mine.enter_context(recorder.recording(scope))
                        mine.enter_context(recorder.sampling(batcher))
                    hooks.emit(events.ChunkStarted(time.time(), scope, 1))
                    mine.enter_context(scope_entered(scope))
                    done = await work(batcher, time.monotonic() + WARM_UP_S + seconds, block)
                    hooks.emit(events.ChunkDone(time.time(), scope, done, 0, done, done, seconds))

            def now() -> tuple[float, float, int]:
                return time.monotonic(), time.process_time(), batcher.stats.total_completed

            callers = asyncio.gather(*map(caller, range(CALLERS)))
            await asyncio.sleep(WARM_UP_S)
            before = now()
            await asyncio.sleep(seconds)
            took, cpu, done = (late - early for early, late in zip(before, now(), strict=True))
            await callers
    gc.collect()
    return done / took, 1e6 * cpu / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="all by default")
    parser.add_argument("--device", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device is not None:
        step_for_others(socket.socket(fileno=options.device))
        return
    print(conditions("prometheus-client", "opentelemetry-sdk"))
    for name in options.way or WAYS:
        way = WAYS[name]
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in BACKENDS}
        asyncio.run(measured(way, [], 0.5))
        for number in range(options.rounds):
            kinds = list(BACKENDS) if number % 2 else list(reversed(BACKENDS))
            for kind in kinds:
                found[kind].append(asyncio.run(measured(way, BACKENDS[kind], options.seconds)))
        print(f"\n{name:<22}{'records/s':>10}{'of none':>9}{'lost':>8}{'CPU us/record':>15}{'more':>7}")
        bare = statistics.median(cpu for _, cpu in found["none"])
        for kind, rounds in found.items():
            ratio = statistics.median(rate / none for (rate, _), (none, _) in zip(rounds, found["none"], strict=True))
            rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"  {kind:<20}{rate:>10,.0f}{ratio:>9.3f}{1 - ratio:>8.1%}{cpu:>15.2f}{cpu - bare:>7.2f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
