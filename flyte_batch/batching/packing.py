"""What goes into the next batch. Pure and synchronous: no event loop, no clock, no futures.

Each caller has a `Lane`, a first-in-first-out line of records. The `Backlog` holds all lanes and takes batches from
them by three rules:

1. Lanes take turns, so a caller with three records is not stuck behind one with a million. A turn is one record; with
   longer turns, callers that came at the same time finish one after the other instead of all at the end.
2. A batch of two or more records never exceeds the budget. A lane whose next record does not fit is passed over in
   this batch and comes first in the next, where an empty batch takes anything: nothing starves, an oversized record
   goes alone.
3. With a `length_window`, a batch is made of records of similar cost. It always holds the record whose turn it is, and
   those nearest to it in cost, so each batch brings every waiting record nearer to its own turn.

Records lie in parallel lists, not in an object each: a million records through `map` must not cost a million objects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")

BatchCost = Literal["sum", "padded"]
"""How a batch's cost follows from its records': their sum, or rows x longest for models that pad."""

_NOTHING: list[Any] = []
"""The columns of an empty lane, shared by all of them and never written to."""


class Lane(Generic[RecordT, ResultT]):
    """One caller's waiting records, in order. A ticket says where a record's outcome goes; only its owner reads it.

    Subclasses, which know futures, say what becomes of a ticket.
    """

    __slots__ = ("__weakref__", "arrivals", "costs", "dropped", "records", "tickets")

    def __init__(self) -> None:
        # Lanes of a single record are many, so the columns come with the first records and leave with the last.
        self.records: list[RecordT] = _NOTHING
        self.costs: list[float] = _NOTHING
        self.tickets: list[Any] = _NOTHING
        self.arrivals: list[float] = _NOTHING
        self.dropped: set[Any] | None = None

    def __len__(self) -> int:
        return len(self.records) - len(self.dropped or ())

    def extend(self, records: list[RecordT], costs: list[float], tickets: list[Any], now: float) -> None:
        """Line up records that arrived together. The lists are the lane's from now on."""
        if self.records:
            self.records += records
            self.costs += costs
            self.tickets += tickets
            self.arrivals += [now] * len(records)
        else:
            self.records, self.costs, self.tickets = records, costs, tickets
            self.arrivals = [now] * len(records)

    def queued(self, tickets: Sequence[Any]) -> None:
        """These are in the backlog now."""

    def taken(self, tickets: Sequence[Any]) -> None:
        """These have left the backlog, for the device."""

    def emptied(self) -> None:
        """Nothing of this caller waits any more."""

    def wants(self, ticket: Any) -> bool:
        """Whether somebody still waits for the outcome."""
        return True

    def deliver(self, tickets: Sequence[Any], outcomes: Sequence[ResultT | BaseException], failures: int) -> None:
        """Hand over the outcomes; ``failures`` of them are exceptions."""
        raise NotImplementedError

    def drop(self, ticket: Any) -> None:
        """Nobody waits for this record any more."""
        if self.dropped is None:
            self.dropped = set()
        self.dropped.add(ticket)

    def purge(self) -> None:
        """Forget dropped records. Done once for many, because finding one among thousands would take a scan each."""
        if self.dropped:
            self.cut([i for i, ticket in enumerate(self.tickets) if ticket in self.dropped])
            self.dropped = None

    def cut(self, positions: Sequence[int]) -> tuple[list[RecordT], list[float], list[Any], list[float]]:
        """Take out the records at these positions (ascending, at least one), with costs, tickets and arrivals."""
        count = len(positions)
        if count == len(self.records):
            everything = self.records, self.costs, self.tickets, self.arrivals
            self.records = self.costs = self.tickets = self.arrivals = _NOTHING
            return everything
        if positions[-1] == count - 1:
            cut = self.records[:count], self.costs[:count], self.tickets[:count], self.arrivals[:count]
            del self.records[:count], self.costs[:count], self.tickets[:count], self.arrivals[:count]
            return cut
        cut = (
            [self.records[i] for i in positions],
            [self.costs[i] for i in positions],
            [self.tickets[i] for i in positions],
            [self.arrivals[i] for i in positions],
        )
        for i in reversed(positions):
            del self.records[i], self.costs[i], self.tickets[i], self.arrivals[i]
        return cut


