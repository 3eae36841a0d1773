"""What calls, fan-out and chunks cost on Flyte's reusable-container runtime.

    make test-runtime  # once: installs what this needs
    .venv/bin/python benchmarks/runtime.py [--rounds 3] [--parts calls fan-out device] [--chunk-seconds 1 10 60]

Real: the programs of a replica (``unionai-actor-bridge``, ``unionai-actor-executor``), the driver (``a0``, Flyte's
controller), Flyte's code bundle, the files with inputs and outputs. Played, by `tests.runtime.cluster`: the service
that assigns calls to replicas, and the one that drivers talk to. They are small, in one Python process, on this
machine, and keep files on its disk. A cluster's have a network, queues and an object store: what is measured here is
the least that it can be there.

- calls: a task that does nothing, called from a driver, one call after the other; and straight by the scheduler, so
  many at once. Of a driver's call, the replica's share is from ASSIGN to its last status; the backend's is from the
  request to the last event, without that; the driver's is the rest, HTTP included.
- fan-out: one driver calls so many of these tasks at once, or runs chunks of one row, with Flyte's limits and others.
- device: `fb.run` on one replica, whose engine has a simulated device of fixed speed, which takes batches, or records
  side by side in steps, as vLLM does. Lost is the share of the time from its first record to its last in which it did
  not work, so without load, start and end of the run; of a device that takes steps, also the slots that stood empty.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import runtime_tasks as tasks
from flyte_batch.load.report import conditions
from tests.image_environments import build_bundle
from tests.runtime.cluster import Action, Cluster, Run
from tests.runtime.replica import Replica
from tests.runtime.scheduler import End

AT_ONCE = (1, 4, 10, 24)
CONCURRENCIES = (1, 2, 4, 10)
KINDS = ("batches", "steps")


class TimedCluster(Cluster):
    """Notes how long the backend and the replicas took for each action.

    Attributes:
        backend: seconds from the request to the last event, by run and action.
        replica: the part of it from ASSIGN to the last status.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        super().__init__(folder, replicas=1, env=env)
        self.backend: dict[tuple[str, str], float] = {}
        self.replica: dict[tuple[str, str], float] = {}
        self._first: tuple[Run, Any] | None = None

    async def _attempts(self, run: Run, action: Action, request: Any) -> None:
        started = time.perf_counter()
        await super()._attempts(run, action, request)
        self.backend[run.name, action.name] = time.perf_counter() - started

    async def _attempt(self, run: Run, action: Action, request: Any, *others: Any) -> tuple[str, End, str]:
        self._first = self._first or (run, request)
        started = time.perf_counter()
        result = await super()._attempt(run, action, request, *others)
        self.replica[run.name, action.name] = time.perf_counter() - started
        return result

    async def repeat_first(self, name: str) -> float:
        """Run the first call once more, without driver and backend; seconds."""
        assert self._first is not None
        run, request = self._first
        action = Action(name, "", run.folder / name)
        outputs = action.folder / "1"
        outputs.mkdir(parents=True)
        _, end, reason = await self._attempt(run, action, request, 1, outputs)
        assert end is End.RETURNED, reason
        return self.replica[run.name, name]

    async def warm(self, bundle: Path) -> Replica:
        """Its replica, when it has answered a first call."""
        await self.run(tasks.nothing, bundle, number=0)
        (replica,) = self.pools["overheads"].replicas
        return replica


@dataclass
class Table:
    """Rows of figures, gathered over rounds: the median, and the smallest and largest."""

    header: Sequence[str]
    rows: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, name: str, *figures: float) -> None:
        self.rows.setdefault(name, []).append(list(figures))

    def print(self, show: Callable[[float], str]) -> None:
        print(f"\n| {' | '.join(self.header)} |\n|{'---|' * len(self.header)}")
        for name, rounds in self.rows.items():
            cells = []
            for figures in zip(*rounds, strict=True):
                spread = f" ({show(min(figures))} to {show(max(figures))})" if len(figures) > 1 else ""
                cells.append(show(statistics.median(figures)) + spread)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


