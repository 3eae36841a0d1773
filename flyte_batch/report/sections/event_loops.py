"""What held the event loops of replicas."""

from __future__ import annotations

from flyte_batch.report.formats import count, number, seconds
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Table, bounded_table


def stalls_by_code(log: RunLog) -> Table | None:
    if not log.stalls:
        return None
    codes: dict[str, list[float]] = {}
    for _, stall in log.stalls:
        codes.setdefault(stall.code, []).append(stall.seconds)
    rows = [
        [code, count(len(times)), seconds(sum(times)), seconds(max(times))]
        for code, times in sorted(codes.items(), key=lambda pair: -sum(pair[1]))
    ]
    return bounded_table("Code that held event loops", ("Code", "Times", "Together", "Longest"), rows)


def stalls(log: RunLog) -> Table | None:
    if not log.stalls:
        return None
    rows = [
        [f"{number(stall.at - log.started)} s", seconds(stall.seconds), process, stall.code]
        for process, stall in sorted(log.stalls, key=lambda pair: pair[1].at)
    ]
    headings = ("Ended after", "Took", "Replica", "Code")
    return bounded_table("Each time an event loop stood still", headings, rows, {2, 3})
