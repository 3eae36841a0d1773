"""What the report says of a run's cost where not all of it is known."""

from __future__ import annotations

from typing import Any

from flyte_batch.report.answer import Figure, elapsed, figures, sentence, summary
from flyte_batch.report.run_log import ChunkEntry
from tests.report.logs import make_log, make_plan

LOST = ChunkEntry(99, 100, 0, 0, 0, error="DeadlineExceeded")


def priced(**changes: Any) -> Any:
    return make_log(plan=make_plan(price_per_hour=36.0), **changes)


def cost(log: Any) -> tuple[str, str]:
    (figure,) = (each for each in figures(log, log.time_shares()) if each.name == "Cost")
    return figure.value, figure.note


def test_the_cost_of_a_run_in_which_chunks_failed_is_a_lower_bound() -> None:
    log = priced()
    whole, note = cost(log)
    log.chunks.append(LOST)
    assert cost(log) == (f"at least {whole}", f"{note}; what 1 chunk that failed took may be missing")


def test_the_cost_of_a_run_that_finished_no_chunk_is_unknown_and_not_nothing() -> None:
    log = priced(replicas=0, outcome="failed")
    log.chunks.append(LOST)
    assert cost(log) == ("unknown", "chunks that failed tell no times")
    lines = summary(log, log, 0)
    assert "0 replicas" not in " ".join(lines)
    assert any(line.startswith("cost unknown (") for line in lines)


def test_of_parts_that_came_after_the_log_was_written_no_times_are_known() -> None:
    """As of a run that was killed: its rows are those of the parts, its times those of the log."""
    log = priced(outcome="unfinished")
    (whole, note), took = cost(log), elapsed(log)
    log.count(300, 0, 0, 0, {}, {}, {})
    assert cost(log)[0] == f"at least {whole}"
    assert cost(log)[1].startswith(note)
    assert "what 300 rows took that came after the log was written is missing" in cost(log)[1]
    assert elapsed(log) == f"at least {took}"
    assert f"after at least {took}, with 8,300 of 8,000 rows done" in sentence(log, log.time_shares())
    assert Figure("Time", f"at least {took}", "2 replicas") in figures(log, log.time_shares())
    early = priced(replicas=0, outcome="unfinished")
    early.count(300, 0, 0, 0, {}, {}, {})
    assert cost(early) == ("unknown", "no chunk had told its times when the log was written")
