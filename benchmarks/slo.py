"""Up to what rate the demo model keeps the service level for interactive callers, by how it is batched.

    python benchmarks/slo.py [--seconds 20] [--rounds 1]

Each line is a search (`flyte_batch.load.find_limit`): p50 below 500 ms, p99 below 2 s, less than 0.1% errors, more than
99.9% availability. One engine of the same kind for all, loaded anew for each search; the last line batches as a run
over a dataset does (`workflows/generate.py`). Then the found rate of the default is held for as long as it takes to
show all objectives with 95% confidence.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os

from flyte_batch.batching import EngineBatcher
from flyte_batch.demo import model_path
from flyte_batch.engines import CTranslate2Engine
from flyte_batch.load import LoadResult
from flyte_batch.load.measure import measure
from flyte_batch.load.plan import InteractiveBatching, LoadTest, plan_load_test
from flyte_batch.load.report import LoadReport, conclusions, conditions

SIZES = (8, 16, 32, 64, 128)
DATASET = "as for a dataset"


async def searched(test: LoadTest, for_a_dataset: bool = False) -> LoadReport:
    """A load test of an engine of its own."""
    engine = await CTranslate2Engine.start(model_path(), sampling=test.sampling)
    batcher = EngineBatcher(engine) if for_a_dataset else test.batching.batcher(engine, test.sampling)
    async with batcher:

        async def solver() -> EngineBatcher:
            return batcher

        return await measure(test, solver)


def row(name: str, report: LoadReport) -> str:
    """A line of the table: what was kept, and what broke first."""
    limit = report.limit
    kept: LoadResult | None = limit.highest_kept
    cells = [name, "none" if kept is None else f"{kept.rate_per_s:g}", f"{limit.lowest_broken_per_s or math.nan:g}"]
    if kept is not None:
        latencies = kept.latencies
        cells += [f"{latencies.p50_ms:.0f}", f"{latencies.p99_ms:.0f}", f"{kept.late_p99_ms:.0f}"]
    broken = next((step for step in limit.steps if step.rate_per_s == limit.lowest_broken_per_s), None)
    cells.append(", ".join(objective.name for objective in broken.broken) if broken is not None else "")
    return f"| {' | '.join(cells)} |"


async def main(seconds: float, rounds: int) -> None:
    print(conditions())
    print("| batches of at most | kept, requests/s | broken at | p50 ms | p99 ms | arrivals late, p99 ms | broke |")
    print("|---|---|---|---|---|---|---|")
    common = {"seconds": seconds, "warm_up_s": 5.0, "start_per_s": 64.0}
    best = 0.0
    for number in range(rounds):
        for size in SIZES:
            test = plan_load_test(batching=InteractiveBatching(max_batch_size=size), seed=100 * number, **common)
            report = await searched(test)
            if size == InteractiveBatching().max_batch_size:
                best = report.limit.highest_kept_per_s or best
            print(row(f"{size}", report), f"load average {report.load_average:.1f}", flush=True)
        report = await searched(plan_load_test(seed=100 * number, **common), for_a_dataset=True)
        print(row(DATASET, report), f"load average {report.load_average:.1f}", flush=True)
    rate = float(f"{0.8 * best:.3g}")
    held = await searched(plan_load_test(rate_per_s=rate, **common | {"seconds": max(seconds, 1.2 * 2995 / rate)}))
    print(*conclusions(held), *held.limit.steps, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured in each step (default 20)")
    parser.add_argument("--rounds", type=int, default=1, help="how often (default 1)")
    options = parser.parse_args()
    os.environ["DO_NOT_TRACK"] = "1"
    asyncio.run(main(options.seconds, options.rounds))
