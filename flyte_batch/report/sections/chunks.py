"""How long chunks took, and which failed."""

from __future__ import annotations

import statistics

from flyte_batch.report import charts
from flyte_batch.report.formats import count, number, plural, seconds
from flyte_batch.report.run_log import ChunkEntry, RunLog
from flyte_batch.report.sections.elements import Chart, Table, bounded_table, time_marks

STRAGGLER = 3.0
"""Times the median of the chunks' durations."""


def chunk_chart(log: RunLog) -> Chart | None:
    durations = _durations(log)
    if not durations:
        return None
    median = statistics.median(duration for _, _, duration in durations)
    top = charts.nice_top([duration for _, _, duration in durations])
    drawing = charts.dots(
        [
            (start, duration, "straggler" if _straggles(duration, median) else "usual")
            for _, start, duration in durations
        ],
        log.seconds,
        top,
        ident="fb-chunks",
        title="How long chunks took, by when they began",
        description=f"{plural(len(durations), 'chunk')}; the median was {seconds(median)}, the slowest "
        f"{seconds(max(duration for _, _, duration in durations))}.",
    )
    note = f"median {seconds(median)}"
    if any(_straggles(duration, median) for _, _, duration in durations):
        note += f"; a square took more than {STRAGGLER:g} times that"
    return Chart("Duration, by start", note, drawing, seconds(top), time_marks((0, log.seconds)))


def chunks_note(log: RunLog) -> str:
    durations = _durations(log)
    if not durations:
        return ""
    median = statistics.median(duration for _, _, duration in durations)
    stragglers = sum(_straggles(duration, median) for _, _, duration in durations)
    late = (
        f"{plural(stragglers, 'chunk')} took more than {STRAGGLER:g} times the median"
        if stragglers
        else f"none took more than {STRAGGLER:g} times the median"
    )
    return (
        f"{plural(len(durations), 'chunk')} done in this run, {late}. A replica's first chunks hold the model's load; "
        "chunks that share a replica share its time."
    )


def chunk_tables(log: RunLog) -> tuple[Table | None, Table | None]:
    """Those that were done, and those that failed."""
    durations = sorted(_durations(log), key=lambda each: -each[2])
    slowest = None
    if durations:
        median = statistics.median(duration for _, _, duration in durations)
        rows = [
            [
                count(chunk.index),
                count(chunk.rows),
                count(chunk.failures),
                seconds(start),
                seconds(duration),
                f"{number(duration / median)} ×" if median > 0 else "–",
                log.engines[chunk.batcher].process if chunk.batcher in log.engines else "–",
            ]
            for chunk, start, duration in durations
        ]
        headings = ("Chunk", "Rows", "Failures", "Began after", "Took", "Times the median", "Replica")
        slowest = bounded_table("Chunks, the slowest first", headings, rows, {6})
    broken = [[count(chunk.index), count(chunk.rows), chunk.error] for chunk in log.chunks if chunk.error]
    failed = bounded_table("Chunks that failed", ("Chunk", "Rows", "Error"), broken, {2}) if broken else None
    return slowest, failed


def _durations(log: RunLog) -> list[tuple[ChunkEntry, float, float]]:
    """(chunk, start within the run, seconds) of those that were done."""
    return [
        (chunk, chunk.started - log.started, max(0.0, chunk.ended - chunk.started))
        for chunk in log.chunks
        if chunk.started is not None and chunk.ended is not None
    ]


def _straggles(duration: float, median: float) -> bool:
    return duration > STRAGGLER * median and duration > median + 1
