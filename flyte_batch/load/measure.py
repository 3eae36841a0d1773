"""A load test in the process that owns the engine, on the event loop of its batcher: where a replica's callers are."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from flyte_batch.batching.engine_batcher import EngineOwner
from flyte_batch.errors import BatcherNotRunning
from flyte_batch.load.generator import LoadResult, ask_alone, run_load
from flyte_batch.load.limits import Limit, find_limit
from flyte_batch.load.plan import LoadTest, each_of, read_prompts
from flyte_batch.load.report import LoadReport, hardware
from flyte_batch.load.underway import Underway
from flyte_batch.records import Completion, Prompt
from flyte_batch.versions import versions

Solver = Callable[[], Awaitable[EngineOwner[Any, Completion, Any]]]
"""Gives the process's engine and batcher: a `singleton`, which loads anew what died."""


async def measure(
    test: LoadTest,
    solver: Solver,
    *,
    on_progress: Callable[[Underway], object] | None = None,
    on_step: Callable[[LoadResult], object] | None = None,
) -> LoadReport:
    """Load this process's engine with requests. Each tokenises its prompt on a thread, then goes through the batcher.

    Args:
        test: what to ask, and how fast.
        solver: gives the batcher; asked for each request, as callers do, so that a dead engine is replaced.
        on_progress: hears of each load while it goes on, as for `run_load`.
        on_step: hears of each load when it is over.

    Raises:
        BadInput: the prompts cannot be read or inferred.
        Exception: the engine could not be loaded, or did not answer the first request.
    """
    prompts = await asyncio.to_thread(read_prompts, test)
    batcher = await solver()
    await asyncio.to_thread(each_of, batcher.engine.prepare, prompts, "prompt")
    started_at, started = datetime.now(UTC), time.monotonic()
    load_average = os.getloadavg()[0]
    if test.rate_per_s is None:
        limit = await find_limit(
            asker_of(solver),
            prompts,
            level=test.level,
            start_per_s=test.start_per_s,
            precision=test.precision,
            seconds=test.seconds,
            warm_up_s=test.warm_up_s,
            seed=test.seed,
            timeout_s=test.timeout_s,
            on_progress=on_progress,
            on_step=on_step,
        )
    else:
        await ask_alone(asker_of(solver), prompts[0], test.timeout_s)
        result = await run_load(
            asker_of(solver),
            prompts,
            test.rate_per_s,
            test.seconds,
            seed=test.seed,
            timeout_s=test.timeout_s,
            warm_up_s=test.warm_up_s,
            level=test.level,
            on_progress=on_progress,
        )
        limit = Limit.of([result])
        if on_step is not None:
            on_step(result)
    return LoadReport(
        started_at=started_at.isoformat(timespec="seconds"),
        took_s=time.monotonic() - started,
        hardware=await asyncio.to_thread(hardware),
        load_average=load_average,
        versions=versions(),
        prompts=len(prompts),
        test=test,
        limit=limit,
    )


def asker_of(solver: Solver) -> Callable[[Prompt], Awaitable[Completion]]:
    """A request as an interactive caller makes it, from the prompt's text to the answer."""

    async def ask(prompt: Prompt) -> Completion:
        try:
            batcher = await solver()
        except Exception as error:
            raise BatcherNotRunning(f"the engine died and could not be loaded again: {error}") from error
        record = await asyncio.to_thread(batcher.engine.prepare, prompt)
        completion: Completion = await (await batcher.submit(record))
        return completion

    return ask
