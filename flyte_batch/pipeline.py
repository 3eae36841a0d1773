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
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar

from flyte_batch.cores import available_cores
from flyte_batch.errors import BatcherDied, BatcherNotRunning, EngineDead

GONE = (EngineDead, BatcherDied, BatcherNotRunning)
"""Errors after which a batcher answers nothing more: no fault of the record that meets them."""

P = ParamSpec("P")
T = TypeVar("T")
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
        block: items per thread hop and per ``map`` call; a block is yielded when its last item is done. By default what
            the batcher prefers (a `ContinuousBatcher` puts the records of a call into order), else 64.
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
        block: int | None = None,
        threads: int | None = None,
    ) -> None:
        threads = threads if threads is not None else available_cores()
        if block is None:
            block = min(window, getattr(batcher, "preferred_block", 64))
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
            items: read only as fast as the window allows. A plain iterable that blocks would block the loop, so make
                it async; an async one that pauses is not waited for: what it gave so far goes ahead.
            ordered: in the input's order; otherwise blocks come as they complete.
            errors: ``raise`` ends the run with the first failed item's error; ``yield`` gives a `Failure` in its place.
                What ends the whole pipeline (an engine or batcher that died, a cancellation) is raised either way.
        """
        return self._run(items, ordered, errors == "yield")

    async def _run(
        self, items: Iterable[ItemT] | AsyncIterable[ItemT], ordered: bool, keep: bool
    ) -> AsyncGenerator[OutT | Failure[ItemT], None]:
        executor = ThreadPoolExecutor(self._threads, thread_name_prefix="flyte-batch-cpu")
        under_way: deque[asyncio.Task[list[OutT | Failure[ItemT]]]] = deque()
        most = max(1, self._window // self._block)
        upcoming: asyncio.Future[list[ItemT] | None] | None = None
        exhausted = False
        gone: Exception | None = None
        async with aclosing(_blocks(items, self._block)) as source:
            try:
                while True:
                    if upcoming is None and not exhausted and gone is None and len(under_way) < most:
                        upcoming = asyncio.ensure_future(anext(source, None))
                    waiting: set[asyncio.Future[Any]] = set(islice(under_way, 1 if ordered else None))
                    if upcoming is not None and gone is None:
                        waiting.add(upcoming)
                    if not waiting:
                        if gone is not None:
                            raise gone
                        return
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if upcoming is not None and upcoming.done():
                        block, upcoming = upcoming.result(), None
                        if block is None:
                            exhausted = True
                        else:
                            under_way.append(asyncio.create_task(self._infer_block(block, executor)))
                    for task in _finished(under_way, ordered):
                        for output in _outputs(task):
                            if isinstance(output, Failure) and isinstance(output.error, GONE) and not ordered:
                                gone = output.error  # raised when all that was answered before is yielded
                            elif isinstance(output, Failure) and (not keep or isinstance(output.error, GONE)):
                                raise output.error
                            else:
                                yield output
            finally:
                # Not waiting for the threads: a `prepare` that is under way must not hold up the event loop.
                executor.shutdown(wait=False, cancel_futures=True)
                left: list[asyncio.Future[Any]] = [*under_way, *([] if upcoming is None else [upcoming])]
                for future in left:
                    future.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _infer_block(self, items: list[ItemT], executor: ThreadPoolExecutor) -> list[OutT | Failure[ItemT]]:
        loop = asyncio.get_running_loop()
        prepared: list[Any] = await loop.run_in_executor(executor, _in_context(_prepare_all), self._prepare, items)
        sent = [i for i, record in enumerate(prepared) if not isinstance(record, Failure)]
        results = await self._batcher.map([prepared[i] for i in sent], return_exceptions=True)
        call = _in_context(_finish_all)
        return await loop.run_in_executor(executor, call, self._finish, items, prepared, sent, results)


def _in_context(function: Callable[P, T]) -> Callable[P, T]:
    """The function in the caller's context, on whatever thread: user functions see which Flyte task they work for."""
    context = contextvars.copy_context()  # a copy a call, for a context can't be in use twice

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.run(function, *args, **kwargs)

    return call


def _prepare_all(prepare: Callable[[ItemT], Any], items: list[ItemT]) -> list[Any]:
    prepared: list[Any] = []
    for item in items:
        try:
            prepared.append(prepare(item))
        except BaseException as error:
            prepared.append(Failure(item, _as_failure(error), "prepare"))
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
        except BaseException as error:
            outputs[i] = Failure(items[i], _as_failure(error), "finish")
    return outputs


def _as_failure(error: BaseException) -> Exception:
    """What fails the item only: a cancellation or an exit that user code raises on a thread is not the run's own."""
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _outputs(task: asyncio.Task[list[OutT | Failure[ItemT]]]) -> Sequence[OutT | Failure[ItemT]]:
    try:
        return task.result()
    except GONE as error:  # before the block was taken
        lost: Failure[Any] = Failure(None, error, "infer")
        return [lost]


def _finished(under_way: deque[asyncio.Task[list[Any]]], ordered: bool) -> Iterator[asyncio.Task[list[Any]]]:
    """The blocks that may be yielded now; they leave the deque."""
    if ordered:
        while under_way and under_way[0].done():
            yield under_way.popleft()
    else:
        for task in [task for task in under_way if task.done()]:
            under_way.remove(task)  # one at a time: if this one raises, the others are still to be looked after
            yield task


async def _blocks(items: Iterable[ItemT] | AsyncIterable[ItemT], size: int) -> AsyncGenerator[list[ItemT], None]:
    if not isinstance(items, AsyncIterable):
        iterator = iter(items)
        while block := list(islice(iterator, size)):
            yield block
        return
    source = aiter(items)
    block = []
    item: asyncio.Future[ItemT] | None = None
    try:
        while True:
            item = asyncio.ensure_future(_next(source))
            await asyncio.sleep(0)  # what is ready comes now
            if block and (len(block) == size or not item.done()):
                yield block
                block = []
            try:
                block.append(await item)
            except StopAsyncIteration:
                break
    finally:
        if item is not None:
            item.cancel()
    if block:
        yield block


async def _next(source: AsyncIterator[ItemT]) -> ItemT:
    return await anext(source)
