"""What every batcher shares: taking records from many callers, bounding the queue, starting, stopping and dying.

All decisions are taken synchronously, on the batcher's event loop, at the moment that makes them possible: a record is
admitted by whoever frees the room, not by its caller when that wakes up. Callers and the one dispatcher task only wait.
What leaves the queue, when, and what is done with it is the subclass's.
"""

from __future__ import annotations

import abc
import asyncio
import contextvars
import logging
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from flyte_batch.batching.checks import finite_number
from flyte_batch.batching.costs import CostModel, checked_cost, checked_costs
from flyte_batch.batching.lanes import PENDING, CallersLane, MapLane, ResultFuture, SubmitLane, fail, new_future
from flyte_batch.batching.packing import Backlog, Batch
from flyte_batch.batching.stats import BatchStats, Meter
from flyte_batch.batching.telling import Teller
from flyte_batch.errors import BadInput, BatcherDied, BatcherError, BatcherNotRunning, DeadlineExceeded, QueueFull
from flyte_batch.monitoring import events, hooks

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")

Overflow = Literal["wait", "reject"]
"""What a full queue does to a submit: let it wait for room, or refuse it with `QueueFull`."""


class State(Enum):
    NEW = "was not started"
    RUNNING = "is running"
    STOPPING = "is stopping"
    STOPPED = "was stopped"
    DIED = "died"


class _Arrival(Generic[RecordT, ResultT]):
    """Records that wait for room in the queue, together."""

    __slots__ = ("admitted", "costs", "lane", "records", "tickets")

    def __init__(
        self,
        lane: CallersLane[RecordT, ResultT],
        records: list[RecordT],
        costs: list[float],
        tickets: list[Any],
        admitted: asyncio.Future[None],
    ) -> None:
        self.lane = lane
        self.records = records
        self.costs = costs
        self.tickets = tickets
        self.admitted = admitted


call_under_way: contextvars.ContextVar[object] = contextvars.ContextVar("call_under_way", default=None)
"""Inside process_fn, a token of this very call: `stop` must not wait there for it to end."""


