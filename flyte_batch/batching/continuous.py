"""`ContinuousBatcher`: records go into the engine one by one, as others come out.

For engines that compute many records side by side and need no batch to start one: vLLM and its like. A static batch
ends with its longest record, while the slots of all others stand empty; here each slot is filled again at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, get_args

from flyte_batch.batching.admission import ResponseLengths, admission_order
from flyte_batch.batching.base import Overflow, State, call_under_way
from flyte_batch.batching.checks import finite_number, one_of, whole_number
from flyte_batch.batching.costs import CostModel
from flyte_batch.batching.engine_batcher import EngineOwner
from flyte_batch.batching.lanes import MapLane, ResultFuture, SubmitLane
from flyte_batch.batching.packing import Backlog, Batch
from flyte_batch.batching.processing import LoopWatch, is_async, is_out_of_memory, name_of
from flyte_batch.device_calls import DeviceCall, current_call
from flyte_batch.engines.base import ContinuousEngine
from flyte_batch.errors import EngineDead
from flyte_batch.monitoring import hooks
from flyte_batch.records import Completion

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")

_IN_FLIGHT = 2
"""Times what the engine computes at once: the other half waits inside, so that no slot is empty for the time that a
result takes to reach us and a new record takes to reach the engine."""
_ARRANGE = 4096
"""Records that are put into order at a time: some ten milliseconds of the event loop."""
_LETTING_GO_S = 1.0
"""How long `stop` waits for the engine to let go of records that nobody wants any more."""
_RECOVERY = 0.05
"""Share of a finished record's cost by which a budget that was lowered rises again."""


class _Flight(Generic[RecordT]):
    """One record on its way through the engine."""

    __slots__ = (
        "batch", "beside", "budget_before", "call", "cost", "generation", "owner", "started_at", "task", "unwanted",
    )  # fmt: skip

    call: DeviceCall  # the last one made with it

    def __init__(self, owner: ContinuousBatcher[RecordT], batch: Batch[RecordT, Completion]) -> None:
        self.owner = owner
        self.batch = batch
        self.cost = 0.0
        self.beside = 0.0  # what was in flight when it was launched, itself included
        self.started_at = 0.0
        self.budget_before = 0.0  # what the budget was before this record lowered it
        self.generation = 0
        self.task: asyncio.Task[Completion] | None = None
        self.unwanted = False

    @property
    def record(self) -> RecordT:
        return self.batch.records[0]

    @property
    def lane(self) -> SubmitLane[RecordT, Completion] | MapLane[RecordT, Completion]:
        lane = self.batch.parts[0][0]
        assert isinstance(lane, SubmitLane | MapLane)  # noqa: S101  a batcher makes no others
        return lane

    def abandon(self, future: ResultFuture[Any]) -> None:
        self.owner._abort(self)


