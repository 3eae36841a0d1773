"""Listens for the chunks that a process works on, and keeps what their reports will say.

One hook for all chunks: a batch of ten callers is looked at once. Samples of a batcher are taken when a batch is done,
at most four a second: no timer, and what a batcher counts is cumulative, so that nothing is missed between them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flyte_batch.histograms import LATENCY_BOUNDS, bound
from flyte_batch.monitoring import clock, hooks
from flyte_batch.monitoring.details import Sample, Stall
from flyte_batch.monitoring.events import BatchDone, EngineDied, Event, LoopBlocked, Scope

EVERY_S = 0.25
MOST_KEPT = 4096
"""Samples of one batcher; with more, every second one goes, and they are taken half as often."""
MOST_REPORTED = 40
"""Samples in one chunk's report: some 4 kB."""
MOST_STALLS = 200
"""In one chunk's report; of more the longest."""


class ChunkRecording:
    """What is recorded for one chunk.

    Attributes:
        latencies: histogram of its records: seconds from queue to result.
        stalls: of the event loop.
        died: ids of batchers that died meanwhile.
    """

    def __init__(self) -> None:
        self.latencies: Counter[float] = Counter()
        self.stalls: list[Stall] = []
        self.died: list[str] = []

    def add_stall(self, stall: Stall) -> None:
        """Keep a stall; beyond `MOST_STALLS` the shortest goes."""
        self.stalls.append(stall)
        if len(self.stalls) > MOST_STALLS:
            self.stalls.remove(min(self.stalls, key=lambda each: each.seconds))


class _Series:
    """Samples of one batcher."""

    def __init__(self, batcher: hooks.Batcher) -> None:
        self.batcher = batcher
        self.samples: list[Sample] = []
        self.users = 0
        self._every_s = EVERY_S

    def take(self, now: float) -> None:
        stats = self.batcher.stats
        self.samples.append(
            Sample(
                at=now,
                busy_s=stats.busy_time_s,
                starved_s=stats.starved_time_s,
                assembling_s=stats.assembling_time_s,
                late_s=stats.late_time_s,
                completed=stats.total_completed,
                batches=stats.total_batches,
                fill=stats.total_fill,
                queued=stats.queued,
                running=stats.running,
            )
        )
        if len(self.samples) > MOST_KEPT:
            del self.samples[1:-1:2]
            self._every_s *= 2

    def take_if_due(self, now: float) -> None:
        if now - self.samples[-1].at >= self._every_s:
            self.take(now)


class Recorder:
    """The hook, and where workers say what they work on."""

    def __init__(self) -> None:
        self._recordings: dict[Scope, ChunkRecording] = {}
        self._series: dict[str, _Series] = {}
        self._unsubscribe: Callable[[], None] | None = None
        self._lock = threading.Lock()  # for coming and going: event loops may turn on several threads

    @contextmanager
    def recording(self, scope: Scope) -> Iterator[ChunkRecording]:
        """Record what happens to the records of a chunk while the body of ``with`` runs."""
        with self._lock:
            if self._unsubscribe is None:
                self._unsubscribe = hooks.subscribe(self)
            recording = self._recordings[scope] = ChunkRecording()
        try:
            yield recording
        finally:
            with self._lock:
                del self._recordings[scope]
                if not self._recordings and self._unsubscribe is not None:
                    self._unsubscribe()
                    self._unsubscribe = None

    @contextmanager
    def sampling(self, batcher: hooks.Batcher) -> Iterator[Callable[[], tuple[Sample, ...]]]:
        """Sample a batcher while the body of ``with`` runs.

        Gives a function that has the batcher tell what came back so far, and gives the samples since the beginning.
        """
        series = self._series.setdefault(batcher.id, _Series(batcher))
        series.users += 1
        start = clock.now()
        series.take(start)

        def samples() -> tuple[Sample, ...]:
            batcher.tell()
            series.take(clock.now())
            found = [sample for sample in series.samples if sample.at >= start]
            return tuple(_thinned(found))

        try:
            yield samples
        finally:
            batcher.tell()  # before its chunk is told to have failed
            series.users -= 1
            if not series.users:
                del self._series[batcher.id]

    def on_event(self, event: Event) -> None:
        if isinstance(event, BatchDone):
            series = self._series.get(event.batcher)
            if series is not None:
                series.take_if_due(clock.now())
            for share in event.shares:
                recording = self._recordings.get(share.scope)
                if recording is not None and share.lost < share.records:  # else they are done again
                    for seconds, records in share.latencies:
                        recording.latencies[bound(seconds, LATENCY_BOUNDS)] += records
        elif isinstance(event, LoopBlocked):
            stall = Stall(clock.now(), event.seconds, event.code)  # one, so that a log counts it once
            for recording in list(self._recordings.values()):
                recording.add_stall(stall)
        elif isinstance(event, EngineDied):
            for recording in list(self._recordings.values()):
                recording.died.append(event.batcher)


def _thinned(samples: list[Sample]) -> list[Sample]:
    """At most `MOST_REPORTED` of them, evenly spaced, the first and the last included."""
    if len(samples) <= MOST_REPORTED:
        return samples
    step = (len(samples) - 1) / (MOST_REPORTED - 1)
    return [samples[round(index * step)] for index in range(MOST_REPORTED)]


recorder = Recorder()
"""The process's."""
