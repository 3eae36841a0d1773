"""Cold starts made shorter: replicas that load their engine while the driver still opens and plans the source.

`waking_replicas` is the driver's side, `warm_up` the replica's. Both are helpers of a run, never a condition for it: a
replica that was not woken is loaded by its first chunk.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from flyte_batch.batching.engine_batcher import EngineOwner
from flyte_batch.data.pandas_import import import_pandas
from flyte_batch.records import Completion, Prompt
from flyte_batch.worker import Solver

logger = logging.getLogger(__name__)

_warm: weakref.WeakSet[EngineOwner[Any, Completion, Any]] = weakref.WeakSet()


async def warm_up(solver: Solver, prompt: str = "Hello", timeout_s: float = 30.0) -> None:
    """In a replica: load the process's engine, and let one record through it, so that no row pays for first times.

    An engine gets that record once, or again if the call that brought it was cancelled. If it is refused or takes too
    long, that is logged and the engine left as it is.

    Args:
        solver: gives the process's engine and batcher: the same `singleton`, with the same arguments, as for `infer`.
        prompt: what the record asks.
        timeout_s: seconds that the record may take, the load not counted.

    Raises:
        Exception: whatever the load raises.
    """
    batcher = await solver()
    if batcher in _warm:
        return
    _warm.add(batcher)
    try:
        record = await asyncio.to_thread(batcher.engine.prepare, Prompt(prompt))
        await (await batcher.submit(record, timeout_s=timeout_s))
    except asyncio.CancelledError:
        _warm.discard(batcher)
        raise
    except Exception as error:
        logger.warning(
            "the engine is loaded, but did not answer its first record (%s: %s)", type(error).__name__, error
        )


MOST_CALLS = 100
"""Flyte submits about so many a second, and the chunks come after."""


@asynccontextmanager
async def waking_replicas(
    call: Callable[[], Awaitable[object]], replicas: int, concurrency: int
) -> AsyncGenerator[None]:
    """In a driver: call a task that warms its replica up, on each of them, while the body of ``async with`` runs.

    Each call holds a slot of its replica until the engine is there. Replicas come up one after the other, and the first
    takes what it has slots for: there is one call more than all but one of them can take, up to `MOST_CALLS`, so that
    each gets one that comes before another has loaded. Nobody waits for the calls: one that fails is logged, and those
    that are under way when the body ends are cancelled.

    Args:
        call: calls a task that does nothing but `warm_up`.
        replicas: most replicas of the task's environment; 0 makes no call, as fits local mode, where they are this
            process.
        concurrency: calls that one of them takes at once. `flyte_batch.slots` gives both.

    Example::

        async with fb.waking_replicas(wake, *fb.slots(replicas)):
            return await fb.run(source, output, infer_chunk)
    """
    number = min((replicas - 1) * concurrency + 1, MOST_CALLS) if replicas else 0
    if number:
        import_pandas()  # the calls are made while the body reads the source on a thread
    calls = [asyncio.create_task(_call(call)) for _ in range(number)]
    try:
        yield
    finally:
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def _call(call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except Exception as error:
        logger.warning("a replica was not warmed up (%s: %s); its first chunk does it", type(error).__name__, error)