@dataclass(slots=True)
class Batch(Generic[RecordT, ResultT]):
    """The records of one call into the engine, and whose they are.

    Attributes:
        records: in the order that the engine sees.
        costs: one a record.
        arrivals: when each entered the queue, on the pusher's clock.
        parts: the lanes that they come from, each with its tickets; together in the order of ``records``.
        padded: whether the batch costs rows x longest.
    """

    records: list[RecordT]
    costs: list[float]
    arrivals: list[float]
    parts: list[tuple[Lane[RecordT, ResultT], list[Any]]]
    padded: bool

    def __len__(self) -> int:
        return len(self.records)

    @property
    def record_cost(self) -> float:
        return sum(self.costs)

    @property
    def padded_cost(self) -> float:
        return len(self.costs) * max(self.costs, default=0)

    @property
    def cost(self) -> float:
        """What the budget is compared with."""
        return self.padded_cost if self.padded else self.record_cost

    def select(self, positions: Iterable[int]) -> Batch[RecordT, ResultT]:
        """The batch of only the records at these positions (ascending)."""
        chosen = list(positions)
        owners = [(lane, ticket) for lane, tickets in self.parts for ticket in tickets]
        parts: list[tuple[Lane[RecordT, ResultT], list[Any]]] = []
        for lane, ticket in (owners[i] for i in chosen):
            if not parts or parts[-1][0] is not lane:
                parts.append((lane, []))
            parts[-1][1].append(ticket)
        return Batch(
            [self.records[i] for i in chosen],
            [self.costs[i] for i in chosen],
            [self.arrivals[i] for i in chosen],
            parts,
            self.padded,
        )

    def halves(self) -> tuple[Batch[RecordT, ResultT], Batch[RecordT, ResultT]]:
        middle = len(self) // 2
        return self.select(range(middle)), self.select(range(middle, len(self)))

    def wanted(self) -> Batch[RecordT, ResultT]:
        """The batch without the records that nobody waits for any more."""
        keep = [lane.wants(ticket) for lane, tickets in self.parts for ticket in tickets]
        return self if all(keep) else self.select(i for i, wanted in enumerate(keep) if wanted)

    def deliver(self, outcomes: Sequence[ResultT | BaseException], failures: int) -> None:
        """Hand each lane its outcomes, one a record, in the order of ``records``."""
        start = 0
        for lane, tickets in self.parts:
            lane.deliver(tickets, outcomes[start : start + len(tickets)], failures)
            start += len(tickets)


