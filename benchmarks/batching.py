"""flyte.extras' batcher and ours on the same work, in one run on one machine.

    python benchmarks/batching.py [--records N] [--repeats R]

1. Overhead: CPU time of this process per record around a process_fn that does nothing; the median of the repeats, and
   the floor that asyncio itself sets.
2. Late binding, budget, poison, abandoned: what a simulated device gets to see. Counts, not times, so they don't depend
   on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import flyte.extras

import flyte_batch.batching as ours
from flyte_batch.load.report import conditions

LIBRARIES: dict[str, Any] = {"flyte.extras": flyte.extras, "flyte_batch": ours}


async def trivial(batch: list[int]) -> list[int]:
    return batch


def trivial_on_thread(batch: list[int]) -> list[int]:
    return batch


# -- Overhead --------------------------------------------------------------


async def submit_then_gather(batcher: Any, count: int) -> None:
    """One caller that submits everything, then waits."""
    await asyncio.gather(*[await batcher.submit(i) for i in range(count)])


async def closed_loop(batcher: Any, count: int) -> None:
    """1,000 callers, each submitting a record and waiting for it before the next."""

    async def caller() -> None:
        for i in range(count // 1_000):
            await (await batcher.submit(i))

    await asyncio.gather(*(caller() for _ in range(1_000)))


async def task_a_record(batcher: Any, count: int) -> None:
    """A task for each record."""

    async def caller(record: int) -> None:
        await (await batcher.submit(record))

    await asyncio.gather(*map(caller, range(count)))


async def through_map(batcher: Any, count: int) -> None:
    await batcher.map(range(count))


async def floor_futures(_: Any, count: int) -> None:
    """What asyncio takes for a future a record, without any batcher."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(count)]
    for future in futures:
        future.set_result(None)
    await asyncio.gather(*futures)


async def floor_tasks(_: Any, count: int) -> None:
    """The same with a task a record."""

    async def caller(record: int) -> int:
        await asyncio.sleep(0)
        return record

    await asyncio.gather(*map(caller, range(count)))


async def microseconds(
    work: Callable[[Any, int], Awaitable[None]], make: Callable[[], Any], count: int, repeats: int
) -> float:
    """CPU time a record, of the whole process: threads count."""
    times = []
    for _ in range(repeats):
        async with make() as batcher:
            await work(batcher, min(count, 2_000))
            gc.collect()
            started = time.process_time()
            await work(batcher, count)
            times.append((time.process_time() - started) / count * 1e6)
    return statistics.median(times)


async def overhead(count: int, repeats: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("overhead, µs CPU a record", *LIBRARIES, "ratio")]
    for label, work in [
        ("submit all, then gather", submit_then_gather),
        ("1,000 callers, one record each at a time", closed_loop),
        ("a task a record", task_a_record),
    ]:
        times = [
            await microseconds(work, lambda lib=lib: lib.DynamicBatcher(trivial), count, repeats)
            for lib in LIBRARIES.values()
        ]
        rows.append((label, *(f"{t:.2f}" for t in times), f"{times[1] / times[0]:.2f}"))
    for label, process_fn in [("map, async def", trivial), ("map, def on its thread", trivial_on_thread)]:
        t = await microseconds(through_map, lambda fn=process_fn: ours.DynamicBatcher(fn), 10 * count, repeats)
        rows.append((label, "-", f"{t:.3f}", ""))
    for label, work in [("floor: a future a record", floor_futures), ("floor: a task a record", floor_tasks)]:
        t = await microseconds(work, contextlib.nullcontext, count, repeats)
        rows.append((label, f"{t:.2f}", f"{t:.2f}", ""))
    return rows


# -- What the device gets to see -------------------------------------------


