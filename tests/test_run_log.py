"""The log of a run: sums, where the time went, and that it survives its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flyte_batch as fb
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES, EngineDead
from flyte_batch.histograms import LATENCY_BOUNDS, TOKEN_BOUNDS, added, bound, count_tokens, percentile
from flyte_batch.monitoring.details import ChunkDetails, EngineLife, Example, Sample, Stall
from flyte_batch.report.answer import Figure, figures, sentence
from flyte_batch.report.page import make_report
from flyte_batch.report.run_log import (
    FEWEST_SAMPLES,
    MOST_SAMPLES,
    MOST_SAMPLES_OF_ALL,
    ChunkEntry,
    Plan,
    RunLog,
    TimeShares,
    logs_from_json,
    logs_to_json,
)
from flyte_batch.report.sections.earlier import earlier_runs
from flyte_batch.report.sections.over_time import replicas_table
from flyte_batch.report.sections.shares import shares_table
from tests.helpers import questions
from tests.report.logs import gpu_use

PLAN = Plan(100, 10, 10, 0, 0, replicas=2, concurrency=4, batch_rows=256, rows_per_s=100.0, price_per_hour=3.6)


def sample(at: float, busy: float = 0.0, starved: float = 0.0, assembling: float = 0.0, late: float = 0.0) -> Sample:
    return Sample(at, busy, starved, assembling, late, 0, 0, 0.0, 0, 0)


def life(batcher: str, started: float, loaded: float, ended: float, *samples: Sample, **more: Any) -> EngineLife:
    return EngineLife(batcher, "FakeEngine", started, loaded, ended, samples, **({"rows": 10, "tokens": 10} | more))


def details(
    batcher: str, started: float, loaded: float, ended: float, *samples: Sample, process: str = "p", **more: Any
) -> ChunkDetails:
    return ChunkDetails(process, (life(batcher, started, loaded, ended, *samples),), **more)


def log_of(*chunks: ChunkDetails, started: float = 0.0, ended: float = 10.0) -> RunLog:
    log = RunLog("out", "in.jsonl", {}, PLAN, started=started, ended=ended, outcome="done")
    for index, each in enumerate(chunks):
        log.add_chunk(ChunkEntry(index, 10, 0, 5, 5, each.batcher, each.began, each.ended), each)
    return log


def test_each_second_of_an_engine_is_counted_once_however_many_chunks_shared_it() -> None:
    log = log_of(
        details("a", 0, 1, 6, sample(1), sample(6, busy=4, starved=1)),
        details("a", 1, 1, 8, sample(2, busy=1), sample(8, busy=5, starved=2)),
    )
    assert log.time_shares() == TimeShares(busy=5, loading=1, starved=2, tail=2)
    assert log.utilization == 0.5


@pytest.mark.parametrize("outcome", ["running", "failed", "cancelled", "unfinished"])
def test_what_an_engine_did_since_its_last_chunk_nobody_knows_of_a_run_that_is_not_done(outcome: Any) -> None:
    log = log_of(details("a", 0, 1, 8, sample(1), sample(8, busy=7)), ended=100.0)
    log.outcome = outcome
    assert log.time_shares() == TimeShares(busy=7, loading=1)
    log.add_chunk(ChunkEntry(1, 10, 0, 5, 5, "b", 20, 30), details("b", 20, 21, 30, sample(21), sample(30, busy=9)))
    assert log.time_shares() == TimeShares(busy=16, loading=2, tail=12)  # until its process had another one


def test_all_shares_together_are_the_time_of_the_engines() -> None:
    first = details("a", 0, 2, 9, sample(2), sample(9, busy=3, starved=2, assembling=1, late=1))
    second = details("b", 4, 5, 10, sample(5), sample(10, busy=5), process="q")
    shares = log_of(first, second).time_shares()
    assert shares.total == pytest.approx(10 + 6)
    assert shares.blocked == 1
    assert shares.utilization == 8 / 16


def test_a_loop_that_stood_still_while_the_device_was_free_is_what_held_it_up() -> None:
    chunk = details(
        "a", 0, 0, 10, sample(0), sample(4, busy=4), sample(10, busy=5, starved=5), stalls=(Stall(8, 3, "f"),)
    )
    assert log_of(chunk).time_shares() == TimeShares(busy=5, starved=2, blocked=3)


def test_a_stall_in_which_a_call_was_not_heard_of_is_counted_once() -> None:
    chunk = details("a", 0, 0, 10, sample(0), sample(10, busy=4, starved=3, late=3), stalls=(Stall(8, 3, "f"),))
    shares = log_of(chunk).time_shares()
    assert (shares.busy, shares.starved, shares.blocked) == (4, 3, 3)


STOOD = (Stall(8, 3, "parse (mine.py)"), Stall(9.5, 1, "make.<locals>.FakeEngine.infer (mine.py)"))


def test_busy_seconds_of_an_engine_that_answers_on_the_loop_are_in_doubt_while_it_stood_still() -> None:
    both = sample(0), sample(10, busy=9, starved=1)
    shares = log_of(details("a", 0, 0, 10, *both, stalls=STOOD)).time_shares()
    assert shares == TimeShares(busy=9, blocked=1, stood=3, doubtful=2)  # one second was the engine's own
    assert shares.total == 10
    assert shares.is_upper_bound
    told = ChunkDetails("p", (life("a", 0, 0, 10, *both, is_told=True),), stalls=STOOD)
    measured = log_of(told).time_shares()
    assert measured == TimeShares(busy=9, blocked=1)
    assert not measured.is_upper_bound
    little = log_of(details("a", 0, 0, 10, sample(0), sample(10, busy=10), stalls=(Stall(8, 0.125, "f"),)))
    assert little.time_shares() == TimeShares(busy=10, stood=0.125, doubtful=0.125)
    assert not little.time_shares().is_upper_bound


def test_a_utilisation_in_doubt_is_one_at_most_wherever_it_is_told() -> None:
    chunk = details("a", 0, 0, 10, sample(0), sample(10, busy=9, starved=1), stalls=STOOD).later(1000)
    log = log_of(chunk, started=1000, ended=1010)
    log.outcome, shares = "done", log.time_shares()
    note = "9 s busy of 10 s, 2 s of these in doubt: the event loop stood still"
    assert Figure("Utilisation", "at most 90%", note) in figures(log, shares)
    assert "busy at most 90% of the time" in sentence(log, shares)
    table = shares_table(shares)
    assert table is not None
    assert "of the 9 s busy, 2 s lie in stalls of the event loop" in table.rows[0][3]
    process_shares = {"p": shares}
    for rows in (replicas_table({"p": list(log.engines.values())}, process_shares), earlier_runs([log, log])):
        assert rows is not None
        assert "at most 90%" in rows.rows[0]
    page = make_report([log], [])
    assert page.replicas[0].note == "10 rows, busy at most 90% of 10 s, 1 engine"
    assert [charts[0].note for charts in (page.overview, page.replicas[0].charts)] == ["mean at most 90%"] * 2


class ThreadEngine(fb.FakeEngine):
    """Its call is a plain function."""

    def infer(self, batch: Any) -> Any:
        return [fb.Completion("four", "stop", 1, 1) for _ in batch]


class DeadThreadEngine(fb.FakeEngine):
    def infer(self, batch: Any) -> Any:
        raise EngineDead("it is gone")


async def test_a_chunks_details_say_whether_its_engines_were_measured_on_a_thread(tmp_path: Path) -> None:
    engines: list[fb.FakeEngine] = [ThreadEngine(), DeadThreadEngine(), fb.FakeEngine()]

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(engines.pop(0), batch_timeout_s=0.001)

    async def infer(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    def known(log: RunLog) -> list[tuple[str, bool]]:
        return [(engine.engine, engine.is_told) for engine in log.engines.values()]

    options: Any = {"progress": "off", "code_version": "1"}
    source = questions(tmp_path / "in.jsonl", 10)
    await fb.run(source, str(tmp_path / "a"), infer, **options)
    (log,) = logs_from_json((tmp_path / "a" / "_report.json").read_bytes())
    assert known(log) == [("ThreadEngine", True)]
    await solver.aclose()
    await fb.run(source, str(tmp_path / "b"), infer, **options)
    (log,) = logs_from_json((tmp_path / "b" / "_report.json").read_bytes())
    assert known(log) == [("DeadThreadEngine", True), ("FakeEngine", False)]
    await solver.aclose()


def test_an_engine_that_was_built_anew_has_no_tail_while_its_successor_works() -> None:
    log = log_of(
        details("a", 0, 1, 4, sample(1), sample(4, busy=3)), details("b", 5, 7, 10, sample(7), sample(10, busy=3))
    )
    assert log.time_shares() == TimeShares(busy=6, loading=3, tail=1)
    assert log.replica_seconds == 10  # one process
    assert log.cost == pytest.approx(0.01)


def test_an_engine_that_died_in_a_chunk_keeps_its_time_its_rows_and_its_cost() -> None:
    dead = life("a", 0, 1, 6, sample(1), sample(6, busy=4, starved=1), rows=8, tokens=7)
    log = log_of(ChunkDetails("p", (dead, life("b", 6, 7, 8, sample(7), sample(8, busy=1), rows=2, tokens=3))))
    assert log.time_shares() == TimeShares(busy=5, loading=2, starved=1, tail=2)
    assert [(each.batcher, each.rows, each.tokens) for each in log.engines.values()] == [("a", 8, 7), ("b", 2, 3)]
    assert log.cost == pytest.approx(3.6 * 10 / 3600)
    assert (log.rows, log.rows_done) == (10, 10)


def test_a_run_that_had_nothing_to_do_used_nothing() -> None:
    log = log_of()
    assert (log.utilization, log.replica_seconds, log.cost) == (0.0, 0.0, 0.0)


def test_samples_stay_bounded_and_keep_the_first_and_the_last() -> None:
    chunks = (
        details("a", 0, 0, at + 1, *(sample(at + part / 4, busy=at + part / 4) for part in range(4)))
        for at in range(1, 2000)
    )
    log = log_of(*chunks, ended=2000.0)
    samples = log.engines["a"].samples
    assert len(samples) <= 2 * MOST_SAMPLES
    assert (samples[0].at, samples[-1].at) == (1, 1999.75)
    assert log.time_shares().busy == pytest.approx(1998.75)


def test_samples_of_many_replicas_stay_bounded_together() -> None:
    log = log_of()
    for index in range(10_000):
        name, at = str(index % 500), index // 500 * 40
        taken = (sample(at + number, busy=at + number) for number in range(40))
        log.add_chunk(ChunkEntry(index, 10, 0, 5, 5, name), details(name, 0, 0, 800, *taken, process=name))
    assert sum(len(engine.samples) for engine in log.engines.values()) <= 2 * MOST_SAMPLES_OF_ALL
    assert all(len(engine.samples) >= FEWEST_SAMPLES for engine in log.engines.values())
    assert log.time_shares().busy == 500 * 799


def test_sums_failures_and_examples_come_from_the_chunks() -> None:
    failing = {
        "causes": {"BadRecord": 2},
        "examples": (Example(3, "BadRecord", "too long"), Example(4, "BadRecord", "empty")),
        "latencies": {0.1: 3},
        "prompt_lengths": {4.0: 8},
        "response_lengths": {8.0: 8},
        "died": ("x", "y"),
    }
    log = RunLog("out", "in", {}, PLAN)
    for index in range(3):
        log.add_chunk(ChunkEntry(index, 10, 2, 30, 60), details(str(index), 0, 1, 2, **failing))
    assert (log.rows, log.failures, log.prompt_tokens, log.response_tokens) == (30, 6, 90, 180)
    assert (log.causes, log.latencies, log.prompt_lengths) == ({"BadRecord": 6}, {0.1: 9}, {4.0: 24})
    assert [example.row for example in log.examples] == [3, 4]  # others said the same
    assert (log.died, log.engine_deaths) == (["x", "y"], 2)  # three chunks told of the same two


def test_causes_beyond_the_first_so_many_are_others_and_their_sum_is_still_that_of_the_failures() -> None:
    log = RunLog("out", "in", {}, PLAN)
    for index in range(50):
        known = {f"Error{number}": 1 for number in range(10 * index, 10 * index + 10)}
        examples = tuple(Example(index, cause, "why") for cause in known)
        causes = known | {"Error3": 3, OTHER_CAUSES: 1}
        log.add_chunk(ChunkEntry(index, 20, 14, 0, 0), details("a", 0, 1, 2, causes=causes, examples=examples))
    assert len(log.causes) == MOST_CAUSES + 1
    assert sum(log.causes.values()) == 14 * 50 - 1
    assert list(log.causes)[:2] == [OTHER_CAUSES, "Error3"]
    assert log.causes["Error3"] == 3 * 50
    assert {example.cause for example in log.examples} == log.causes.keys() - {OTHER_CAUSES}


def test_what_a_replica_tells_of_its_gpus_leaves_those_of_others_alone() -> None:
    log = log_of(details("a", 0, 1, 4, gpus=(gpu_use("GPU-1"),)), details("b", 0, 1, 4, gpus=(gpu_use("GPU-2"),)))
    other = log.gpus[1]
    log.add_chunk(ChunkEntry(2, 10, 0, 5, 5), details("a", 4, 4, 8, gpus=(gpu_use("GPU-1", seconds=200),)))
    assert {gpu.uuid: gpu.end - gpu.start for gpu in log.gpus} == {"GPU-1": 200, "GPU-2": 100}
    assert any(gpu is other for gpu in log.gpus)  # thousands of replicas' GPUs are not merged anew for every chunk


def test_a_log_survives_its_file_and_a_broken_file_is_said_to_be_one() -> None:
    more = {"stalls": (Stall(3, 1.5, "code (a.py)"),), "causes": {"E": 1}, "examples": (Example(1, "E", "m"),)}
    log = log_of(details("a", 0, 1, 4, sample(1), sample(4, busy=3), latencies={0.1: 10}, **more))
    log.chunks.append(ChunkEntry(3, 10, 0, 0, 0, error="EngineDead"))
    assert logs_from_json(logs_to_json([log, log])) == [log, log]
    for broken in (b"", b"[]", b"{}", b'{"format_version":1,"runs":[{}]}', b'{"format_version":99,"runs":[]}', b"[[["):
        with pytest.raises(ValueError):
            logs_from_json(broken)


def test_details_travel_as_one_line_of_json() -> None:
    lives = life("z", -3, -2, -1, sample(-2), sample(-1, busy=1)), life("a", 0, 1, 4, sample(1), is_told=True)
    sent = ChunkDetails("p", lives, {0.1: 2}, prompt_lengths={4.0: 1}, stalls=(Stall(3, 1, "c"),))
    assert "\n" not in sent.to_json()
    assert ChunkDetails.from_json(sent.to_json()) == sent


@pytest.mark.parametrize(
    ("given_at", "heard_at", "lag"),
    [(9, 21, 0), (10, 20, 0), (30, 45, 20), (1, 15, -5), (30, 35, 0)],
    ids=["agree", "agree to the second", "behind", "ahead", "kept from another time"],
)
def test_how_far_a_clock_is_behind_follows_from_when_a_chunk_was_given_and_heard_of(
    given_at: float, heard_at: float, lag: float
) -> None:
    chunk = details("a", 10, 11, 20, sample(11), sample(20, busy=9), stalls=(Stall(15, 1, "f"),))
    assert chunk.clock_lag(given_at, heard_at) == lag
    moved = chunk.later(5)
    (later,) = moved.lives
    assert (later.started, later.loaded, later.ended) == (15, 16, 25)
    assert [each.at for each in (*later.samples, *moved.stalls)] == [16, 25, 20]


def test_a_clock_is_corrected_by_when_a_chunk_was_begun_and_for_engines_that_died_too() -> None:
    dead, last = life("a", 10, 11, 15, sample(11), sample(15)), life("b", 15, 16, 20, sample(16), sample(20))
    chunk = ChunkDetails("p", (dead, last))
    assert (chunk.began, chunk.ended, chunk.batcher) == (10, 20, "b")
    assert chunk.clock_lag(30, 45) == 20
    moved, _ = chunk.later(20).lives
    assert (moved.started, moved.loaded, moved.ended) == (30, 31, 35)
    assert [each.at for each in moved.samples] == [31, 35]


@given(st.lists(st.integers(0, 20_000_000), min_size=1), st.floats(0, 1))
def test_a_percentile_of_a_histogram_is_the_bound_above_the_exact_one(lengths: list[int], share: float) -> None:
    histogram = count_tokens(lengths)
    assert sum(histogram.values()) == len(lengths)
    found = percentile(histogram, share)
    below = sum(length <= (found or 0) for length in lengths)
    assert found == TOKEN_BOUNDS[-1] or below >= share * len(lengths)
    assert sum(length < (found or 0) / 2 for length in lengths) <= max(1, share * len(lengths))


@given(st.lists(st.floats(0, 1e6)))
def test_histograms_add_up_bound_by_bound(values: list[float]) -> None:
    ones = [{bound(value, LATENCY_BOUNDS): 1} for value in values]
    total = added(ones)
    assert sum(total.values()) == len(values)
    assert list(total) == sorted(total)
    assert percentile({}, 0.5) is None
