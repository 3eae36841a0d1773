"""What a batcher tells of its records, gathered per caller: a record costs a few additions.

What came back is kept, and told of a moment later, when what comes next is on its way to the device: no device waits
for those who hear of the last batch. Nothing is gathered while nobody listens.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Sequence
from typing import Any

from flyte_batch.batching.lanes import CallersLane
from flyte_batch.batching.packing import Batch
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.events import Scope, Share
from flyte_batch.monitoring.scope import row_of

TELL_AFTER_S = 0.002
"""Long enough for the next batch, and those who wait for the last one, to be on their way."""
TOGETHER_S = 0.02
"""How far apart records may have come back, one by one, that are told of together: each time costs hooks something."""
AT_ONCE_S = 0.001
"""Those so close to each other came back at the same time; so wrong can a latency be."""


class _Tally:
    """One caller's records that got their outcome."""

    __slots__ = ("cost", "failed", "latencies", "lost", "records")

    def __init__(self) -> None:
        self.records = self.failed = self.lost = 0
        self.cost = 0.0
        self.latencies: dict[float, int] = {}

    def share(self, scope: Scope) -> Share:
        return Share(scope, self.records, self.failed, self.cost, tuple(self.latencies.items()), self.lost)


class _CameBack:
    """What came back from the device together, to be told of.

    Attributes:
        since: when the first of it came, on the event loop's clock.
        now: when the last of it came.
        at: the same as Unix time.
        started_at: Unix time when the device got it, the first of it where records go one by one.
        fill: share of the budget or of the most records.
        records: how many.
        cost: as the batcher's budget sees it.
        out_of_memory: whether it did not fit.
        failed: whose records got which errors, and of which rows they are; without those that the engine's death took.
        uncounted: a batch that is still to be counted, with its outcomes, and whether these are lost.
    """

    __slots__ = (
        "_tallies", "at", "cost", "failed", "fill", "now", "out_of_memory", "records", "since", "started_at",
        "uncounted",
    )  # fmt: skip

    def __init__(self, now: float, started_at: float, fill: float, out_of_memory: bool = False) -> None:
        self.since = self.now = now
        self.at = time.time()
        self.started_at = started_at
        self.fill = fill
        self.records = 0
        self.cost = 0.0
        self.out_of_memory = out_of_memory
        self.failed: list[tuple[Scope, BaseException, int | None]] = []
        self.uncounted: tuple[Batch[Any, Any], Sequence[object] | None, bool] | None = None
        self._tallies: dict[Scope, _Tally] = {}

    def count(self, batch: Batch[Any, Any], outcomes: Sequence[object] | None, lost: bool) -> None:
        """Count records that came back just now, by whose they are; without outcomes, none of them failed."""
        start = 0
        costs, arrivals, now = batch.costs, batch.arrivals, self.now
        for lane, tickets in batch.parts:
            assert isinstance(lane, CallersLane)  # noqa: S101  a batcher makes no others
            scope = lane.scope
            tally = self._tallies.get(scope)
            if tally is None:
                tally = self._tallies[scope] = _Tally()
            end = start + len(tickets)
            tally.records += end - start
            counts = tally.latencies
            for index in range(start, end):
                tally.cost += costs[index]
                latency = max(0.0, now - arrivals[index])  # one that came and went within a millisecond
                counts[latency] = counts.get(latency, 0) + 1
            if outcomes is not None:
                pairs = zip(tickets, outcomes[start:end], strict=True)
                errors = [(ticket, outcome) for ticket, outcome in pairs if isinstance(outcome, BaseException)]
                tally.failed += len(errors)
                if lost:
                    tally.lost += len(errors)
                else:
                    self.failed += [(scope, error, row_of(lane.context, ticket)) for ticket, error in errors]
            start = end

    def shares(self) -> tuple[Share, ...]:
        """Whose records they were."""
        if self.uncounted is not None:
            self.count(*self.uncounted)
            self.uncounted = None
        return tuple([tally.share(scope) for scope, tally in self._tallies.items()])


