"""What the report says of a run's cost where not all of it is known."""

from __future__ import annotations

from typing import Any

from flyte_batch.report.answer import figures, summary
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