@contextlib.asynccontextmanager
async def a_cluster(**env: str) -> AsyncIterator[TimedCluster]:
    """An empty cluster, whose processes have these environment variables besides their own."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = TimedCluster(Path(folder) / "cluster", env)
        async with cluster.up():
            yield cluster


# -- Calls ------------------------------------------------------------------


async def measure_calls(bundle: Path, rounds: int, calls: int) -> None:
    whole = Table(["a driver's call, one at a time, ms", "whole", "driver", "backend", "replica"])
    alone = Table(["calls at once, by the scheduler", "calls/s", "ms a call", "CPU ms a call in the replica"])
    async with a_cluster() as cluster:
        replica = await cluster.warm(bundle)
        for _ in range(rounds):
            run = await cluster.start(tasks.one_by_one, bundle, calls=calls)
            seconds = await run.result(600)
            names = [action.name for action in run.children]
            backend = [cluster.backend[run.name, name] for name in names]
            within = [cluster.replica[run.name, name] for name in names]
            split = [
                [1000 * (all_ - behind), 1000 * (behind - inside), 1000 * inside]
                for all_, behind, inside in zip(seconds, backend, within, strict=True)
            ]
            parts = [statistics.median(part) for part in zip(*split, strict=True)]
            whole.add(f"median of {calls} calls", 1000 * statistics.median(seconds), *parts)
            for at_once in AT_ONCE:
                alone.add(str(at_once), *await straight(cluster, replica, calls, at_once))
            alone.add("1, with 50 ms between calls", *await straight(cluster, replica, calls // 4, 1, 0.05))
    whole.print(lambda figure: f"{figure:.1f}")
    alone.print(lambda figure: f"{figure:,.2f}" if figure < 10 else f"{figure:,.0f}")


async def straight(
    cluster: TimedCluster, replica: Replica, calls: int, at_once: int, pause_s: float = 0
) -> tuple[float, float, float]:
    """Calls a second, milliseconds of the median call, and CPU milliseconds a call, without a driver."""
    batch = time.monotonic_ns()
    todo = iter(range(calls))
    seconds: list[float] = []

    async def slot() -> None:
        for number in todo:
            seconds.append(await cluster.repeat_first(f"{batch}-{number}"))
            await asyncio.sleep(pause_s)

    processes = processes_of(replica)
    cpu, started = cpu_seconds(processes), time.perf_counter()
    await asyncio.gather(*(slot() for _ in range(at_once)))
    took = time.perf_counter() - started - pause_s * calls
    return calls / took, 1000 * statistics.median(seconds), 1000 * (cpu_seconds(processes) - cpu) / calls


def processes_of(replica: Replica) -> list[psutil.Process]:
    return [psutil.Process(replica.process.pid), psutil.Process(replica.executor())]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


# -- Fan-out ----------------------------------------------------------------


async def measure_fan_out(bundle: Path, rounds: int, calls: int) -> None:
    table = Table([f"one driver, {calls} calls", "seconds", "calls/s", "CPU ms a call: driver", "replica"])
    limits = {
        "Flyte's limits (`_F_MAX_QPS` 100, `_F_P_CNC` 1,000)": {},
        "`_F_P_CNC` 10": {"_F_P_CNC": "10"},
        "`_F_MAX_QPS` 10,000": {"_F_MAX_QPS": "10000"},
        "`_F_MAX_QPS` 10,000, `_F_P_CNC` 10": {"_F_MAX_QPS": "10000", "_F_P_CNC": "10"},
    }
    for name, variables in limits.items():
        async with a_cluster(**variables) as cluster:
            replica = await cluster.warm(bundle)
            for _ in range(rounds):
                table.add(f"gather, {name}", *await fan_out(cluster, replica, bundle, calls, tasks.all_at_once))
    for name in ("Flyte's limits (`_F_MAX_QPS` 100, `_F_P_CNC` 1,000)", "`_F_MAX_QPS` 10,000"):
        async with a_cluster(**limits[name]) as cluster:
            replica = await cluster.warm(bundle)
            for number in range(rounds + 1):
                source = rows_file(cluster.folder / f"{number}.jsonl", calls)
                inputs = {"source": source, "output": str(cluster.folder / f"{number}")}
                figures = await fan_out(cluster, replica, bundle, calls, tasks.chunks_of_one_row, **inputs)
                if number:  # the first one warms up, and is not counted
                    table.add(f"`fb.run`, a row a chunk, 24 at once, {name}", *figures)
    table.print(lambda figure: f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}")


async def fan_out(
    cluster: TimedCluster, replica: Replica, bundle: Path, calls: int, driver: Any, **inputs: str
) -> tuple[float, float, float, float]:
    """Seconds, calls a second, and CPU milliseconds a call of driver and replica."""
    processes = processes_of(replica)
    before = cpu_seconds(processes)
    seconds, cpu = await cluster.run(driver, bundle, 600, calls=calls, **inputs)
    return seconds, calls / seconds, 1000 * cpu / calls, 1000 * (cpu_seconds(processes) - before) / calls


def rows_file(path: Path, rows: int) -> str:
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(rows)))
    return str(path)


# -- Device -----------------------------------------------------------------

LONGEST_RUN_S = 600


async def measure_device(bundle: Path, rounds: int, chunk_seconds: Sequence[float]) -> None:
    lost = Table(["device, chunk", *(f"lost, {concurrency} at once" for concurrency in CONCURRENCIES)])
    ends = Table(["device, chunk", "start, s", "end, s"])
    for chunk_s in chunk_seconds:
        for _ in range(rounds if chunk_s < 10 else 1):
            # Side by side: the devices only sleep.
            for kind, found in zip(
                KINDS, await asyncio.gather(*(runs(bundle, kind, chunk_s) for kind in KINDS)), strict=True
            ):
                lost.add(f"{kind}, {chunk_s:g} s", *(one.lost if one is not None else math.nan for one in found))
                for one in filter(None, found):
                    ends.add(f"{kind}, {chunk_s:g} s", one.before_s, one.after_s)
    lost.print(lambda figure: "not run" if math.isnan(figure) else f"{figure:.2%}")
    ends.print(lambda figure: f"{figure:.1f}")


@dataclass
class DeviceRun:
    """What became of one.

    Attributes:
        lost: share (0-1) of the time between first and last record.
        before_s: seconds from the start to the first record.
        after_s: seconds from the last record to the end.
    """

    lost: float
    before_s: float
    after_s: float


async def runs(bundle: Path, kind: str, chunk_s: float) -> list[DeviceRun | None]:
    """One run for every concurrency: short ones one after the other, long ones side by side."""
    if chunk_s < 10:
        return [await device_run(bundle, kind, chunk_s, concurrency) for concurrency in CONCURRENCIES]
    return list(await asyncio.gather(*(device_run(bundle, kind, chunk_s, each) for each in CONCURRENCIES)))


async def device_run(bundle: Path, kind: str, chunk_s: float, concurrency: int) -> DeviceRun | None:
    """A run in which every slot gets two chunks or more, after one that warms up; None where it would take too long."""
    chunk_rows = round(chunk_s * tasks.DEVICE_ROWS_PER_S)
    chunks = max(4 * concurrency, 20) if chunk_s < 10 else max(2 * concurrency, 4)
    if chunks * chunk_s > LONGEST_RUN_S:
        return None
    async with a_cluster() as cluster:
        await cluster.warm(bundle)
        for name, rows in (("first", 100), ("whole", chunks * chunk_rows)):
            source, output = rows_file(cluster.folder / f"{name}.jsonl", rows), str(cluster.folder / name)
            started = time.time()
            run = await cluster.start(
                tasks.answer, bundle, source=source, output=output, kind=kind, chunk_rows=chunk_rows,
                concurrency=concurrency,
            )  # fmt: skip
            summary = await run.result(2 * LONGEST_RUN_S)
            ended = time.time()
            assert (summary.rows, summary.failures) == (rows, 0)
            begin, end, busy, taken = await cluster.run(tasks.device_times, bundle, run=run.name, kind=kind)
    return DeviceRun(1 - busy * taken / (end - begin), begin - started, ended - end)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("calls", "fan-out", "device")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=400, help="calls of a round")
    parser.add_argument("--chunk-seconds", nargs="+", type=float, default=[1, 10, 60], help="device time of a chunk")
    options = parser.parse_args()
    os.environ["DO_NOT_TRACK"] = "1"
    print(conditions())
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle("benchmarks.runtime_tasks", Path(folder), python=sys.executable)
        if "calls" in options.parts:
            await measure_calls(bundle, options.rounds, options.calls)
        if "fan-out" in options.parts:
            await measure_fan_out(bundle, options.rounds, 2 * options.calls)
        if "device" in options.parts:
            await measure_device(bundle, options.rounds, options.chunk_seconds)


if __name__ == "__main__":
    asyncio.run(main())