class Batcher(abc.ABC, Generic[RecordT, ResultT]):
    """Common ground of the batchers. See `DynamicBatcher` for the meaning of the options, which it has validated.

    A batcher belongs to the event loop that started it. Its task runs in an empty `contextvars.Context`: it serves many
    callers, and must not carry the context of the one that happened to start it.

    Args:
        backlog: what waits.
        costs: finds the cost of a record.
        max_queue_size: most records that wait.
        stride: records that map and submit_batch queue at a time.
        window: records that map draws, and a subclass may put into another order (`_arranged`), at a time.
        overflow: what a full queue does to a submit.

    Attributes:
        id: names this batcher in events and reports; one whose engine was rebuilt has another.
    """

    def __init__(
        self,
        *,
        backlog: Backlog[RecordT, ResultT],
        costs: CostModel,
        max_queue_size: int,
        stride: int,
        window: int | None = None,
        overflow: Overflow,
    ) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._teller = Teller(self.id)
        self._backlog = backlog
        self._costs = costs
        self._max_queue_size = max_queue_size
        # What map and submit_batch queue at a time. Twice that is enough for the next batch to be ready when the
        # device becomes free, and leaves the rest of the queue to others.
        self._stride = min(stride, max_queue_size)
        self._window = max(self._stride, window or 0)
        self._overflow = overflow
        self._meter = Meter()
        self._state = State.NEW
        self._cause_of_death: BaseException | None = None
        self._unclosed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._now: Callable[[], float] = time.monotonic
        self._task: asyncio.Task[None] | None = None
        self._nudge: asyncio.Future[None] | None = None
        self.lanes: dict[object, SubmitLane[RecordT, ResultT]] = {}
        self._arrivals: deque[_Arrival[RecordT, ResultT]] = deque()
        self._open_calls = 0
        self._call_under_way: object = None

    preferred_block = 64
    """Records that it suits to get in one call of `map`; see `Pipeline`."""

    # -- What a subclass adds ---------------------------------------------

    @abc.abstractmethod
    async def _serve(self) -> None:
        """The dispatcher: take from the backlog and run, until `_is_drained`."""

    @abc.abstractmethod
    def _arrived(self, was_empty: bool) -> None:
        """Records have come into the backlog, which held none if ``was_empty``."""

    @abc.abstractmethod
    def _take_back(self) -> list[Batch[RecordT, ResultT]]:
        """What is on the device and not resolved, for a batcher that cannot go on. Nobody will ask for it again."""

    def _arranged(self, records: Sequence[RecordT], costs: Sequence[float]) -> Sequence[int] | None:
        """In which order to queue some records of one call; None for the order in which they came."""
        return None

    def _recall(self, lane: MapLane[RecordT, ResultT]) -> None:
        """Stop what is on the device of a map's records that it does not want any more, where that can be done."""

    def _release(self) -> None:
        """Let go of what the batcher held, after it ended."""
        self._teller.tell()

    # -- Life --------------------------------------------------------------

    @property
    def engine_name(self) -> str:
        """What answers the records, in events and reports: the engine's class, the batcher's where it owns none."""
        return type(self).__name__

    @property
    def stats(self) -> BatchStats:
        """The figures at this moment, the running batch included; a copy that does not change."""
        return self._meter.snapshot(queued=len(self._backlog))

    @property
    def is_told(self) -> bool:
        """Whether calls say when their device was at work: busy seconds then hold where the event loop stands still."""
        return self._meter.is_told

    @property
    def stats_source(self) -> Callable[[], BatchStats]:
        """Gives `stats`, the queue left out, without keeping the batcher or its engine alive."""
        return partial(self._meter.snapshot, queued=0)

    @property
    def is_running(self) -> bool:
        """Whether records are being worked on; false as soon as the batcher has stopped or cannot go on."""
        return (
            self._state in (State.RUNNING, State.STOPPING)
            and self._task is not None
            and not self._task.done()
            and self._loop is not None
            and not self._loop.is_closed()
        )

    async def start(self) -> None:
        """Begin to take records, on the running event loop. Also after `stop`, or after the batcher died.

        Raises:
            RuntimeError: it is running already.
        """
        if self.is_running:
            raise RuntimeError(f"{type(self).__name__} is already running")
        self._bury_if_dead()
        self._state = State.RUNNING
        self._cause_of_death = None
        self._unclosed = True
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._teller.loop = self._loop
        self._task = self._loop.create_task(
            self._serve(), name=f"{type(self).__name__}-dispatcher", context=contextvars.Context()
        )
        self._task.add_done_callback(self._dispatcher_ended)
        self._meter.enter("starved")
        hooks.register_batcher(self)
        if hooks.is_anybody_listening():
            hooks.emit(events.EngineStarted(time.time(), self.id, self.engine_name))

    async def stop(self) -> None:
        """Refuse new records, finish all accepted ones (calls of `map` in progress too), then stop.

        Cancelling it, by ``wait_for`` say, stops only the waiting: the batcher goes on to finish, and `stop` can be
        awaited again. Called from within ``process_fn`` it does not wait, because that would be for itself.

        Raises:
            BatcherError: called from another event loop than the batcher's.
        """
        self._unclosed = False
        self._bury_if_dead()
        task = self._task
        if task is None or not self.is_running:
            return
        if asyncio.get_running_loop() is not self._loop:
            raise self._foreign_loop()
        if self._state is State.RUNNING:
            self._state = State.STOPPING
            self._wake()
        if self._call_under_way is not None and call_under_way.get() is self._call_under_way:
            return
        await asyncio.wait([task])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def __del__(self) -> None:
        if getattr(self, "_unclosed", False):
            warnings.warn(
                f"unclosed {type(self).__name__}: use `async with`, or await stop()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _dispatcher_ended(self, task: asyncio.Task[None]) -> None:
        if task is not self._task or self._state not in (State.RUNNING, State.STOPPING):
            return
        if task.cancelled():
            self._die(asyncio.CancelledError("its task was cancelled"))
        elif (error := task.exception()) is not None:
            self._die(error)
        else:
            self._state = State.STOPPED
            self._meter.enter("off")
            self._release()

    def _bury_if_dead(self) -> None:
        """Notice a death that nobody could report: the loop was closed, or is still to run the task's callback."""
        if self._state not in (State.RUNNING, State.STOPPING) or self._task is None or self._loop is None:
            return
        if self._task.done():
            self._dispatcher_ended(self._task)
        elif self._loop.is_closed():
            self._die(RuntimeError("its event loop was closed before stop() was awaited"))

    def _die(self, cause: BaseException) -> None:
        """Fail everything that waits, with a typed error and the cause."""
        self._state = State.DIED
        self._cause_of_death = cause
        # A program that ends cancels every task of its loop: with nothing waiting, nobody has lost anything by it.
        on_device = self._take_back()
        lost = on_device or self._arrivals or len(self._backlog) or not isinstance(cause, asyncio.CancelledError)
        level = logging.ERROR if lost else logging.DEBUG
        logger.log(level, "%s died: %s: %s", type(self).__name__, type(cause).__name__, cause)
        self._meter.enter("off")
        pending = (*on_device, self._backlog.take_all())
        if lost and hooks.is_anybody_listening():
            self._teller.tell()
            died = type(cause).__name__, str(cause), sum(map(len, pending))
            hooks.emit(events.EngineDied(time.time(), self.id, self.engine_name, *died))
        for batch in pending:
            self._settle(batch, [self._death() for _ in range(len(batch))], lost=True)
        for arrival in self._arrivals:
            if not arrival.admitted.done():
                fail(arrival.admitted, self._death())
        self._arrivals.clear()
        self.lanes.clear()
        self._release()

    def _death(self) -> BatcherDied:
        cause = self._cause_of_death
        error = BatcherDied(
            f"{type(self).__name__} died of {type(cause).__name__}: {cause}; call start() once its cause is removed"
        )
        error.__cause__ = cause
        return error

    def _foreign_loop(self) -> BatcherError:
        return BatcherError(
            f"{type(self).__name__} belongs to another event loop than this one; "
            "from another thread use asyncio.run_coroutine_threadsafe(batcher.map(...), loop), or one batcher a loop"
        )

    def _check_caller(self) -> asyncio.AbstractEventLoop:
        """The loop, if a record may be submitted now and from here."""
        loop = asyncio.get_running_loop()
        if self._state is not State.RUNNING or loop is not self._loop or self._task is None or self._task.done():
            self._bury_if_dead()
            if self._state is State.DIED:
                raise self._death()
            if self._state is not State.RUNNING:
                raise BatcherNotRunning(
                    f"{type(self).__name__} is not running: it {self._state.value}. Call start() or use 'async with'."
                )
            raise self._foreign_loop()
        inside = self._call_under_way is not None and call_under_way.get() is self._call_under_way
        if inside or asyncio.current_task(loop) is self._task:
            raise BatcherError("what the batcher runs submits to that same batcher, and would wait for itself")
        return loop

    # -- Taking records ----------------------------------------------------

    async def submit(
        self, record: RecordT, *, estimated_cost: float | None = None, timeout_s: float | None = None
    ) -> asyncio.Future[ResultT]:
        """Queue one record; waits while the queue is full.

        Args:
            record: what ``process_fn`` gets.
            estimated_cost: its cost. None asks ``cost_estimator``, then ``record.estimate_cost()``, then takes
                ``default_cost``.
            timeout_s: seconds from now after which its future fails with `DeadlineExceeded` if it has no result. It is
                then taken out of the queue, and off a device that can give it back. None waits for ever.

        Returns:
            A future of the record's result. Cancelling it takes the record out of the queue.

        Raises:
            BatcherNotRunning: before `start`, or since `stop` was called.
            BatcherDied: the batcher cannot go on.
            QueueFull: no room, and ``overflow="reject"``.
            BatcherError: called from another event loop, or from within ``process_fn``.
            TypeError, ValueError: the cost is no usable number. What an estimator raises is passed on.
        """
        loop = self._check_caller()
        given = estimated_cost
        cost = self._costs.cost_of(record) if given is None else checked_cost(given, "estimated_cost")
        deadline = self._deadline(timeout_s)
        task = asyncio.current_task(loop)
        lane = self.lanes.get(task)
        if lane is None:
            lane = SubmitLane(self, task)
        future: ResultFuture[ResultT] = new_future(cost, loop)
        if self._has_room(1):
            self._push(lane, [record], [cost], [future])
        else:
            self._refuse_if_no_room(1)
            await self._enter(lane, [record], [cost], [future], deadline)
        if deadline is not None:
            self._expire_at(deadline, [future])
        return future

    async def submit_batch(
        self,
        records: Sequence[RecordT],
        *,
        estimated_cost: Sequence[float] | None = None,
        timeout_s: float | None = None,
    ) -> list[asyncio.Future[ResultT]]:
        """Queue several records, all or none, and return their futures. `map` does it at a fraction of the effort.

        Raises:
            ValueError: ``estimated_cost`` has another length than ``records``.
            QueueFull: no room for all of them, and ``overflow="reject"``.
            Exception: as `submit`; a record without a usable cost is named before any is queued.
        """
        loop = self._check_caller()
        records = list(records)
        costs = self._costs_for(records, estimated_cost)
        deadline = self._deadline(timeout_s)
        self._refuse_if_no_room(len(records))
        lane = SubmitLane[RecordT, ResultT](self, None)
        futures: list[ResultFuture[ResultT]] = [new_future(cost, loop) for cost in costs]
        order = self._arranged(records, costs)
        if order is None:
            await self._enter(lane, records, costs, futures, deadline)
        else:
            arranged = [records[i] for i in order], [costs[i] for i in order], [futures[i] for i in order]
            await self._enter(lane, *arranged, deadline)
        if deadline is not None:
            self._expire_at(deadline, futures)
        return list(futures)

    async def _enter(
        self,
        lane: SubmitLane[RecordT, ResultT],
        records: list[RecordT],
        costs: list[float],
        futures: list[ResultFuture[ResultT]],
        deadline: float | None,
    ) -> None:
        """Queue records as room comes, or none of them; their futures fail if none came before the deadline."""
        self._open_calls += 1
        try:
            for start in range(0, len(records), self._stride):
                part = slice(start, start + self._stride)
                if not await self._admit(lane, records[part], costs[part], futures[part], deadline):
                    self._expire(futures)
                    return
        except BaseException:
            # Nobody will ever hold these futures. The room may have come in the same tick as a cancellation.
            for future in futures:
                future.cancel()
            raise
        finally:
            self._close_call()

    async def map(
        self,
        records: Iterable[RecordT],
        *,
        estimated_cost: Sequence[float] | None = None,
        timeout_s: float | None = None,
        return_exceptions: bool = False,
    ) -> list[ResultT]:
        """The results of all records, in order. Waits once for all of them: no future or task per record.

        Records are drawn from ``records`` a few batches ahead of the device (in a `ContinuousBatcher`, up to 4,096), so
        it may be a generator. Cancelling it
        abandons what has not reached the device.

        Args:
            records: what ``process_fn`` gets.
            estimated_cost: one a record; None as for `submit`.
            timeout_s: as for `submit`, for each record from when it is queued.
            return_exceptions: put a failed record's exception in its place instead of raising the first.

        Raises:
            ValueError: ``estimated_cost`` has another length than ``records``.
            QueueFull: the queue is full at the start, and ``overflow="reject"``. Once begun, a map waits for room.
            Exception: as `submit`, and the first failed record's error.
        """
        self._check_caller()
        self._deadline(timeout_s)
        self._refuse_if_no_room(1)
        lane = MapLane[RecordT, ResultT](refill_at=self._stride)
        self._open_calls += 1
        try:
            await self._feed(lane, records, estimated_cost, timeout_s, return_exceptions)
            lane.refill_at = -1
            while lane.unresolved and (return_exceptions or lane.error is None):
                await lane.progress()
            if lane.error is not None and not return_exceptions:
                raise lane.error
            return lane.results
        finally:
            lane.abandoned = True
            for timer in lane.timers:
                timer.cancel()
            self._meter.abandoned += self._backlog.discard(lane)
            if lane.unresolved:
                self._recall(lane)
            self._room_was_made()
            self._close_call()

    async def _feed(
        self,
        lane: MapLane[RecordT, ResultT],
        records: Iterable[RecordT],
        estimated_cost: Sequence[float] | None,
        timeout_s: float | None,
        return_exceptions: bool,
    ) -> None:
        """Queue a map's records stride by stride, as the device takes them."""
        source = iter(records)
        start = 0
        while some := list(islice(source, self._window)):
            places = list(range(start, start + len(some)))
            given = None if estimated_cost is None else estimated_cost[start : start + len(some)]
            start += len(some)
            lane.results += [PENDING] * len(some)
            try:
                costs = self._costs_for(some, given)
            except Exception:
                if not return_exceptions:
                    raise
                some, costs, places = self._those_with_a_cost(lane, some, given, places)
            order = self._arranged(some, costs)
            if order is not None:
                some, costs, places = [some[i] for i in order], [costs[i] for i in order], [places[i] for i in order]
            for at in range(0, len(some), self._stride):
                part = slice(at, at + self._stride)
                try:
                    queued = await self._admit(lane, some[part], costs[part], places[part], self._deadline(timeout_s))
                except BatcherDied:
                    if not return_exceptions:
                        raise
                    for place in places[part]:
                        lane.results[place] = self._death()
                    await asyncio.sleep(0)  # the source may be endless
                    continue
                if not queued:
                    self._meter.expired += len(places[part])
                    for place in places[part]:
                        lane.results[place] = lane.error = _too_late()
                elif timeout_s is not None:
                    self._expire_places_at(self._now() + timeout_s, lane, places[part], costs[part])
                while len(lane) > lane.refill_at and (return_exceptions or lane.error is None):
                    await lane.progress()
                if lane.error is not None and not return_exceptions:
                    return
        if estimated_cost is not None and len(estimated_cost) != start:
            raise _length_mismatch(len(estimated_cost), start)

    def _those_with_a_cost(
        self,
        lane: MapLane[RecordT, ResultT],
        records: Sequence[RecordT],
        given: Sequence[float] | None,
        places: list[int],
    ) -> tuple[list[RecordT], list[float], list[int]]:
        """What is left of the records after those whose cost cannot be had got their error as the result."""
        columns: tuple[list[RecordT], list[float], list[int]] = ([], [], [])
        for i, (record, place) in enumerate(zip(records, places, strict=True)):
            try:
                (cost,) = self._costs_for([record], None if given is None else given[i : i + 1])
            except Exception as error:
                lane.results[place] = error
            else:
                columns[0].append(record)
                columns[1].append(cost)
                columns[2].append(place)
        return columns

    def _costs_for(self, records: Sequence[RecordT], given: Sequence[float] | None) -> list[float]:
        if given is None:
            return self._costs.costs_of(records)
        if len(given) != len(records):
            raise _length_mismatch(len(given), len(records))
        return checked_costs(given, "estimated_cost")

    # -- Deadlines ---------------------------------------------------------

    def _deadline(self, timeout_s: float | None) -> float | None:
        """When a timeout that begins now is over, on the loop's clock.

        Raises:
            TypeError, BadInput: it is no usable number of seconds.
        """
        if timeout_s is None:
            return None
        finite_number("timeout_s", timeout_s, remedy="give seconds, or None to wait for ever")
        return self._now() + timeout_s

    def _expire_at(self, deadline: float, futures: Sequence[ResultFuture[ResultT]]) -> None:
        timer = asyncio.get_running_loop().call_at(deadline, self._expire, futures)
        left = len(futures)

        def resolved(_: object) -> None:
            nonlocal left
            left -= 1
            if not left:  # a timer that goes on would keep the results
                timer.cancel()

        for future in futures:
            future.add_done_callback(resolved)

    def _expire(self, futures: Sequence[ResultFuture[ResultT]]) -> None:
        for future in futures:
            if not future.done():
                self._meter.expired += 1
                fail(future, _too_late())
                future.let_go()

    def _expire_places_at(
        self, deadline: float, lane: MapLane[RecordT, ResultT], places: list[int], costs: list[float]
    ) -> None:
        def expire() -> None:
            late = {place: cost for place, cost in zip(places, costs, strict=True) if lane.wants(place)}
            if not late:
                return
            self._meter.expired += len(late)
            waiting = [place for place in lane.tickets if place in late and place not in (lane.dropped or ())]
            for place in waiting:
                self._backlog.drop(lane, place, late[place])
            self._meter.abandoned += len(waiting)
            lane.deliver(list(late), [_too_late() for _ in late], len(late))
            self._recall(lane)
            self._room_was_made()

        lane.timers.append(asyncio.get_running_loop().call_at(deadline, expire))

    # -- The queue's bound -------------------------------------------------

    def _fits(self, count: int) -> bool:
        return len(self._backlog) + count <= self._max_queue_size

    def _has_room(self, count: int) -> bool:
        """Whether a newcomer may enter: not ahead of those who wait already."""
        return not self._arrivals and self._fits(count)

    def _refuse_if_no_room(self, count: int) -> None:
        if self._overflow == "reject" and not self._has_room(count):
            raise QueueFull(
                f"no room for {count} more: {len(self._backlog)} records wait, max_queue_size={self._max_queue_size}. "
                'Shed this load, come back later, or use overflow="wait"'
            )

    async def _admit(
        self,
        lane: CallersLane[RecordT, ResultT],
        records: list[RecordT],
        costs: list[float],
        tickets: list[Any],
        deadline: float | None,
    ) -> bool:
        """Queue records, at most `_stride`, together, first come first served.

        Returns:
            Whether they are queued; False if there was no room before the deadline, on the loop's clock.

        Raises:
            BatcherDied: meanwhile, or before.
        """
        if self._state is State.DIED:
            raise self._death()
        if not records:
            return True
        if self._has_room(len(records)):
            self._push(lane, records, costs, tickets)
            return True
        arrival = _Arrival(lane, records, costs, tickets, asyncio.get_running_loop().create_future())
        self._arrivals.append(arrival)
        self._wake()
        try:
            async with asyncio.timeout_at(deadline):
                await arrival.admitted
        except TimeoutError:
            self._room_was_made()
            # The room may have come in the same tick.
            return not arrival.admitted.cancelled()
        except asyncio.CancelledError:
            # It may have been the one that the others waited behind.
            self._room_was_made()
            raise
        return True

    def _push(
        self,
        lane: CallersLane[RecordT, ResultT],
        records: list[RecordT],
        costs: list[float],
        tickets: list[Any],
    ) -> None:
        was_empty = not len(self._backlog)
        count, cost = len(records), sum(costs)  # the lists are the backlog's from now on
        self._backlog.push(lane, records, costs, tickets, self._now())
        self._meter.submitted += count
        if hooks.is_anybody_listening():
            self._teller.submitted(lane, count, cost, len(self._backlog))
        if was_empty and self._meter.phase == "starved":
            self._meter.enter("assembling")
        self._arrived(was_empty)

    def tell(self) -> None:
        """Tell monitoring hooks now of all that came back, which they hear a moment later otherwise."""
        self._teller.tell()

    def abandon(self, lane: SubmitLane[RecordT, ResultT], future: ResultFuture[ResultT]) -> None:
        """A caller gave up on a record that waits."""
        self._backlog.drop(lane, future, future.cost)
        self._meter.abandoned += 1
        self._room_was_made()

    def _room_was_made(self) -> None:
        while self._arrivals:
            arrival = self._arrivals[0]
            waits = not arrival.admitted.done()
            if waits and not self._fits(len(arrival.records)):
                break
            self._arrivals.popleft()  # first: what is pushed may leave at once, and make room
            if waits:
                arrival.admitted.set_result(None)
                self._push(arrival.lane, arrival.records, arrival.costs, arrival.tickets)
        if self._meter.phase == "assembling" and not len(self._backlog):
            self._meter.enter("starved")

    # -- The dispatcher's waiting ------------------------------------------

    def _close_call(self) -> None:
        """A call will queue no more records; `stop` waits for all of them to have said so."""
        self._open_calls -= 1
        if self._is_drained():
            self._wake()

    def _is_drained(self) -> bool:
        """Whether `stop` was called and nothing accepted is left to do."""
        return self._state is State.STOPPING and not len(self._backlog) and not self._open_calls

    def _wake(self) -> None:
        """Let the dispatcher look again."""
        if self._nudge is not None and not self._nudge.done():
            self._nudge.set_result(None)

    async def _nap(self, until: float | None) -> None:
        """Until something happened, or that time on the loop's clock."""
        loop = asyncio.get_running_loop()
        self._nudge = loop.create_future()
        timer = None if until is None else loop.call_at(until, self._wake)
        try:
            await self._nudge
        finally:
            self._nudge = None
            if timer is not None:
                timer.cancel()

    # -- Outcomes ----------------------------------------------------------

    def _settle(
        self, batch: Batch[RecordT, ResultT], outcomes: Sequence[ResultT | BaseException], *, lost: bool = False
    ) -> int:
        """Resolve a batch's records; an exception in a record's place fails that record only.

        Args:
            batch: whose records.
            outcomes: one a record.
            lost: whether they are the errors of records that the engine's death took.

        Returns:
            How many failed.
        """
        failures = 0
        if any(issubclass(kind, BaseException) for kind in set(map(type, outcomes))):
            failures = sum(isinstance(outcome, BaseException) for outcome in outcomes)
        self._meter.lost += failures if lost else 0
        self._meter.failed += failures  # first: another thread may read meanwhile, and takes the rest for answered
        self._meter.completed += len(batch)
        batch.deliver(outcomes, failures)
        return failures


def _length_mismatch(costs: int, records: int) -> BadInput:
    return BadInput(f"estimated_cost has {costs} items for {records} records; give one cost a record, or None")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the record had no result when its timeout_s was over: allow more, or send less at once")
