"""What a run was to be, and by which parameters."""

from __future__ import annotations

from flyte_batch.report.advice import mean_fill, measured_rows_per_s, replicas_seen
from flyte_batch.report.answer import elapsed, knows_times
from flyte_batch.report.formats import count, number, percent, said, seconds
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Table
from flyte_batch.report.settings import flat


def plan_table(log: RunLog) -> Table:
    plan, rate = log.plan, measured_rows_per_s(log)
    to_do = plan.rows - plan.rows_reused
    done = [chunk for chunk in log.chunks if not chunk.error]
    largest = max((chunk.rows for chunk in done), default=None)
    fill, unknown = mean_fill(log.engines.values()), "–"
    expected = to_do / (plan.rows_per_s * plan.replicas)
    rows = [
        ["Rows of the output", count(plan.rows), f"{count(log.rows)} done"],
        ["Rows of earlier runs", count(plan.rows_reused), unknown],
        ["Chunks of this run", count(plan.chunks - plan.chunks_reused), f"{count(len(done))} done"],
        ["Rows per chunk", count(plan.chunk_rows), said(largest, lambda most: f"at most {count(most)}")],
        ["Replicas", f"at most {count(plan.replicas)}", count(replicas_seen(log))],
        ["Chunks at once per replica", count(plan.concurrency), _most_at_once(log)],
        ["Records in a full batch", count(plan.batch_rows), said(fill, lambda share: f"{percent(share)} full")],
        ["Rows/s per replica", number(plan.rows_per_s), said(rate, number)],
        [
            "Time for the rows to do",
            seconds(expected),
            elapsed(log) if knows_times(log) and log.outcome != "running" else unknown,
        ],
    ]
    if not knows_times(log):  # the parts know how the output was cut, and no more
        rows = [rows[3]]
    return Table("What was planned, and what happened", ("", "Planned", "Happened"), rows)


def parameters(log: RunLog) -> Table:
    return Table("Parameters", ("Parameter", "Value"), list(flat(log.settings)), frozenset({1}))


def versions(log: RunLog) -> Table | None:
    rows = [[package, version] for package, version in log.versions.items()]
    return Table("Versions, in the driver", ("Package", "Version"), rows, frozenset({1})) if rows else None


def _most_at_once(log: RunLog) -> str:
    """The most chunks that one process had under way."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for chunk in log.chunks:
        if chunk.started is not None and chunk.ended is not None and chunk.batcher in log.engines:
            process = changes.setdefault(log.engines[chunk.batcher].process, [])
            process += [(chunk.started, 1), (chunk.ended, -1)]
    most = 0
    for each in changes.values():
        now = 0
        for _, change in sorted(each):
            now += change
            most = max(most, now)
    return count(most) if most else "–"