class Backlog(Generic[RecordT, ResultT]):
    """All records that wait, and the rule by which they leave.

    Args:
        max_batch_size: most records in a batch.
        batch_cost: ``"sum"``, or ``"padded"`` for rows x longest.
        length_window: how many waiting records to choose similar ones from; 0 keeps each lane in order.
        turn_size: most records that a lane gives in its turn; counts only where there is no length_window.
        look_past: lanes that a batch passes over, for records of others small enough to fill its last gap; bounds the
            work that a batch takes. 1 where the room that a record waits for would be given to others for ever.
        price: ``(record, cost) -> cost`` that a budget is compared with at the moment of taking, for costs that become
            known better while records wait; only where there is no length_window and no padding.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        batch_cost: BatchCost = "sum",
        length_window: int = 0,
        turn_size: int = 1,
        look_past: int = 32,
        price: Callable[[RecordT, float], float] | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._padded = batch_cost == "padded"
        self._length_window = length_window
        self._turn_size = turn_size
        self._look_past = look_past
        self._price = price
        self._begun = 0  # records that the lane at the front gave already, in a turn that the last batch cut short
        # Exactly the lanes with records that somebody wants, the next to be served first.
        self._rotation: OrderedDict[Lane[RecordT, ResultT], None] = OrderedDict()
        self._count = 0
        self._cost: float = 0
        self._longest: float = 0

    def __len__(self) -> int:
        return self._count

    def push(
        self,
        lane: Lane[RecordT, ResultT],
        records: list[RecordT],
        costs: list[float],
        tickets: list[Any],
        now: float,
    ) -> None:
        """Line up a caller's records, at least one, all of the same arrival time (any monotonic clock, seconds).

        The lists are the backlog's from now on.
        """
        self._count += len(records)
        self._cost += sum(costs)
        if self._padded:
            self._longest = max(self._longest, *costs)
        lane.queued(tickets)
        lane.extend(records, costs, tickets, now)
        self._rotation.setdefault(lane)

    def drop(self, lane: Lane[RecordT, ResultT], ticket: Any, cost: float) -> None:
        """Nobody waits for this record any more; it must be in the backlog."""
        lane.drop(ticket)
        self._left(1, cost)
        if not len(lane):
            lane.purge()
            self._remove(lane)

    def discard(self, lane: Lane[RecordT, ResultT]) -> int:
        """Nobody waits for any record of this lane any more. Returns how many there were."""
        lane.purge()
        count = len(lane)
        if count:
            self._left(count, sum(lane.costs))
            lane.cut(range(count))
            self._remove(lane)
        return count

    def fills_a_batch(self, budget: float) -> bool:
        """Whether what waits makes up a whole batch, so that waiting for more records would gain nothing."""
        cost = self._count * self._longest if self._padded else self._cost
        return self._count >= self._max_batch_size or (self._count > 0 and cost >= budget)

    def oldest_arrival(self) -> float | None:
        """When the record that waits longest arrived; None when nothing waits."""
        for lane in self._rotation:
            lane.purge()
        return min((lane.arrivals[0] for lane in self._rotation), default=None)

    def take(self, budget: float, *, first_over: bool = True) -> Batch[RecordT, ResultT]:
        """Remove the next batch.

        Args:
            budget: what it may cost.
            first_over: the first record may exceed the budget, alone; so that the batch is empty only when nothing
                waits.
        """
        batch = self._cut(self._similar(budget) if self._length_window else self._in_turn(budget, first_over))
        if self._padded:
            self._longest = max((max(lane.costs) for lane in self._rotation), default=0)
        return batch

    def take_all(self) -> Batch[RecordT, ResultT]:
        """Remove everything, without regard to limits: for a batcher that cannot go on."""
        for lane in self._rotation:
            lane.purge()
        return self._cut({lane: range(len(lane)) for lane in self._rotation})

    def _cut(self, picks: Mapping[Lane[RecordT, ResultT], Sequence[int]]) -> Batch[RecordT, ResultT]:
        batch = Batch[RecordT, ResultT]([], [], [], [], self._padded)
        for lane, positions in picks.items():
            records, costs, tickets, arrivals = lane.cut(positions)
            batch.records += records
            batch.costs += costs
            batch.arrivals += arrivals
            batch.parts.append((lane, tickets))
            lane.taken(tickets)
            if not lane.records:
                self._remove(lane)
        self._left(len(batch), batch.record_cost)
        return batch

    def _remove(self, lane: Lane[RecordT, ResultT]) -> None:
        self._rotation.pop(lane, None)
        lane.emptied()

    def _left(self, count: int, cost: float) -> None:
        self._count -= count
        # Sums of floats drift; an empty backlog costs nothing.
        self._cost = self._cost - cost if self._count else 0

    def _in_turn(self, budget: float, first_over: bool) -> dict[Lane[RecordT, ResultT], range]:
        """Round robin over the lanes, ``turn_size`` records a turn, as long as they fit."""
        # A lane is popped for its turn and goes back to the end if it has more.
        rotation = self._rotation
        padded, room = self._padded, self._max_batch_size
        counts: dict[Lane[RecordT, ResultT], int] = {}
        passed_over: list[Lane[RecordT, ResultT]] = []
        begun_by_first = 0
        size = 0
        total: float = 0
        longest: float = 0
        while rotation and size < room and len(passed_over) < self._look_past:
            lane, _ = rotation.popitem(last=False)
            position = counts.get(lane, 0)
            if not position:
                lane.purge()
            begun, self._begun = self._begun, 0
            # A lane that is alone need not take turns.
            turn = min(self._turn_size - begun, room - size) if rotation else room - size
            start = position
            fits = True
            costs: Iterator[float] = islice(lane.costs, position, position + turn)
            if self._price is not None:
                costs = map(self._price, islice(lane.records, position, position + turn), costs)
            for cost in costs:
                highest = cost if cost > longest else longest
                after = (size + 1) * highest if padded else total + cost
                if after > budget and (size or not first_over):
                    fits = False
                    break
                size += 1
                total += cost
                longest = highest
                position += 1
            counts[lane] = position
            if not fits:
                if not passed_over:
                    # A lane that was alone may have given more than a turn.
                    begun_by_first = min(begun + position - start, self._turn_size - 1)
                passed_over.append(lane)
            elif position < len(lane.costs):
                rotation[lane] = None
                if size == room and begun + position - start < self._turn_size:
                    rotation.move_to_end(lane, last=False)
                    self._begun = begun + position - start
        if passed_over:
            self._begun = begun_by_first
        for lane in reversed(passed_over):
            rotation[lane] = None
            rotation.move_to_end(lane, last=False)
        return {lane: range(count) for lane, count in counts.items() if count}

    def _similar(self, budget: float) -> dict[Lane[RecordT, ResultT], list[int]]:
        """The record whose turn it is, and of the window those nearest to it in cost."""
        window = list(islice(self._round_robin(), self._length_window))
        if not window:
            return {}
        self._rotation.move_to_end(window[0][0])
        costs = [lane.costs[position] for lane, position in window]
        by_cost = sorted(range(len(window)), key=costs.__getitem__)
        first = by_cost.index(0)
        low, high = first - 1, first + 1
        chosen = [0]
        total = longest = costs[0]
        while len(chosen) < self._max_batch_size and (low >= 0 or high < len(by_cost)):
            below = costs[0] - costs[by_cost[low]] if low >= 0 else float("inf")
            above = costs[by_cost[high]] - costs[0] if high < len(by_cost) else float("inf")
            dearer = above <= below
            candidate = by_cost[high if dearer else low]
            highest = max(longest, costs[candidate])
            if ((len(chosen) + 1) * highest if self._padded else total + costs[candidate]) > budget:
                if not dearer:
                    break
                # Nothing further out on the dear side fits either; the cheap side may.
                high = len(by_cost)
                continue
            chosen.append(candidate)
            total += costs[candidate]
            longest = highest
            low, high = (low, high + 1) if dearer else (low - 1, high)
        picks: dict[Lane[RecordT, ResultT], list[int]] = {}
        for i in sorted(chosen):
            lane, position = window[i]
            picks.setdefault(lane, []).append(position)
        return picks

    def _round_robin(self) -> Iterator[tuple[Lane[RecordT, ResultT], int]]:
        """All waiting records in the order of turns, the lanes' heads first."""
        lanes: list[Lane[RecordT, ResultT]] = []
        for lane in self._rotation:
            lane.purge()
            lanes.append(lane)
            yield lane, 0
        position = 1
        while lanes := [lane for lane in lanes if position < len(lane.records)]:
            for lane in lanes:
                yield lane, position
            position += 1
