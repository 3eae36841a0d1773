"""Whose records these are: the future of a submitted record, and the lanes that know who waits.

`packing` lines records up without knowing what a ticket is; here a ticket is a future (`submit`), or a place in the
results of a call (`map`).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from flyte_batch.batching.packing import Lane
from flyte_batch.batching.processing import as_failure
from flyte_batch.monitoring.events import Scope
from flyte_batch.monitoring.scope import scope_of

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")


class Holder(Protocol):
    """What has a submitted record: the lane in which it waits, or what carries it to a device that can give it back."""

    def abandon(self, future: ResultFuture[Any]) -> None:
        """Nobody waits for this record any more."""
        ...


class ResultFuture(asyncio.Future[ResultT]):
    """A submitted record's future. Cancelling it takes the record out of the queue at once."""

    __slots__ = ("cost", "holder")

    cost: float
    holder: Holder | None
    """None before and after, and on a device that cannot give a record back."""

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self.let_go()
        return cancelled

    def let_go(self) -> None:
        """Tell whoever has the record that nobody waits for it any more."""
        holder, self.holder = self.holder, None
        if holder is not None:
            holder.abandon(self)


def new_future(cost: float, loop: asyncio.AbstractEventLoop) -> ResultFuture[Any]:
    # Not an __init__: one written in Python takes longer than all that the C class does.
    future: ResultFuture[Any] = ResultFuture(loop=loop)
    future.cost = cost
    future.holder = None
    return future


class LaneOwner(Protocol):
    """What a lane of submitted records needs of its batcher.

    Attributes:
        lanes: the lane of each task that has records waiting.
    """

    lanes: dict[object, Any]

    def abandon(self, lane: Any, future: ResultFuture[Any]) -> None:
        """A caller gave up on a record that waits."""
        ...


class CallersLane(Lane[RecordT, ResultT]):
    """A lane that remembers its caller's context, and so whose records they are."""

    __slots__ = ("_scope", "context")

    def __init__(self) -> None:
        super().__init__()
        self.context = contextvars.copy_context()
        self._scope: Scope | None = None

    @property
    def scope(self) -> Scope:
        """Whose work it is; the same object for all events of the lane."""
        if self._scope is None:
            self._scope = scope_of(self.context)
        return self._scope


class SubmitLane(CallersLane[RecordT, ResultT]):
    """The records that one task submitted, or one call of ``submit_batch``; their tickets are futures."""

    __slots__ = ("owner", "task")

    def __init__(self, owner: LaneOwner, task: asyncio.Task[Any] | None) -> None:
        super().__init__()
        self.owner = owner
        self.task = task

    def queued(self, tickets: Sequence[ResultFuture[ResultT]]) -> None:
        for future in tickets:
            future.holder = self
        if self.task is not None:
            self.owner.lanes[self.task] = self

    def wants(self, ticket: ResultFuture[ResultT]) -> bool:
        return not ticket.done()

    def taken(self, tickets: Sequence[ResultFuture[ResultT]]) -> None:
        for future in tickets:
            future.holder = None

    def abandon(self, future: ResultFuture[Any]) -> None:
        self.owner.abandon(self, future)

    def emptied(self) -> None:
        if self.task is not None:
            self.owner.lanes.pop(self.task, None)

    def deliver(
        self, tickets: Sequence[ResultFuture[ResultT]], outcomes: Sequence[ResultT | BaseException], failures: int
    ) -> None:
        for future, outcome in zip(tickets, outcomes, strict=True):
            future.holder = None
            if future.done():
                continue
            if failures and isinstance(outcome, BaseException):
                fail(future, outcome)
            else:
                future.set_result(outcome)  # type: ignore[arg-type]


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    with _even_if_its_loop_is_closed(future):
        future.set_exception(as_failure(error))


@contextmanager
def _even_if_its_loop_is_closed(future: asyncio.Future[Any]) -> Iterator[None]:
    """Resolve a future although whoever waited for it, on a loop that is closed, cannot be woken any more."""
    try:
        yield
    except RuntimeError:
        if not future.get_loop().is_closed():
            raise


PENDING: Any = object()
"""In a map's results, the place of a record that is not resolved."""


class MapLane(CallersLane[RecordT, ResultT]):
    """The records of one call of ``map``; their tickets are places in its results. The call has a single waiter."""

    __slots__ = ("abandoned", "error", "refill_at", "results", "timers", "unresolved", "waiter")

    def __init__(self, refill_at: int) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.unresolved = 0
        self.abandoned = False
        self.refill_at = refill_at
        """The call is woken for more records when so few are queued; below 0 once it has no more."""
        self.error: BaseException | None = None
        """The first record's that failed."""
        self.waiter: asyncio.Future[None] | None = None

    def queued(self, tickets: Sequence[int]) -> None:
        self.unresolved += len(tickets)

    def wants(self, ticket: int) -> bool:
        return not self.abandoned and self.results[ticket] is PENDING

    def taken(self, tickets: Sequence[int]) -> None:
        if len(self.records) <= self.refill_at:
            self.wake()

    def deliver(self, tickets: Sequence[int], outcomes: Sequence[ResultT | BaseException], failures: int) -> None:
        results = self.results
        for place, outcome in zip(tickets, outcomes, strict=True):
            if results[place] is PENDING:  # not so where the record's time was over
                results[place] = outcome
                self.unresolved -= 1
        if failures:
            for place in tickets:
                if isinstance(results[place], BaseException):
                    results[place] = as_failure(results[place])
                    self.error = self.error or results[place]
        if failures or not self.unresolved:
            self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            with _even_if_its_loop_is_closed(self.waiter):
                self.waiter.set_result(None)

    async def progress(self) -> None:
        """Wait until there is room for more records, a failure, or the end."""
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None
