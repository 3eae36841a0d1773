"""Batches from many concurrent callers: `DynamicBatcher`, and `TokenBatcher` in the words of LLMs.

Drop-ins for ``flyte.extras.DynamicBatcher`` and ``TokenBatcher``: changing the import is the whole migration. One queue
and one dispatcher task; a batch is formed when the device is free, not before, out of all that waits by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, get_args

from flyte_batch.batching.base import Batcher, Overflow, State, call_under_way
from flyte_batch.batching.checks import finite_number, one_of, whole_number
from flyte_batch.batching.costs import CostModel
from flyte_batch.batching.packing import Backlog, Batch, BatchCost
from flyte_batch.batching.processing import ProcessFn, Processor, as_failure, copy_of, is_out_of_memory
from flyte_batch.errors import BadInput, EngineDead
from flyte_batch.monitoring import hooks

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")


class DynamicBatcher(Batcher[RecordT, ResultT]):
    """Groups records of concurrent callers into batches and runs them through one function.

    A batch leaves as soon as the device is free and what waits fills it, or the oldest waiting record is
    ``batch_timeout_s`` old, or no more can arrive (the queue is full, or `stop` was called).

    Args:
        process_fn: takes a list of records, returns one result a record in the same order. An ``async def`` runs on the
            event loop; a plain ``def`` on a thread of its own. Both run in an empty ``contextvars`` context, as a batch
            belongs to many callers. A result that is an exception instance fails its record only.
        cost_estimator: ``(record) -> cost``; None asks ``record.estimate_cost()``, then takes ``default_cost``.
        target_batch_cost: budget of a batch, in the unit of the costs. A batch of two or more records never exceeds it;
            a record that does goes alone.
        max_batch_size: most records in a batch.
        min_batch_size: records that must wait before a batch leaves; ignored once the oldest is ``batch_timeout_s``
            old, when the queue is full and during `stop`.
        batch_timeout_s: seconds that the oldest record waits for others to fill its batch.
        max_queue_size: most records that wait. The results of a running batch are not counted.
        prefetch_batches: has no effect, as batches are formed late; accepted so that calls written for flyte.extras
            work.
        default_cost: cost of a record that says nothing.
        batch_cost: ``"sum"`` of the records' costs, or ``"padded"``: rows x longest, for models that pad.
        length_window: with a number, each batch takes records of similar cost out of that many that wait (512 is a good
            one for padded models). 0 keeps each caller's records in order.
        turn_size: callers take turns, so many records each. With 1, callers that came at the same time progress alike
            and end together; with more they end one after the other, which is better where a caller that ends makes
            room for the next. Not used with a ``length_window``.
        overflow: what a full queue does to a submit: ``"wait"``, or ``"reject"`` with `QueueFull`.
        isolate_failures: split a failing batch until exactly the bad records fail. False fails the whole batch.
        blocked_loop_warning_s: seconds that an ``async`` process_fn may hold the event loop at a time before a warning.

    Out of memory (`EngineOutOfMemory`, ``MemoryError``, any ``OutOfMemoryError``) halves the batch and, from then on,
    the budget. `EngineDead` fails the batch and ends the batcher: what waits fails with `BatcherDied`.

    Raises:
        TypeError, BadInput: an option that cannot work; the message names it and the remedy.
    """

    def __init__(
        self,
        process_fn: ProcessFn[RecordT, ResultT],
        *,
        cost_estimator: Callable[[RecordT], float] | None = None,
        target_batch_cost: float = 32_000,
        max_batch_size: int = 256,
        min_batch_size: int = 1,
        batch_timeout_s: float = 0.05,
        max_queue_size: int = 5_000,
        prefetch_batches: int = 2,
        default_cost: float = 1,
        batch_cost: BatchCost = "sum",
        length_window: int = 0,
        turn_size: int = 1,
        overflow: Overflow = "wait",
        isolate_failures: bool = False,
        blocked_loop_warning_s: float = 0.1,
    ) -> None:
        if not callable(process_fn):
            raise TypeError(f"process_fn must be a function that takes a list of records, got {process_fn!r}")
        if cost_estimator is not None and not callable(cost_estimator):
            raise TypeError(f"cost_estimator must be a function of one record, or None, got {cost_estimator!r}")
        finite_number(
            "target_batch_cost", target_batch_cost, above=0, remedy="give the cost that the device takes at once"
        )
        whole_number("max_batch_size", max_batch_size, at_least=1, remedy="give the most records of a batch")
        whole_number("min_batch_size", min_batch_size, at_least=1, remedy="1 sets no minimum")
        finite_number("batch_timeout_s", batch_timeout_s, remedy="give seconds; 0 waits for nobody")
        whole_number("max_queue_size", max_queue_size, at_least=1, remedy="give the most records that may wait")
        whole_number("prefetch_batches", prefetch_batches, at_least=0, remedy="it has no effect, leave it out")
        finite_number("default_cost", default_cost, remedy="give the cost of a record that has no estimate")
        one_of("batch_cost", batch_cost, get_args(BatchCost))
        whole_number("length_window", length_window, at_least=0, remedy="0 turns it off, 512 suits padded models")
        whole_number("turn_size", turn_size, at_least=1, remedy="1 takes a record of each caller in turn")
        one_of("overflow", overflow, get_args(Overflow))
        finite_number("blocked_loop_warning_s", blocked_loop_warning_s, remedy="give seconds, 0.1 say")
        if min_batch_size > max_batch_size:
            raise BadInput(f"min_batch_size ({min_batch_size}) is above max_batch_size ({max_batch_size}); lower it")
        if min_batch_size > max_queue_size:
            raise BadInput(
                f"min_batch_size ({min_batch_size}) is above max_queue_size ({max_queue_size}): so many could never "
                "wait; lower it or raise max_queue_size"
            )
        if 0 < length_window < max_batch_size:
            raise BadInput(
                f"length_window ({length_window}) is below max_batch_size ({max_batch_size}), so batches could not "
                "fill; raise it, or set it to 0"
            )
        super().__init__(
            backlog=Backlog(
                max_batch_size=max_batch_size, batch_cost=batch_cost, length_window=length_window, turn_size=turn_size
            ),
            costs=CostModel(cost_estimator, self._cost_methods, default_cost),
            max_queue_size=max_queue_size,
            stride=max(max_batch_size, length_window),
            overflow=overflow,
        )
        self._processor = Processor(process_fn, blocked_loop_warning_s=blocked_loop_warning_s)
        self._target_batch_cost = target_batch_cost
        self._max_batch_size = max_batch_size
        self._min_batch_size = min_batch_size
        self._batch_timeout_s = batch_timeout_s
        self._isolate_failures = isolate_failures
        self._budget = target_batch_cost
        # Batches that are left to do of the one that was taken last; the last of the list is on the device.
        self._on_device: list[Batch[RecordT, ResultT]] = []

    _cost_methods: tuple[str, ...] = ("estimate_cost",)

    @property
    def budget(self) -> float:
        """What a batch may cost now: ``target_batch_cost``, or less since a batch did not fit the device."""
        return self._budget

    # -- The dispatcher ----------------------------------------------------

    async def _serve(self) -> None:
        clock = asyncio.get_running_loop().time
        while not self._is_drained():
            if not self._is_due():
                oldest = self._backlog.oldest_arrival()
                deadline = None if oldest is None else oldest + self._batch_timeout_s
                if deadline is None or clock() < deadline:
                    await self._nap(deadline)
                    continue
            loop_turned = await self._run()
            if not loop_turned or not self._is_due():
                # A process_fn that never awaits would otherwise hold the loop for as long as records wait. And where no
                # full batch waits, those who have their results now may bring more; else the device waits for nobody.
                await asyncio.sleep(0)

    def _arrived(self, was_empty: bool) -> None:
        if self._nudge is not None and not self._nudge.done() and (was_empty or self._is_due()):
            self._nudge.set_result(None)

    def _take_back(self) -> list[Batch[RecordT, ResultT]]:
        batches = self._on_device[:]
        self._on_device.clear()
        return batches

    def _is_due(self) -> bool:
        """Whether a batch should leave now, however young its records are."""
        waiting = len(self._backlog)
        if not waiting:
            return False
        if self._arrivals or self._state is not State.RUNNING:
            return True
        return waiting >= self._min_batch_size and self._backlog.fills_a_batch(self._budget)

    async def _run(self) -> bool:
        """Take a batch and run it, and what it is split into, until each of its records is resolved.

        Returns:
            Whether the event loop could turn meanwhile.
        """
        turns: list[None] = []
        turn = asyncio.get_running_loop().call_soon(turns.append, None)
        todo = self._on_device
        todo.append(self._backlog.take(self._budget))
        self._room_was_made()
        self._call_under_way = object()
        call_under_way.set(self._call_under_way)
        while todo:
            # It stays in the list while it runs, so that whatever ends this task finds and fails it.
            before = len(todo[-1])
            todo[-1] = batch = todo[-1].wanted()
            self._meter.abandoned += before - len(batch)
            if not len(batch):
                todo.pop()
                continue
            if hooks.is_anybody_listening():
                self._teller.formed(len(batch), batch.cost, self._fill(batch), len(self._backlog))
            call = self._meter.launched(len(batch))
            started_at = time.time()
            self._teller.tell_soon()  # of the half before
            outcome = await self._processor.call(batch.records, call)
            self._meter.landed(call, 0, has_results=isinstance(outcome, list))
            self._count(batch)
            if isinstance(outcome, list):
                todo.pop()
                failures = self._settle(batch, outcome)
                self._tell(batch, started_at, outcome, failures)
            else:
                self._failed(batch, outcome, started_at)
        self._call_under_way = None
        self._meter.enter("assembling" if len(self._backlog) else "starved")
        if self._is_due():
            self._teller.tell_soon()  # when the next batch is on its way
        else:
            self._teller.tell()
        if (task := asyncio.current_task()) is not None and task.cancelling():
            # process_fn swallowed a cancellation that was meant for us.
            raise asyncio.CancelledError("its task was cancelled")
        turn.cancel()
        return bool(turns)

    def _failed(self, batch: Batch[RecordT, ResultT], error: BaseException, started_at: float) -> None:
        """Decide what becomes of the batch on top of the list: it is split, or fails, or everything ends.

        Raises:
            EngineDead, SystemExit, KeyboardInterrupt: the batcher cannot go on.
        """
        name = self._processor.name
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise error
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            self._meter.out_of_memory += 1
        todo = self._on_device
        todo.pop()
        if len(batch) > 1 and not isinstance(error, EngineDead) and (out_of_memory or self._isolate_failures):
            if out_of_memory and 0 < batch.cost / 2 < self._budget:
                self._budget = batch.cost / 2
                logger.warning(
                    "%s ran out of memory on %d records of cost %g: batches cost at most %g from now on. "
                    "Set target_batch_cost to that to avoid it.",
                    name,
                    len(batch),
                    batch.cost,
                    self._budget,
                )
            todo.extend(reversed(batch.halves()))
            self._tell(batch, started_at, None, out_of_memory=out_of_memory)
            return
        failure = as_failure(error)
        logger.error("%s failed on a batch of %d records: %s: %s", name, len(batch), type(error).__name__, error)
        failures = [failure, *(copy_of(failure) for _ in range(len(batch) - 1))]
        has_died = isinstance(error, EngineDead)
        self._settle(batch, failures, lost=has_died)
        self._tell(batch, started_at, failures, len(batch), out_of_memory, has_died)
        if has_died:
            raise error

    def _tell(
        self,
        batch: Batch[RecordT, ResultT],
        started_at: float,
        outcomes: Sequence[ResultT | BaseException] | None,
        failures: int = 0,
        out_of_memory: bool = False,
        lost: bool = False,
    ) -> None:
        """See to it that a batch that came back is told of; without outcomes, one that is split and tried again."""
        if hooks.is_anybody_listening():
            self._teller.came_back(
                batch,
                outcomes,
                failures,
                now=self._now(),
                started_at=started_at,
                fill=self._fill(batch),
                out_of_memory=out_of_memory,
                lost=lost,
            )

    def _fill(self, batch: Batch[RecordT, ResultT]) -> float:
        return max(batch.cost / self._target_batch_cost, len(batch) / self._max_batch_size)

    def _count(self, batch: Batch[RecordT, ResultT]) -> None:
        self._meter.loop_blocked_s = self._processor.watch.blocked_s
        self._meter.batch_finished(
            records=len(batch),
            cost=batch.cost,
            record_cost=batch.record_cost,
            padded_cost=batch.padded_cost,
            fill=self._fill(batch),
        )

    def _release(self) -> None:
        super()._release()
        self._processor.close()


class TokenBatcher(DynamicBatcher[RecordT, ResultT]):
    """`DynamicBatcher` in the words of LLM inference: the cost of a record is its number of tokens.

    Asks records for ``estimate_tokens()``, then for ``estimate_cost()``. ``inference_fn``, ``token_estimator``,
    ``target_batch_tokens`` and ``default_token_estimate`` come before the generic name beside them; all other options
    are `DynamicBatcher`'s.
    """

    _cost_methods = ("estimate_tokens", "estimate_cost")

    def __init__(
        self,
        inference_fn: ProcessFn[RecordT, ResultT] | None = None,
        *,
        process_fn: ProcessFn[RecordT, ResultT] | None = None,
        token_estimator: Callable[[RecordT], float] | None = None,
        cost_estimator: Callable[[RecordT], float] | None = None,
        target_batch_tokens: float | None = None,
        target_batch_cost: float = 32_000,
        default_token_estimate: float | None = None,
        default_cost: float = 1,
        max_batch_size: int = 256,
        min_batch_size: int = 1,
        batch_timeout_s: float = 0.05,
        max_queue_size: int = 5_000,
        prefetch_batches: int = 2,
        batch_cost: BatchCost = "sum",
        length_window: int = 0,
        turn_size: int = 1,
        overflow: Overflow = "wait",
        isolate_failures: bool = False,
        blocked_loop_warning_s: float = 0.1,
    ) -> None:
        function = inference_fn if inference_fn is not None else process_fn
        if function is None:
            raise TypeError("TokenBatcher requires either 'inference_fn' or 'process_fn'")
        super().__init__(
            function,
            cost_estimator=token_estimator if token_estimator is not None else cost_estimator,
            target_batch_cost=target_batch_tokens if target_batch_tokens is not None else target_batch_cost,
            default_cost=default_token_estimate if default_token_estimate is not None else default_cost,
            max_batch_size=max_batch_size,
            min_batch_size=min_batch_size,
            batch_timeout_s=batch_timeout_s,
            max_queue_size=max_queue_size,
            prefetch_batches=prefetch_batches,
            batch_cost=batch_cost,
            length_window=length_window,
            turn_size=turn_size,
            overflow=overflow,
            isolate_failures=isolate_failures,
            blocked_loop_warning_s=blocked_loop_warning_s,
        )

    async def submit(
        self,
        record: RecordT,
        *,
        estimated_tokens: float | None = None,
        estimated_cost: float | None = None,
        timeout_s: float | None = None,
    ) -> asyncio.Future[ResultT]:
        """`DynamicBatcher.submit`; ``estimated_tokens`` comes before ``estimated_cost``."""
        cost = estimated_tokens if estimated_tokens is not None else estimated_cost
        return await super().submit(record, estimated_cost=cost, timeout_s=timeout_s)

    async def submit_batch(
        self,
        records: Sequence[RecordT],
        *,
        estimated_tokens: Sequence[float] | None = None,
        estimated_cost: Sequence[float] | None = None,
        timeout_s: float | None = None,
    ) -> list[asyncio.Future[ResultT]]:
        """`DynamicBatcher.submit_batch`; ``estimated_tokens`` comes before ``estimated_cost``."""
        costs = estimated_tokens if estimated_tokens is not None else estimated_cost
        return await super().submit_batch(records, estimated_cost=costs, timeout_s=timeout_s)

    async def map(
        self,
        records: Iterable[RecordT],
        *,
        estimated_tokens: Sequence[float] | None = None,
        estimated_cost: Sequence[float] | None = None,
        timeout_s: float | None = None,
        return_exceptions: bool = False,
    ) -> list[ResultT]:
        """`DynamicBatcher.map`; ``estimated_tokens`` comes before ``estimated_cost``."""
        return await super().map(
            records,
            estimated_cost=estimated_tokens if estimated_tokens is not None else estimated_cost,
            timeout_s=timeout_s,
            return_exceptions=return_exceptions,
        )
