"""The figures of a run that its views show: frozen, so that a view's thread may read them while the driver goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from flyte_batch.monitoring.hooks import live_batchers
from flyte_batch.report.run_log import EngineLog, RunLog, TimeShares

WINDOW_S = 30.0
"""What "lately" means, where chunks end more often than that."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A process that answered chunks.

    Attributes:
        name: host and process id.
        engine: class of its engine, the newest one.
        rows: that it answered.
        rows_per_s: from its first engine to the end of its last chunk.
        shares: where its engines' seconds went.
    """

    name: str
    engine: str
    rows: int
    rows_per_s: float
    shares: TimeShares


@dataclass(frozen=True, slots=True)
class Figures:
    """What a log said at one moment.

    Attributes:
        total: rows of the output.
        done: rows in committed parts, those of earlier runs included.
        reused: those of ``done`` that earlier runs did.
        failures: those of ``done`` without a response.
        causes: class of the error -> rows of ``failures``, the most frequent first.
        tokens: of prompts and responses, of this run.
        shares: where the seconds of all engines went.
        queued: records that waited on the replicas at the end of their last chunks.
        running: records that were on devices then.
        replicas: those with the most rows first.
        chunks_failed: calls for a chunk that failed.
        engine_deaths: engines that died.
        outcome: as in the log.
    """

    total: int
    done: int
    reused: int
    failures: int
    causes: Sequence[tuple[str, int]]
    tokens: int
    shares: TimeShares
    queued: int
    running: int
    replicas: Sequence[Replica]
    chunks_failed: int
    engine_deaths: int
    outcome: str

    @classmethod
    def of(cls, log: RunLog) -> Figures:
        """Taken on the thread that fills the log."""
        shares = {engine.batcher: log.engine_time(engine) for engine in log.engines.values()}
        by_process = sorted(log.engines.values(), key=lambda engine: (engine.process, engine.started))
        lives = [list(group) for _, group in groupby(by_process, key=lambda engine: engine.process)]
        newest = [engines[-1].samples[-1] for engines in lives if engines[-1].samples]
        return cls(
            total=log.plan.rows,
            done=log.rows,
            reused=log.plan.rows_reused,
            failures=log.failures,
            causes=sorted(log.causes.items(), key=lambda item: -item[1]),
            tokens=sum(engine.tokens for engine in log.engines.values()),
            shares=sum(shares.values(), TimeShares()),
            queued=sum(sample.queued for sample in newest),
            running=sum(sample.running for sample in newest),
            replicas=sorted(
                (_replica(engines, [shares[engine.batcher] for engine in engines]) for engines in lives),
                key=lambda replica: (-replica.rows, replica.name),
            ),
            chunks_failed=sum(bool(chunk.error) for chunk in log.chunks),
            engine_deaths=log.engine_deaths,
            outcome=log.outcome,
        )


def _replica(engines: Sequence[EngineLog], shares: Iterable[TimeShares]) -> Replica:
    """The lives of a process' engines, the newest last, taken together."""
    rows = sum(engine.rows for engine in engines)
    seconds = max(engine.ended for engine in engines) - min(engine.loaded for engine in engines)
    rate = rows / seconds if seconds > 0 else 0.0
    return Replica(engines[-1].process, engines[-1].engine, rows, rate, sum(shares, TimeShares()))


def queues_here() -> tuple[int, int] | None:
    """(Records that wait, records on devices) of this process' batchers now; None if it has none."""
    stats = [batcher.stats for batcher in live_batchers() if batcher.is_running]
    return (sum(each.queued for each in stats), sum(each.running for each in stats)) if stats else None


class Pace:
    """How fast this run gets rows done, and when it will be through, from the ends of its chunks.

    Args:
        todo: rows that this run has to do.
        slots: chunks under way at once.
        now: seconds, of the same clock as every other ``now``.
    """

    def __init__(self, todo: int, slots: int, now: float) -> None:
        self._todo = todo
        self._slots = slots
        self._started = now
        self._ends: deque[tuple[float, int]] = deque()
        self._ended = 0
        self._done = 0
        self._window: tuple[float, int] | None = None

    def advance(self, rows: int, now: float) -> None:
        """A chunk has ended; ``rows`` are what this run has done by now."""
        self._done = rows
        self._ended += 1
        if self._ended < self._slots:  # what the first ones took holds the model's load
            return
        self._ends.append((now, rows))
        while len(self._ends) > self._slots + 1 and self._ends[1][0] <= now - WINDOW_S:
            self._ends.popleft()
        if len(self._ends) > self._slots:  # fewer may all be of chunks that began, and therefore end, together
            self._window = self._ends[0]

    def elapsed(self, now: float) -> float:
        """Seconds since the start."""
        return max(0.0, now - self._started)

    def rate(self, now: float) -> float:
        """Rows a second since the start."""
        elapsed = self.elapsed(now)
        return self._done / elapsed if elapsed > 0 else 0.0

    def recent_rate(self, now: float) -> float | None:
        """Rows a second lately; None until every slot has done a chunk after its first."""
        if self._window is None:
            return None
        at, rows = self._window
        return (self._done - rows) / (now - at) if now > at else None

    def left(self, now: float) -> float | None:
        """Seconds until the last row is done; None until enough of the run, or of its rows, is done to tell."""
        rate = self.recent_rate(now)
        if rate is None and self._done >= self._todo / 5:
            rate = self.rate(now)
        return (self._todo - self._done) / rate if rate else None