class Device:
    """Takes a fixed time a batch, whatever is in it; fails a batch with a negative record."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self._seconds = seconds

    async def __call__(self, batch: list[int]) -> list[int]:
        self.batches.append(batch)
        await asyncio.sleep(self._seconds)
        if min(batch) < 0:
            raise ValueError("poison")
        return batch


async def over_budget(lib: Any, count: int) -> str:
    random.seed(0)
    costs = [random.randint(1, 400) for _ in range(count)]
    device = Device()
    async with lib.DynamicBatcher(device, cost_estimator=lambda cost: cost, target_batch_cost=1_000) as batcher:
        await asyncio.gather(*await batcher.submit_batch(costs))
    over = sum(len(batch) > 1 and sum(batch) > 1_000 for batch in device.batches)
    return f"{over} of {len(device.batches)}"


async def late_binding(lib: Any) -> str:
    """48 records, one a millisecond, behind a device that takes 150 ms a batch; the batch timeout is 5 ms."""
    device = Device(0.15)
    async with lib.DynamicBatcher(device, batch_timeout_s=0.005) as batcher:
        futures = [await batcher.submit(0)]
        await asyncio.sleep(0.02)
        for i in range(48):
            futures.append(await batcher.submit(i))
            await asyncio.sleep(0.001)
        await asyncio.gather(*futures)
    return ", ".join(str(len(batch)) for batch in device.batches)


async def poison(lib: Any, options: dict[str, Any]) -> str:
    """4 bad records among 4,000."""
    records = [-1 if i % 1_000 == 500 else i for i in range(4_000)]
    device = Device()
    async with lib.DynamicBatcher(device, **options) as batcher:
        results = await asyncio.gather(*await batcher.submit_batch(records), return_exceptions=True)
    failed = sum(isinstance(result, Exception) for result in results)
    return f"{failed} failed, {len(device.batches)} calls"


async def abandoned(lib: Any) -> str:
    """2,000 records, half of them cancelled before the device is free."""
    device = Device()
    async with lib.DynamicBatcher(device) as batcher:
        futures = await batcher.submit_batch(range(2_000))
        for future in futures[::2]:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)
    return str(sum(map(len, device.batches)))


async def padding(options: dict[str, Any]) -> str:
    random.seed(0)
    lengths = [int(random.lognormvariate(4, 1)) + 1 for _ in range(4_000)]
    async with ours.DynamicBatcher[int, int](
        Device(), cost_estimator=lambda n: n, target_batch_cost=4_096, max_batch_size=64, **options
    ) as batcher:
        await batcher.map(lengths)
        return f"{batcher.stats.total_padded_cost:,.0f} ({batcher.stats.padding_efficiency:.0%} useful)"


async def behaviour() -> list[tuple[str, ...]]:
    both = list(LIBRARIES.values())
    split = [{}, {"isolate_failures": True}]
    return [
        ("what the device sees", *LIBRARIES, ""),
        ("batches over a budget of 1,000", *[await over_budget(lib, 10_000) for lib in both], ""),
        ("late binding: batch sizes", *[await late_binding(lib) for lib in both], ""),
        ("4 bad of 4,000", *[await poison(lib, options) for lib, options in zip(both, split, strict=True)], ""),
        ("1,000 of 2,000 cancelled: records run", *[await abandoned(lib) for lib in both], ""),
        ("padded model, in order: cells", "-", await padding({"batch_cost": "padded"}), ""),
        ("padded model, grouped: cells", "-", await padding({"batch_cost": "padded", "length_window": 512}), ""),
    ]


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


async def main(count: int, repeats: int) -> None:
    print(conditions())
    print(f"{count:,} records ({10 * count:,} for map), median of {repeats}\n")
    print(table(await overhead(count, repeats)), "\n")
    print(table(await behaviour()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=int, default=20_000, metavar="N", help="records a measurement (default 20,000)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="measurements a figure (default 5)")
    arguments = parser.parse_args()
    if arguments.records < 1_000 or arguments.repeats < 1:
        sys.exit("--records must be 1,000 or more, --repeats 1 or more")
    logging.disable(logging.ERROR)
    asyncio.run(main(arguments.records, arguments.repeats))