class ContinuousBatcher(EngineOwner[RecordT, Completion, ContinuousEngine[RecordT]]):
    """Keeps an engine with continuous batching full, within a budget of tokens in flight. Owns the engine.

    Same `submit`, `submit_batch`, `map`, `stats` and life as `EngineBatcher`. A record is admitted as soon as the
    budget and the cap have room for it, and its future resolves as soon as it is done. One that fails, or whose caller
    gave up (it is then aborted in the engine), leaves its neighbours alone.

    A record's cost is its prompt's tokens plus those of the response that is to be expected, which is learnt from the
    responses that come out (`ResponseLengths`), and never more than ``estimated_cost`` or, without one, what the engine
    says at most. Callers take turns. The records of one call start the longest first, and those that share a prefix
    together (`admission_order`).

    Args:
        engine: a started engine; the batcher closes it.
        target_tokens_in_flight: budget of all records in flight. Two or more records never exceed it; a record that
            does goes alone. By default twice the engine's ``capacity_tokens``: the engine itself never takes more than
            fit, and what waits inside fills every gap at once.
        max_in_flight: most records in flight; by default twice the engine's ``slots``.
        expected_response_tokens: what to expect of responses before any is known; by default half of their limit.
        shared_prefix: tokens that prompts must share, beyond what all of a call share, to be admitted together; 0 turns
            it off. 16 is the size of vLLM's cache blocks, less would share none.
        max_queue_size: most records that wait.
        turn_size: callers take turns, so many records each: see `DynamicBatcher`.
        overflow: what a full queue does to a submit: ``"wait"``, or ``"reject"`` with `QueueFull`.
        blocked_loop_warning_s: seconds that the engine may hold the event loop at a time before a warning.

    An engine that is out of memory (`EngineOutOfMemory`) gets the record again, and half of what it had in flight; with
    every record that is done, a little more, up to the target. `EngineDead` ends the batcher: what is in flight or
    waits fails with `BatcherDied`.

    Raises:
        TypeError, BadInput: an option that cannot work; the message names it and the remedy.
    """

    preferred_block = 1024
    """Records of a call that are worth ordering: what a `Pipeline` hands over at a time."""

    def __init__(
        self,
        engine: ContinuousEngine[RecordT],
        *,
        target_tokens_in_flight: float | None = None,
        max_in_flight: int | None = None,
        expected_response_tokens: float | None = None,
        shared_prefix: int = 16,
        max_queue_size: int = 5_000,
        turn_size: int = 64,
        overflow: Overflow = "wait",
        blocked_loop_warning_s: float = 0.1,
    ) -> None:
        if not isinstance(engine, ContinuousEngine):
            raise TypeError(
                f"{type(engine).__name__} is no ContinuousEngine (generate, prompt_ids, slots, capacity_tokens): "
                "feed it by an EngineBatcher"
            )
        if not is_async(engine.generate):
            raise TypeError(f"{type(engine).__name__}.generate must be an `async def`")
        for name in ("slots", "capacity_tokens"):
            whole_number(f"the engine's {name}", getattr(engine, name), at_least=1, remedy="mend the engine")
        if target_tokens_in_flight is None:
            target_tokens_in_flight = _IN_FLIGHT * engine.capacity_tokens
        if max_in_flight is None:
            max_in_flight = _IN_FLIGHT * engine.slots
        finite_number(
            "target_tokens_in_flight",
            target_tokens_in_flight,
            above=0,
            remedy="give the tokens of prompts and responses that the engine has at once, or leave it out",
        )
        whole_number("max_in_flight", max_in_flight, at_least=1, remedy="give the most records in flight")
        if expected_response_tokens is not None:
            finite_number("expected_response_tokens", expected_response_tokens, above=0, remedy="leave it out")
        whole_number("shared_prefix", shared_prefix, at_least=0, remedy="0 turns it off")
        whole_number("max_queue_size", max_queue_size, at_least=1, remedy="give the most records that may wait")
        whole_number("turn_size", turn_size, at_least=1, remedy="1 takes a record of each caller in turn")
        one_of("overflow", overflow, get_args(Overflow))
        finite_number("blocked_loop_warning_s", blocked_loop_warning_s, remedy="give seconds, 0.1 say")
        super().__init__(
            backlog=Backlog(max_batch_size=1, turn_size=turn_size, look_past=1, price=self._expected_cost),
            costs=CostModel(engine.estimate_cost, (), 1),
            max_queue_size=max_queue_size,
            stride=max_in_flight,
            window=_ARRANGE,
            overflow=overflow,
        )
        self._own(engine)
        self._lengths = ResponseLengths(expected_response_tokens)
        self._target = target_tokens_in_flight
        self._max_in_flight = max_in_flight
        self._shared_prefix = shared_prefix
        self._watch = LoopWatch(name_of(engine.generate), blocked_loop_warning_s)
        self._call_under_way = object()
        self._context = contextvars.Context()
        self._budget = float(self._target)
        self._generation = 0  # of the budget: an out-of-memory error halves it once, however many records it hit
        self._cost: float = 0
        self._flights: dict[_Flight[RecordT], None] = {}
        self._turned_away: deque[_Flight[RecordT]] = deque()  # by an engine out of memory; they go first
        self._filling = False

    @property
    def budget(self) -> float:
        """What may be in flight now: ``target_tokens_in_flight``, or less since that was too much for the engine."""
        return self._budget

    @property
    def cost_in_flight(self) -> float:
        """Tokens that the records in flight are expected to come to."""
        return self._cost

    def expected_response_tokens(self, prompt_tokens: int, limit: int) -> float:
        """What is known by now of the response to a prompt of so many tokens that may have ``limit``."""
        return self._lengths.expect(prompt_tokens, limit)

    # -- The dispatcher ----------------------------------------------------

    async def _serve(self) -> None:
        while not self._is_drained() or self._turned_away or any(not flight.unwanted for flight in self._flights):
            await self._nap(None)
        left = [flight.task for flight in self._flights if flight.task is not None]
        if left:
            await asyncio.wait(left, timeout=_LETTING_GO_S)

    def _arrived(self, was_empty: bool) -> None:
        self._fill()

    def _room_was_made(self) -> None:
        super()._room_was_made()
        self._fill()  # what stood before others and did not fit may be gone

    def _fill(self) -> None:
        """Admit what fits."""
        if self._filling:  # making room in the queue lets records in, which asks for this again
            return
        self._filling = True
        try:
            while len(self._flights) < self._max_in_flight:
                flight = self._next()
                if flight is None:
                    break
                self._launch(flight)
                self._room_was_made()
        finally:
            self._filling = False

    def _next(self) -> _Flight[RecordT] | None:
        """The next record, if it fits."""
        free = self._budget - self._cost
        while self._turned_away:
            flight = self._turned_away[0]
            if not len(flight.batch.wanted()):
                self._meter.abandoned += 1
                self._turned_away.popleft()
                continue
            flight.cost = self._expected_cost(flight.record, flight.batch.costs[0])  # more may be known by now
            if self._flights and flight.cost > free:
                return None
            return self._turned_away.popleft()
        while len(self._backlog):
            batch = self._backlog.take(free, first_over=not self._flights)
            if not len(batch):
                return None
            if len(batch.wanted()):
                return _Flight(self, batch)
            self._meter.abandoned += 1
        return None

    def _launch(self, flight: _Flight[RecordT]) -> None:
        assert self._loop is not None  # noqa: S101  for the type checker: it was started
        lane = flight.lane
        flight.cost = self._expected_cost(flight.record, flight.batch.costs[0])
        flight.generation = self._generation
        if isinstance(lane, SubmitLane):
            (future,) = flight.batch.parts[0][1]
            future.holder = flight
        self._flights[flight] = None
        self._cost += flight.cost
        flight.beside = self._cost
        flight.started_at = time.time()
        if hooks.is_anybody_listening():
            self._teller.admitted(flight.cost, self._fullness(), len(self._backlog), flight.started_at)
        flight.call = self._meter.launched(len(self._flights))
        # In its caller's context, so that what the engine logs and traces is the caller's.
        # On the batcher's loop: room may be made while it does not run, by a caller who gives up.
        flight.task = self._loop.create_task(self._generate(flight), context=lane.context.copy())
        # What follows is everybody's: out of memory, or dead, is not the news of the caller whose record found out.
        flight.task.add_done_callback(lambda task: self._landed(flight, task), context=self._context)

    def _fullness(self) -> float:
        """Share of the budget or of the most records that is in flight, whichever is larger."""
        return max(len(self._flights) / self._max_in_flight, self._cost / self._target)

    async def _generate(self, flight: _Flight[RecordT]) -> Completion:
        call_under_way.set(self._call_under_way)
        current_call.set(flight.call)
        return await self._watch.over(self.engine.generate(flight.record))

    def _landed(self, flight: _Flight[RecordT], task: asyncio.Task[Completion]) -> None:
        """A record came out of the engine, one way or another."""
        error = asyncio.CancelledError("the engine's call was cancelled") if task.cancelled() else task.exception()
        if flight not in self._flights:
            return  # the batcher died meanwhile
        fill = self._fullness()
        del self._flights[flight]
        # Sums of floats drift; nothing in flight costs nothing.
        self._cost = self._cost - flight.cost if self._flights else 0
        self._meter.landed(flight.call, len(self._flights), has_results=error is None)
        self._meter.loop_blocked_s = self._watch.blocked_s
        if isinstance(error, EngineDead | SystemExit | KeyboardInterrupt):
            if not flight.unwanted:
                self._settle(flight.batch, [error], lost=True)
                self._tell(flight, error, fill, lost=True)
            self._end(error)
            return
        if error is None and not self._turned_away:
            self._budget = min(self._target, self._budget + _RECOVERY * flight.cost)
        out_of_memory = error is not None and not flight.unwanted and is_out_of_memory(error)
        less_will_do = out_of_memory and self._make_do_with_less(flight)
        if not flight.unwanted and not less_will_do:
            self._finish(flight, task.result() if error is None else error, fill)
        self._fill()
        if not self._flights:
            self._meter.enter("assembling" if len(self._backlog) else "starved")
        if self._is_drained():
            self._wake()

    def _finish(self, flight: _Flight[RecordT], outcome: Completion | BaseException, fill: float) -> None:
        batch = flight.batch
        self._meter.batch_finished(
            records=1, cost=flight.cost, record_cost=flight.cost, padded_cost=flight.cost, fill=fill
        )
        self._settle(batch, [outcome])
        self._tell(flight, outcome if isinstance(outcome, BaseException) else None, fill)
        if isinstance(outcome, Completion) and isinstance(outcome.response_tokens, int):
            self._lengths.observe(self._prompt_tokens(flight.record), outcome.response_tokens)

    def _tell(self, flight: _Flight[RecordT], error: BaseException | None, fill: float, *, lost: bool = False) -> None:
        if hooks.is_anybody_listening():
            self._teller.landed(
                flight.batch,
                error,
                now=self._now(),
                started_at=flight.started_at,
                cost=flight.cost,
                fill=fill,
                lost=lost,
            )

    def _make_do_with_less(self, flight: _Flight[RecordT]) -> bool:
        """The engine had no memory for this record: whether there is a chance with fewer others beside it."""
        self._meter.out_of_memory += 1
        if flight.generation == self._generation and self._flights:
            self._generation += 1
            flight.budget_before = flight.budget_before or self._budget
            # Not half of what is left now: others may have ended since.
            self._budget = min(self._budget, flight.beside) / 2
            logger.warning(
                "%s ran out of memory with %.0f tokens in flight: at most %.0f for now. "
                "Set target_tokens_in_flight to that to avoid it.",
                type(self.engine).__name__,
                flight.beside,
                self._budget,
            )
        elif not self._flights and flight.generation == self._generation:
            # It was alone: there is no less, and what was in flight beside it before was not at fault.
            self._budget = max(self._budget, flight.budget_before)
            return False
        self._turned_away.append(flight)
        return True

    def _end(self, cause: BaseException) -> None:
        """The batcher can't go on."""
        if self._state in (State.RUNNING, State.STOPPING):
            self._die(cause)
            if self._task is not None:
                self._task.cancel()

    # -- What is not wanted any more ---------------------------------------

    def _abort(self, flight: _Flight[RecordT]) -> None:
        """Take a record off the device. Its room is free when the engine has let go of it."""
        if flight in self._turned_away:
            self._fill()  # it may stand before others
        if flight not in self._flights or flight.unwanted:
            return
        flight.unwanted = True
        self._meter.abandoned += 1
        if flight.task is not None:
            flight.task.cancel()
        self._wake()

    def _recall(self, lane: MapLane[RecordT, Completion]) -> None:
        for flight in [flight for flight in self._flights if flight.lane is lane]:
            if not len(flight.batch.wanted()):
                self._abort(flight)

    def _release(self) -> None:
        """Forget what an engine that does not let go still holds; nobody waits for it."""
        super()._release()
        self._flights.clear()
        self._cost = 0

    def _take_back(self) -> list[Batch[RecordT, Completion]]:
        flights = [*self._flights, *self._turned_away]
        self._flights.clear()
        self._turned_away.clear()
        self._cost = 0
        for flight in flights:
            if flight.task is not None and not flight.task.get_loop().is_closed():
                flight.task.cancel()
        return [flight.batch for flight in flights if not flight.unwanted]

    # -- What a record costs, and when it starts ---------------------------

    def _prompt_tokens(self, record: RecordT) -> int:
        try:
            return len(self.engine.prompt_ids(record))
        except Exception:
            return 0  # the engine will say what is wrong with the record, to its own caller

    def _expected_cost(self, record: RecordT, most: float) -> float:
        """Tokens that a record will come to, at least 1; ``most`` is what was said of it when it was queued."""
        prompt = self._prompt_tokens(record)
        return max(1.0, min(most, prompt + self._lengths.expect(prompt, max(0.0, most - prompt))))

    def _arranged(self, records: Sequence[RecordT], costs: Sequence[float]) -> Sequence[int] | None:
        expected = [self._expected_cost(record, cost) for record, cost in zip(records, costs, strict=True)]
        try:
            prompts = [self.engine.prompt_ids(record) for record in records]
        except Exception:
            return None
        return admission_order(prompts, expected, shared=self._shared_prefix)
