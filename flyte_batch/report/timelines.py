"""Figures over time: what counters that only grow, and chunks, say of equal slices of a run. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flyte_batch.monitoring.details import Sample
from flyte_batch.report.run_log import ChunkEntry, EngineLog

MOST_SLICES = 48


@dataclass(frozen=True, slots=True)
class Slice:
    """What engines did between two moments.

    Attributes:
        start: Unix time.
        end: Unix time.
        replicas: processes with an engine that was sampled in it.
        utilization: share (0-1) of the sampled time in which devices were at work; None without any.
        rows_per_s: records resolved; None where nothing was sampled.
        queued: records waiting, on average; None where nothing was sampled.
        fill: how full the batches were, on average; None without batches.
    """

    start: float
    end: float
    replicas: int
    utilization: float | None
    rows_per_s: float | None
    queued: float | None
    fill: float | None


def edges(start: float, end: float, most: int = MOST_SLICES) -> tuple[float, ...]:
    """The ends of equal slices of a time, each of at least half a second, but for a shorter time; () for no time."""
    if end <= start:
        return ()
    number = max(1, min(most, int(end - start) * 2))
    return tuple(start + (end - start) * index / number for index in range(number + 1))


def timeline(engines: Iterable[EngineLog], at: Sequence[float]) -> list[Slice]:
    """What these engines did together in the slices between the moments ``at``."""
    counters = [_Counters(engine) for engine in engines if len(engine.samples) > 1]
    return [_slice(counters, start, end) for start, end in itertools.pairwise(at)]


def token_rates(chunks: Iterable[ChunkEntry], rows_per_s: Sequence[float | None], at: Sequence[float]) -> list[float]:
    """Tokens a second in each slice between the moments ``at``; in all those of the chunks.

    A chunk tells its tokens when it ends, and its rows wait for those of others before: the tokens of a slice are its
    ``rows_per_s`` times what a row of the chunks that were under way has. Where no rows are known, those of a chunk are
    taken to have come evenly over its time.
    """
    known = [chunk for chunk in chunks if chunk.ended is not None]
    sizes = [chunk.prompt_tokens + chunk.response_tokens for chunk in known]
    tokens, rows = _evenly(known, sizes, at), _evenly(known, [chunk.rows for chunk in known], at)
    seconds = [end - start for start, end in itertools.pairwise(at)]
    each = zip(tokens, rows, rows_per_s, seconds, strict=True)
    found = [(rate or 0.0) * took * (some / of_rows if of_rows else 0.0) for some, of_rows, rate, took in each]
    scale = sum(tokens) / sum(found) if sum(found) > 0 else 0.0
    return [
        (number * scale if scale else even) / took for number, even, took in zip(found, tokens, seconds, strict=True)
    ]


def _evenly(chunks: Sequence[ChunkEntry], numbers: Sequence[int], at: Sequence[float]) -> list[float]:
    """What falls into each slice of numbers that come evenly over their chunks' times."""
    found = [0.0] * max(0, len(at) - 1)
    for chunk, number in zip(chunks, numbers, strict=True):
        if chunk.started is None or chunk.ended is None or not found:
            continue
        start, end = max(chunk.started, at[0]), min(chunk.ended, at[-1])
        if end <= start:  # a chunk of no time, or of a clock that is off
            place = bisect.bisect_right(at, chunk.ended) - 1
            found[min(max(place, 0), len(found) - 1)] += number
            continue
        for index in range(max(0, bisect.bisect_right(at, start) - 1), len(found)):
            overlap = min(end, at[index + 1]) - max(start, at[index])
            if overlap <= 0:
                break
            found[index] += number * overlap / (end - start)
    return found


class _Counters:
    """An engine's samples, asked for any moment between the first and the last."""

    def __init__(self, engine: EngineLog) -> None:
        self.process = engine.process
        self.samples = engine.samples
        self.times = [sample.at for sample in engine.samples]

    def at(self, moment: float) -> tuple[float, float, float, float]:
        """Busy seconds, records, batches and fill by then, evenly between two samples."""
        index = min(max(bisect.bisect_right(self.times, moment), 1), len(self.times) - 1)
        before, after = self.samples[index - 1], self.samples[index]
        span = after.at - before.at
        share = min(1.0, max(0.0, (moment - before.at) / span)) if span > 0 else 1.0
        first, second = _counted(before), _counted(after)
        return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))  # type: ignore[return-value]

    def queued(self, start: float, end: float) -> float:
        """Records waiting, the mean of the samples in the slice, or of its neighbours."""
        first, last = bisect.bisect_left(self.times, start), bisect.bisect_left(self.times, end)
        found = self.samples[first:last] or self.samples[max(0, first - 1) : first + 1]
        return sum(sample.queued for sample in found) / len(found)


def _counted(sample: Sample) -> tuple[float, float, float, float]:
    return sample.busy_s, sample.completed, sample.batches, sample.fill


def _slice(counters: Sequence[_Counters], start: float, end: float) -> Slice:
    covered = busy = rows = batches = fill = queued = 0.0
    processes = set()
    for each in counters:
        first, last = max(start, each.times[0]), min(end, each.times[-1])
        if last <= first:
            continue
        processes.add(each.process)
        before, after = each.at(first), each.at(last)
        covered += last - first
        busy += after[0] - before[0]
        rows += after[1] - before[1]
        batches += after[2] - before[2]
        fill += after[3] - before[3]
        queued += each.queued(first, last)
    if not processes:
        return Slice(start, end, 0, None, None, None, None)
    return Slice(
        start=start,
        end=end,
        replicas=len(processes),
        utilization=min(1.0, max(0.0, busy / covered)),
        rows_per_s=rows / (end - start),
        queued=queued,
        fill=fill / batches if batches > 0 else None,
    )
