"""What a batcher tells of its records, gathered per caller and step of the event loop: a record costs a few additions.

Nothing is gathered while nobody listens.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flyte_batch.batching.lanes import CallersLane
from flyte_batch.batching.packing import Batch
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.events import Scope, Share

_nobodys = contextvars.Context()
"""Where a batcher's events are told: they are of many callers, so none of theirs."""


class _Tally:
    """One caller's records that got their outcome."""

    __slots__ = ("arrivals", "cost", "failed", "records")

    def __init__(self) -> None:
        self.records = self.failed = 0
        self.cost = 0.0
        self.arrivals: Counter[float] = Counter()

    def share(self, scope: Scope, now: float) -> Share:
        latencies = tuple((now - arrival, records) for arrival, records in self.arrivals.items())
        return Share(scope, self.records, self.failed, self.cost, latencies)


@dataclass(slots=True)
class CameBack:
    """A batch that came back, to be told of when nobody waits for that.

    Attributes:
        batch: as the device had it.
        outcomes: one a record; None if it is split and tried again.
        failures: those of them that are errors.
        started_at: Unix time when the device got it.
        fill: share of the budget or of the most records.
        out_of_memory: whether it did not fit.
        now: when it came back, on the event loop's clock.
        at: the same as Unix time.
    """

    batch: Batch[Any, Any]
    outcomes: Sequence[object] | None
    failures: int
    started_at: float
    fill: float
    out_of_memory: bool
    now: float
    at: float = field(default_factory=time.time)


class Teller:
    """Tells hooks of one batcher's records.

    Args:
        batcher: its id.
    """

    def __init__(self, batcher: str) -> None:
        self._batcher = batcher
        self._queued = 0
        self._submitted: dict[Scope, list[float]] = {}  # scope -> records, cost
        self._tallies: dict[Scope, _Tally] = {}
        self._formed = self._done = 0
        self._admitted: list[float] = []  # costs
        self._landed: list[tuple[float, float, float]] = []  # started at, cost, fill

    def submitted(self, lane: CallersLane[Any, Any], records: int, cost: float, queued: int) -> None:
        """Records entered the queue."""
        if not self._submitted:
            asyncio.get_running_loop().call_soon(self._tell_submitted, context=_nobodys)
        of_caller = self._submitted.setdefault(lane.scope, [0, 0.0])
        of_caller[0] += records
        of_caller[1] += cost
        self._queued = queued

    def formed(self, records: int, cost: float, fill: float, queued: int) -> None:
        """Records leave the queue for the device."""
        self._tell_submitted()
        self._formed += 1
        hooks.emit(events.BatchFormed(time.time(), self._batcher, self._formed, records, cost, fill, queued))

    def admitted(self, cost: float, fill: Callable[[], float], queued: int) -> None:
        """A record goes to the device by itself; told with the others of this step of the loop."""
        if not self._admitted:
            asyncio.get_running_loop().call_soon(self._tell_admitted, fill, context=_nobodys)
        self._admitted.append(cost)
        self._queued = queued

    def settled(self, batch: Batch[Any, Any], outcomes: Sequence[object], failures: int) -> None:
        """Records of a batch got their outcome, ``failures`` of them an error; `landed` comes next."""
        start = 0
        for lane, tickets in batch.parts:
            assert isinstance(lane, CallersLane)  # noqa: S101  a batcher makes no others
            part = slice(start, start + len(tickets))
            start = part.stop
            scope = lane.scope
            tally = self._tallies.get(scope)
            if tally is None:
                tally = self._tallies[scope] = _Tally()
            tally.records += len(tickets)
            if len(tickets) == 1:
                tally.cost += batch.costs[part.start]
                tally.arrivals[batch.arrivals[part.start]] += 1
            else:
                tally.cost += sum(batch.costs[part])
                tally.arrivals.update(batch.arrivals[part])
            if failures:
                for outcome in outcomes[part]:
                    if isinstance(outcome, BaseException):
                        tally.failed += 1
                        failed = type(outcome).__name__, str(outcome)
                        hooks.emit(events.RecordFailed(time.time(), scope, "infer", *failed, self._batcher))

    def came_back(self, told: CameBack) -> None:
        """A batch came back."""
        batch = told.batch
        if told.outcomes is not None:
            self.settled(batch, told.outcomes, told.failures)
        done = told.started_at, batch.cost, told.fill, told.out_of_memory, told.now
        self._tell_done(len(batch), *done, at=told.at)

    def landed(self, started_at: float, cost: float, fill: float) -> None:
        """A record came back by itself; told with the others of this step of the loop."""
        if not self._landed:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._tell_landed, loop.time, context=_nobodys)
        self._landed.append((started_at, cost, fill))

    def _tell_submitted(self) -> None:
        submitted, self._submitted = self._submitted, {}
        for scope, (records, cost) in submitted.items():
            counts = int(records), cost, self._queued
            hooks.emit(events.RecordsSubmitted(time.time(), self._batcher, scope, *counts))

    def _tell_admitted(self, fill: Callable[[], float]) -> None:
        admitted, self._admitted = self._admitted, []
        self.formed(len(admitted), sum(admitted), fill(), self._queued)

    def _tell_landed(self, now: Callable[[], float]) -> None:
        landed, self._landed = self._landed, []
        started_at, cost, fill = min(each[0] for each in landed), sum(each[1] for each in landed), landed[0][2]
        self._tell_done(len(landed), started_at, cost, fill, False, now())

    def _tell_done(
        self,
        records: int,
        started_at: float,
        cost: float,
        fill: float,
        out_of_memory: bool,
        now: float,
        at: float | None = None,
    ) -> None:
        tallies, self._tallies = self._tallies, {}
        shares = tuple(tally.share(scope, now) for scope, tally in tallies.items())
        failed = sum(share.failed for share in shares) if shares else records
        self._done += 1
        told = started_at, records, failed, cost, fill, out_of_memory, shares
        hooks.emit(events.BatchDone(at or time.time(), self._batcher, self._done, *told))
