"""CPU work beside the device: prepare -> batcher -> finish over any iterable, in bounded memory.

`prepare` (template, tokenising) and `finish` (parsing, scoring) are plain functions that run on threads while the
device is busy with other items. Items travel in blocks: one thread hop and one `map` call per block keep the cost per
item small, and several blocks in flight keep the batcher's queue full.

Usable alone::

    pipeline = Pipeline(prepare=tokenize, batcher=batcher, finish=parse)
    async for value in pipeline.run(items):
        ...
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

ItemT = TypeVar("ItemT")
RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")
OutT = TypeVar("OutT")


class Mapper(Protocol):
    """What a pipeline needs of a batcher: one result or exception a record, in order."""

    async def map(self, records: Sequence[Any], *, return_exceptions: bool = False) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class Failure(Generic[ItemT]):
    """An item that got no result, with its cause.

    Attributes:
        item: the item as it came in.
        error: what was raised, or the exception that the engine gave in the result's place.
        stage: where: ``prepare``, ``infer`` or ``finish``.
    """

    item: ItemT
    error: Exception
    stage: Literal["prepare", "infer", "finish"]

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Pipeline(Generic[ItemT, RecordT, ResultT, OutT]):
    """Stages around a batcher. Holds no items between calls of `run`; several runs may share one pipeline.

    Args:
        prepare: item -> record, on a thread. An exception fails that item only.
        batcher: anything with ``map(records, return_exceptions=True)``; the pipeline neither starts nor stops it.
        finish: (item, result) -> what `run` yields, on a thread. An exception fails that item only.
        window: most items that are between the input and the consumer at any moment.
        block: items per thread hop and per ``map`` call; a block is yielded when its last item is done.
        threads: threads for each of prepare and finish; by default the number of usable CPUs.

    Raises:
        ValueError: a number below 1, or a block larger than the window.
    """

    def __init__(
        self,
        prepare: Callable[[ItemT], RecordT],
        batcher: Mapper,
        finish: Callable[[ItemT, ResultT], OutT],
        *,
        window: int = 4096,
        block: int = 64,
        threads: int | None = None,
    ) -> None:
        threads = threads if threads is not None else len(os.sched_getaffinity(0))
        for name, value in (("window", window), ("block", block), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if block > window:
            raise ValueError(f"block ({block}) must not exceed window ({window})")
        self._prepare = prepare
        self._batcher = batcher
        self._finish = finish
        self._window = window
        self._block = block
        self._threads = threads

    def run(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        ordered: bool = True,
        errors: Literal["raise", "yield"] = "raise",
    ) -> AsyncGenerator[OutT | Failure[ItemT], None]:
        """Yield one output an item.

        Args:
            items: read only as fast as the window allows; a blocking iterable blocks the loop, so make it async.
            ordered: in the input's order; otherwise blocks come as they complete.
            errors: ``raise`` ends the run with the first failed item's error; ``yield`` gives a `Failure` in its place.
                What ends the whole pipeline (a batcher that died, a cancellation) is raised either way.
        """
        return self._run(items, ordered, errors == "yield")

    async def _run(
        self, items: Iterable[ItemT] | AsyncIterable[ItemT], ordered: bool, keep: bool
    ) -> AsyncGenerator[OutT | Failure[ItemT], None]:
        blocks: deque[asyncio.Task[list[OutT | Failure[ItemT]]]] = deque()
        most = max(1, self._window // self._block)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="flyte-batch-cpu") as executor:
            try:
                async with aclosing(_blocks(items, self._block)) as source:
                    async for block in source:
                        blocks.append(asyncio.create_task(self._infer_block(block, executor)))
                        while len(blocks) >= most:
                            for output in _unwrap(await _next(blocks, ordered), keep):
                                yield output
                while blocks:
                    for output in _unwrap(await _next(blocks, ordered), keep):
                        yield output
            finally:
                for task in blocks:
                    task.cancel()
                await asyncio.gather(*blocks, return_exceptions=True)

    async def _infer_block(self, items: list[ItemT], executor: ThreadPoolExecutor) -> list[OutT | Failure[ItemT]]:
        loop = asyncio.get_running_loop()
        prepared: list[Any] = await loop.run_in_executor(executor, _prepare_all, self._prepare, items)
        sent = [i for i, record in enumerate(prepared) if not isinstance(record, Failure)]
        results = await self._batcher.map([prepared[i] for i in sent], return_exceptions=True)
        return await loop.run_in_executor(executor, _finish_all, self._finish, items, prepared, sent, results)


def _prepare_all(prepare: Callable[[ItemT], Any], items: list[ItemT]) -> list[Any]:
    prepared: list[Any] = []
    for item in items:
        try:
            prepared.append(prepare(item))
        except Exception as error:
            prepared.append(Failure(item, error, "prepare"))
    return prepared


def _finish_all(
    finish: Callable[[ItemT, Any], OutT],
    items: list[ItemT],
    prepared: list[Any],
    sent: list[int],
    results: Sequence[Any],
) -> list[OutT | Failure[ItemT]]:
    outputs = prepared  # failures of prepare stay where they are, every other place is overwritten below
    for i, result in zip(sent, results, strict=True):
        if isinstance(result, Exception):
            outputs[i] = Failure(items[i], result, "infer")
            continue
        try:
            outputs[i] = finish(items[i], result)
        except Exception as error:
            outputs[i] = Failure(items[i], error, "finish")
    return outputs


def _unwrap(outputs: list[OutT | Failure[ItemT]], keep: bool) -> Iterable[OutT | Failure[ItemT]]:
    for output in outputs:
        if isinstance(output, Failure) and not keep:
            raise output.error
        yield output


async def _next(tasks: deque[asyncio.Task[list[Any]]], ordered: bool) -> list[Any]:
    """The outputs of the first block, or of whichever block is done first; it leaves the deque."""
    if not ordered:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while tasks[0] not in done:
            tasks.rotate(-1)
    outputs = await tasks[0]
    tasks.popleft()
    return outputs


async def _blocks(items: Iterable[ItemT] | AsyncIterable[ItemT], size: int) -> AsyncGenerator[list[ItemT], None]:
    block: list[ItemT] = []
    if isinstance(items, AsyncIterable):
        async for item in items:
            block.append(item)
            if len(block) == size:
                yield block
                block = []
    else:
        for item in items:
            block.append(item)
            if len(block) == size:
                yield block
                block = []
    if block:
        yield block
