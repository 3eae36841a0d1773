"""What a batcher did with its device's time, and how well it filled the batches.

`BatchStats` is a frozen snapshot that can be added up over replicas; `Meter` is what a batcher writes into. The meter
knows no event loop, so that its arithmetic can be tested with a clock of the test's own.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from flyte_batch.device_calls import DeviceCall

Phase = Literal["off", "starved", "assembling", "late", "busy"]
"""What the device does: not started, free with nothing waiting, free while a batch fills, free but the event loop
has not come to it, at work."""


@dataclass(frozen=True, slots=True)
class BatchStats:
    """A batcher's figures at one moment, the running batch included. Names shared with flyte.extras mean the same.

    ``a + b`` adds up two batchers (replicas, models): times and counts are summed, averages follow from the sums.

    Attributes:
        total_submitted: records accepted.
        total_completed: records resolved with a result or an error; abandoned ones are not among them.
        total_failed: those of ``total_completed`` that got an error.
        total_lost: those of ``total_failed`` that the engine's death took, on the device or in the queue.
        total_abandoned: accepted records that were taken out of the queue, or off a device that can give them back,
            because their caller gave up or their ``timeout_s`` was over.
        total_expired: records whose ``timeout_s`` was over before they had a result.
        total_batches: finished calls of ``process_fn``, retries of split batches included. A `ContinuousBatcher` calls
            its engine for each record.
        total_batch_records: records in those calls; a record that was retried counts each time.
        total_batch_cost: their cost, as the budget sees it (``rows x longest`` for padded batches).
        total_record_cost: the sum of the records' own costs.
        total_padded_cost: the sum of ``rows x longest``, what a padded model computes.
        total_fill: the sum over batches of the share of the budget or of ``max_batch_size``, whichever is larger; in a
            `ContinuousBatcher`, of what was in flight when the record was done.
        out_of_memory: batches that did not fit the device.
        queued: records waiting at this moment.
        running: records on the device at this moment.
        busy_time_s: seconds with a call under way, the running one included, apart from ``late_time_s``: some of those
            of calls that are not back yet may turn out to have been late.
        record_time_s: the sum over records of their seconds on the device, running ones included.
        starved_time_s: seconds with a free device and nothing waiting: bring more records.
        assembling_time_s: seconds with a free device and records waiting for more: lower ``batch_timeout_s``.
        late_time_s: seconds with a free device because the event loop had not come to it: to hear of the end of a call,
            or to hand one over. Code holds the loop, or there is too much work on it. Known of a plain ``process_fn``,
            which runs on a thread, and of calls that say when their device was at work (`device_at_work`).
        loop_blocked_s: seconds in which an ``async def process_fn`` held the event loop beyond the warning's threshold.
    """

    total_submitted: int = 0
    total_completed: int = 0
    total_failed: int = 0
    total_lost: int = 0
    total_abandoned: int = 0
    total_expired: int = 0
    total_batches: int = 0
    total_batch_records: int = 0
    total_batch_cost: float = 0
    total_record_cost: float = 0
    total_padded_cost: float = 0
    total_fill: float = 0.0
    out_of_memory: int = 0
    queued: int = 0
    running: int = 0
    busy_time_s: float = 0.0
    record_time_s: float = 0.0
    starved_time_s: float = 0.0
    assembling_time_s: float = 0.0
    late_time_s: float = 0.0
    loop_blocked_s: float = 0.0

    @property
    def idle_time_s(self) -> float:
        """Seconds in which the device was free: starved, assembling and late."""
        return self.starved_time_s + self.assembling_time_s + self.late_time_s

    @property
    def utilization(self) -> float:
        """Share of the time that the device was at work, in [0, 1]; 0 before the start."""
        return _ratio(self.busy_time_s, self.busy_time_s + self.idle_time_s)

    @property
    def avg_in_flight(self) -> float:
        """Records on the device, on average over the time that it was at work."""
        return _ratio(self.record_time_s, self.busy_time_s)

    @property
    def avg_batch_size(self) -> float:
        """Records a batch."""
        return _ratio(self.total_batch_records, self.total_batches)

    @property
    def avg_batch_cost(self) -> float:
        """Cost a batch, as the budget sees it."""
        return _ratio(self.total_batch_cost, self.total_batches)

    @property
    def fill(self) -> float:
        """How full the average batch was, by cost or by size; above 1 only where a record alone exceeds the budget."""
        return _ratio(self.total_fill, self.total_batches)

    @property
    def padding_efficiency(self) -> float:
        """Share of a padded model's work that is no padding, in [0, 1]; 1 where records have no cost."""
        return _ratio(self.total_record_cost, self.total_padded_cost, empty=1.0)

    def __add__(self, other: BatchStats) -> BatchStats:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return BatchStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __radd__(self, other: object) -> BatchStats:
        # sum() starts at 0.
        return self if other == 0 else NotImplemented