class Teller:
    """Tells hooks of one batcher's records.

    Args:
        batcher: its id.

    Attributes:
        loop: the batcher's event loop, set by its start. A caller may give up on a record while it does not run.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, batcher: str) -> None:
        self._batcher = batcher
        self._context = contextvars.Context()  # events are of many callers, so they are told in none of theirs
        self._queued = 0
        self._submitted: dict[Scope, list[float]] = {}  # scope -> records, cost
        self._submitted_at = 0.0
        self._formed = self._done = 0
        self._admitted = 0
        self._admitted_cost = self._admitted_at = self._admitted_fill = 0.0
        self._untold: list[_CameBack] = []
        self._together: _CameBack | None = None  # the last of them, if others may join it
        self._timer: asyncio.TimerHandle | None = None

    def submitted(self, lane: CallersLane[Any, Any], records: int, cost: float, queued: int) -> None:
        """Records entered the queue."""
        if not self._submitted:
            self._submitted_at = time.time()
            self.loop.call_soon(self._tell_submitted, context=self._context)
        of_caller = self._submitted.setdefault(lane.scope, [0, 0.0])
        of_caller[0] += records
        of_caller[1] += cost
        self._queued = queued

    def formed(self, records: int, cost: float, fill: float, queued: int, at: float | None = None) -> None:
        """Records leave the queue for the device."""
        self._tell_submitted()
        self._formed += 1
        hooks.emit(events.BatchFormed(at or time.time(), self._batcher, self._formed, records, cost, fill, queued))

    def admitted(self, cost: float, fill: float, queued: int, at: float) -> None:
        """A record goes to the device by itself; told with those that follow, as full as the last of them made it."""
        if not self._admitted:
            self._admitted_at = at
            self._set_timer(TOGETHER_S)
        self._admitted += 1
        self._admitted_cost += cost
        self._admitted_fill = fill
        self._queued = queued

    def came_back(
        self,
        batch: Batch[Any, Any],
        outcomes: Sequence[object] | None,
        failures: int,
        *,
        now: float,
        started_at: float,
        fill: float,
        out_of_memory: bool,
        lost: bool,
    ) -> None:
        """A batch came back. Told by the next `tell`, or a moment after `tell_soon`.

        Args:
            batch: as the device had it.
            outcomes: one a record; None if it is split and tried again.
            failures: those of them that are errors.
            now: on the event loop's clock.
            started_at: Unix time when the device got it.
            fill: share of the budget or of the most records.
            out_of_memory: whether it did not fit.
            lost: whether the engine died on it.
        """
        back = _CameBack(now, started_at, fill, out_of_memory)
        back.records, back.cost = len(batch), batch.cost
        if outcomes is not None:
            back.uncounted = batch, outcomes if failures else None, lost  # later: the device comes first
        self._untold.append(back)

    def landed(
        self,
        batch: Batch[Any, Any],
        error: BaseException | None,
        *,
        now: float,
        started_at: float,
        cost: float,
        fill: float,
        lost: bool,
    ) -> None:
        """A record came back by itself; told with those that come at the same time. See `came_back`."""
        back = self._together
        if back is None or now - back.since > TOGETHER_S:
            back = self._together = _CameBack(now, started_at, fill)
            self._untold.append(back)
            self._set_timer(TOGETHER_S)
        else:
            if now - back.now > AT_ONCE_S:
                back.at += now - back.now
                back.now = now
            back.started_at = min(started_at, back.started_at)
        back.records += 1
        back.cost += cost
        back.count(batch, None if error is None else (error,), lost)

    def tell_soon(self) -> None:
        """Tell of all that came back, a moment from now."""
        if self._untold:
            self._set_timer(TELL_AFTER_S)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._tell, context=self._context)

    def tell(self) -> None:
        """Tell of all that came back so far, whoever calls this."""
        contextvars.Context().run(self._tell)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell_submitted()
        if self._admitted:
            admitted = self._admitted, self._admitted_cost, self._admitted_fill, self._queued, self._admitted_at
            self._admitted, self._admitted_cost = 0, 0.0
            self.formed(*admitted)
        untold, self._untold, self._together = self._untold, [], None
        for back in untold:
            self._tell_of(back)

    def _tell_submitted(self) -> None:
        submitted, self._submitted = self._submitted, {}
        for scope, (records, cost) in submitted.items():
            counts = int(records), cost, self._queued
            hooks.emit(events.RecordsSubmitted(self._submitted_at, self._batcher, scope, *counts))

    def _tell_of(self, back: _CameBack) -> None:
        shares = back.shares()
        for scope, error, row in back.failed:
            what = type(error).__name__, str(error)
            hooks.emit(events.RecordFailed(back.at, scope, "infer", *what, self._batcher, row))
        failed = sum([share.failed for share in shares]) if shares else back.records
        self._done += 1
        told = back.started_at, back.records, failed, back.cost, back.fill, back.out_of_memory, shares
        hooks.emit(events.BatchDone(back.at, self._batcher, self._done, *told))