def _ratio(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole > 0 else empty


_MOST_CALLS = 10_000
"""Calls that wait for an earlier one, beyond which that one is taken to have kept the device at work so far."""


class Meter:
    """Collects what a batcher reports; every second belongs to exactly one phase.

    Args:
        clock: seconds, monotonic; the one by which calls say when their device was at work.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.submitted = self.completed = self.failed = self.lost = self.abandoned = self.expired = 0
        self.batches = self.batch_records = self.out_of_memory = 0
        self.batch_cost: float = 0
        self.record_cost: float = 0
        self.padded_cost: float = 0
        self.fill = self.loop_blocked_s = 0.0
        self._clock = clock
        # Each swapped as a whole: another thread may take a snapshot meanwhile.
        self._phases: tuple[Phase, float, dict[Phase, float]] = "off", clock(), dict.fromkeys(get_args(Phase), 0.0)
        self._on_device: tuple[int, float, float] = 0, clock(), 0.0
        self._told = self._untold = False
        self._calls: deque[DeviceCall] = deque()  # as they were made, from the first that is not back
        # Of calls that are back; a heap, because those that are not may have begun before.
        self._spells: list[tuple[float, float]] = []
        self._worked_until = 0.0  # by all others

    @property
    def is_told(self) -> bool:
        """Whether calls say when their device was at work, all that brought results."""
        return self._told and not self._untold

    @property
    def phase(self) -> Phase:
        return self._phases[0]

    def enter(self, phase: Phase) -> None:
        """From now on the time is ``phase``'s; off, nothing is on the device."""
        self._enter(phase, self._clock())

    def _enter(self, phase: Phase, now: float) -> None:
        before, since, seconds = self._phases
        self._phases = phase, now, {**seconds, before: seconds[before] + now - since}
        if phase == "off":
            if self._calls:
                self._work_out(self._calls[0].made)
            self._calls.clear()
            self._spells.clear()
            self._count_on_device(0, now)

    def launched(self, on_device: int) -> DeviceCall:
        """A call is made, and so many records are on the device from now on: it is busy."""
        now = self._clock()
        if not self._calls:
            self._worked_until = now
        if self.phase != "busy":
            self._enter("busy", now)
        call = DeviceCall(now)
        self._calls.append(call)
        if len(self._calls) > _MOST_CALLS:
            self._calls.popleft()
            self._worked_until = now
        self._count_on_device(on_device, now)
        return call

    def landed(self, call: DeviceCall, on_device: int, *, has_results: bool = True) -> None:
        """A call is back, and so many records are on the device from now on. After the last one the time is late.

        Seconds in which, as it turns out, the device was at work on no call were late, not busy.
        """
        now = self._clock()
        call.spell = call.made, now
        if call.began is not None and call.ended is not None and call.made <= call.began <= call.ended <= now:
            self._told = True  # else by another clock
            call.spell = call.began, call.ended
        elif has_results:
            self._untold = True
        heapq.heappush(self._spells, call.spell)
        while self._calls and self._calls[0].spell is not None:
            self._calls.popleft()
        self._work_out(self._calls[0].made if self._calls else now)
        if not on_device:
            self._enter("late", now)
        self._count_on_device(on_device, now)

    def _work_out(self, known: float) -> None:
        """Find out when the device was free until ``known``: all calls that were made before are back."""
        free = 0.0
        while self._spells and self._spells[0][0] <= known:
            began, ended = heapq.heappop(self._spells)
            free += max(0.0, began - self._worked_until)
            self._worked_until = max(self._worked_until, ended)
        free += max(0.0, known - self._worked_until)
        self._worked_until = max(self._worked_until, known)
        if free:
            phase, since, seconds = self._phases
            self._phases = phase, since, {**seconds, "late": seconds["late"] + free, "busy": seconds["busy"] - free}

    def _count_on_device(self, records: int, now: float) -> None:
        running, since, record_seconds = self._on_device
        self._on_device = records, now, record_seconds + running * (now - since)

    def batch_finished(self, records: int, cost: float, record_cost: float, padded_cost: float, fill: float) -> None:
        """One call of ``process_fn`` ended, well or badly."""
        self.batches += 1
        self.batch_records += records
        self.batch_cost += cost
        self.record_cost += record_cost
        self.padded_cost += padded_cost
        self.fill += fill

    def snapshot(self, queued: int) -> BatchStats:
        """The figures now, the phase that is under way included. May be taken on any thread."""
        phase, since, seconds = self._phases
        running, running_since, record_seconds = self._on_device
        now = self._clock()  # last: what was written meanwhile is not later
        stats = BatchStats(
            total_submitted=self.submitted,
            total_completed=self.completed,
            total_failed=self.failed,
            total_lost=self.lost,
            total_abandoned=self.abandoned,
            total_expired=self.expired,
            total_batches=self.batches,
            total_batch_records=self.batch_records,
            total_batch_cost=self.batch_cost,
            total_record_cost=self.record_cost,
            total_padded_cost=self.padded_cost,
            total_fill=self.fill,
            out_of_memory=self.out_of_memory,
            queued=queued,
            running=running,
            busy_time_s=seconds["busy"],
            record_time_s=record_seconds + running * max(0.0, now - running_since),
            starved_time_s=seconds["starved"],
            assembling_time_s=seconds["assembling"],
            late_time_s=seconds["late"],
            loop_blocked_s=self.loop_blocked_s,
        )
        if phase == "off":
            return stats
        name = f"{phase}_time_s"
        return replace(stats, **{name: getattr(stats, name) + max(0.0, now - since)})
