"""Advice rests on numbers: each rule speaks above its threshold and is silent below it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.report.advice import MOST_CONCURRENCY, Advice, _slots, advise, measured_rows_per_s
from flyte_batch.report.run_log import RunLog
from tests.report.logs import make_log, make_plan, with_failures, with_stalls


def titles(log: RunLog) -> list[str]:
    return [advice.title for advice in advise(log)]


def only(log: RunLog) -> Advice:
    (advice,) = advise(log)
    return advice


def test_a_good_run_gets_no_advice() -> None:
    assert advise(make_log()) == []


@pytest.mark.parametrize(
    ("name", "share", "title"),
    [
        ("starved", 11, "Starved 11% of the time"),
        ("assembling", 11, "Waiting for batches to fill 11% of the time"),
        ("late", 6, "Blocked event loops 6.0% of the time"),
        ("loading", 26, "Loading 26% of the time"),
        ("tail", 16, "Idle at the end 16% of the time"),
    ],
)
def test_a_share_above_its_threshold_is_said_and_below_it_is_not(name: str, share: float, title: str) -> None:
    usual = {"loading": 2.0, "starved": 3.0, "assembling": 2.0, "late": 1.0, "tail": 2.0}

    def run_with(seconds: float) -> RunLog:
        times = usual | {name: seconds}
        return make_log(**times, busy=100 - sum(times.values()))

    assert titles(run_with(share)) == [title]
    assert titles(run_with(share - 1.5)) == []


def test_starved_devices_get_so_many_chunks_at_once_as_keep_them_busy() -> None:
    advice = only(make_log(busy=62, starved=38, loading=0, assembling=0, late=0, tail=0))
    assert advice.title == "Starved 38% of the time"
    assert "kept one busy for 62%" in advice.evidence
    assert advice.action == "Raise the replicas' concurrency from 4 to 10."
    assert advice.saves == pytest.approx(2 * 38)


def test_fewer_rows_at_once_than_a_batch_takes_have_one_cure() -> None:
    times = {"busy": 19, "starved": 20, "assembling": 58, "loading": 1, "late": 1, "tail": 1}
    few = make_plan(rows=1_000, chunk_rows=5, concurrency=1, batch_rows=256, replicas=1)
    advice = only(make_log(**times, replicas=1, chunks=200, fill=0.044, plan=few))
    assert advice.title == "Too few rows at once: devices waited 78% of the time"
    assert (
        "give a replica 5 rows at once, fewer than the 256 of a full batch; batches left 4.4% full" in advice.evidence
    )
    assert advice.action == "Raise chunk_size from 5 to 512, or the replicas' concurrency from 1 to 103."
    assert advice.saves == 78
    enough = make_plan(rows=1_000, chunk_rows=256, concurrency=1, batch_rows=256, replicas=1)
    found = titles(make_log(**times, replicas=1, chunks=4, plan=enough))
    assert [title.split()[0] for title in found] == ["Waiting", "Starved"]


def test_few_rows_at_once_that_keep_the_device_busy_are_left_alone() -> None:
    few = make_plan(chunk_rows=5, concurrency=1, batch_rows=256, replicas=1)
    assert titles(make_log(busy=91, starved=4, assembling=4, loading=0, late=0, tail=0, replicas=1, plan=few)) == []


def test_the_last_rows_of_an_output_are_not_asked_to_fill_batches() -> None:
    all_of_them = make_plan(rows=1_000, rows_reused=995, chunk_rows=5, concurrency=1, batch_rows=256, replicas=1)
    log = make_log(busy=50, starved=40, assembling=10, replicas=1, chunks=1, plan=all_of_them)
    assert not any("Too few" in title for title in titles(log))


def test_starved_devices_with_fewer_chunks_than_slots_get_smaller_chunks() -> None:
    plan = make_plan(chunk_rows=1000, batch_rows=64, concurrency=4)
    advice = only(make_log(busy=80, starved=20, chunks=2, plan=plan))
    assert "2 chunks in all, fewer than its 4 slots" in advice.evidence
    assert advice.action == "Lower chunk_size from 1,000 to 500."


def test_starved_devices_with_all_their_chunks_at_hand_wait_for_cpus() -> None:
    advice = only(make_log(busy=80, starved=20, chunks=4))
    assert "4 chunks of 100 rows could be at hand" in advice.evidence
    assert "more CPUs" in advice.action


def test_the_code_that_held_the_loop_longest_is_named() -> None:
    log = with_stalls(make_log(busy=80, late=12), ("clean (mine.py:3)", 1.2), ("parse (mine.py:9)", 4.0))
    advice = only(log)
    assert "2 times, 4 s of it in parse (mine.py:9)" in advice.evidence
    assert "parse (mine.py:9) on a thread" in advice.action


def test_stalls_under_a_busy_engine_that_answers_on_the_loop_are_told_with_what_they_put_in_doubt() -> None:
    busy = {"busy": 96, "starved": 0, "assembling": 0, "late": 0, "loading": 2, "tail": 2, "replicas": 1}
    advice = only(with_stalls(make_log(**busy), ("parse (mine.py:9)", 8.0)))
    assert advice.title == "Blocked event loops 8.0% of the time"
    assert advice.evidence.startswith("Of the 1 min 36 s busy, 8 s lie in stalls of the event loop: an engine that ")
    assert "parse (mine.py:9) on a thread" in advice.action
    assert advice.saves == 8
    assert titles(with_stalls(make_log(**busy), ("parse (mine.py:9)", 4.0))) == []


def test_an_engine_that_computes_on_the_loop_is_busy_and_told_to_be_in_the_way() -> None:
    advice = only(with_stalls(make_log(busy=96, starved=0, assembling=0, late=0, replicas=1), ("FakeEngine.infer", 8)))
    assert advice.evidence.startswith("For 8 s the engine itself computed on the event loop, and all else waited. ")
    assert advice.saves == 0


def test_an_engine_on_a_thread_is_busy_whatever_the_loop_does() -> None:
    log = with_stalls(make_log(busy=96, starved=0, assembling=0, late=0, replicas=1), ("parse (mine.py:9)", 8.0))
    for engine in log.engines.values():
        engine.is_told = True
    assert titles(log) == []


def test_a_blocked_loop_that_never_stood_still_for_long_has_too_much_to_do() -> None:
    assert "never stood still" in only(make_log(busy=80, late=12)).evidence


def test_few_rows_on_many_replicas_are_work_for_fewer() -> None:
    advice = only(make_log(busy=60, loading=40, replicas=8, tail=0))
    assert advice.action.startswith("Fewer replicas for so few rows: 4 instead of 8.")
    assert "4 min longer" not in advice.action
    assert "1 min longer" in advice.action  # 8 x 60 s of work on 4 instead of 8
    assert advice.saves == pytest.approx(4 * 40)


def test_one_replica_that_loads_for_long_is_to_be_kept_warm() -> None:
    assert "docs/cold-start.md" in only(make_log(busy=60, loading=40, replicas=1)).action


def test_a_long_tail_gets_smaller_chunks_that_still_fill_batches() -> None:
    plan = make_plan(chunk_rows=1000, rows=80_000, batch_rows=64, rows_per_s=400.0)
    advice = only(make_log(busy=75, tail=20, plan=plan))
    size = int(re.findall(r"from 1,000 to ([\d,]+)", advice.action)[0].replace(",", ""))
    assert 3 * 64 / 4 <= size < 1000 * 0.3
    small = make_plan(chunk_rows=48, batch_rows=64)  # 4 chunks of 48 rows hold three batches, and no fewer may
    assert only(make_log(busy=75, tail=20, plan=small)).action == "Fewer replicas for so few rows: 1 instead of 2."


def test_one_replica_has_no_tail() -> None:
    assert titles(make_log(busy=75, tail=20, replicas=1)) == []


def test_busy_devices_with_half_empty_batches_get_more_at_once() -> None:
    advice = only(make_log(fill=0.4))
    assert advice.title == "Batches 40% full"
    assert advice.action == "Raise the replicas' concurrency from 4 to 10."
    assert titles(make_log(fill=0.51)) == []
    assert "more rows" in only(make_log(fill=0.4, chunks=5)).action  # there are no 10 chunks to take


def test_a_wrong_assumption_is_told_where_it_changes_the_chunks() -> None:
    plan = make_plan(rows=800_000, rows_per_s=40.0, replicas=1, batch_rows=1, concurrency=1, chunk_rows=64)
    log = make_log(plan=plan, replicas=1, chunks=125)
    measured = measured_rows_per_s(log)
    assert measured == pytest.approx(8_000 / 96)
    assert log.plan.rows_per_s * 2 < measured
    advice = only(log)
    assert advice.action == "Pass --rows_per_s 83."
    planned = re.findall(r"chunks of ([\d,]+) rows instead of ([\d,]+)", advice.evidence)
    ((better, _),) = planned
    there_already = make_plan(**{**vars(plan), "chunk_rows": int(better.replace(",", ""))})
    assert titles(make_log(plan=there_already, replicas=1, chunks=8_000 // there_already.chunk_rows)) == []
    assert titles(make_log(plan=make_plan(**{**vars(plan), "rows_per_s": 42.0}), replicas=1, chunks=125)) == []
    # Where the chunks would stay as they are, there is nothing to tell.
    assert titles(make_log(plan=make_plan(rows_per_s=1.0))) == []


def test_failures_of_one_cause_come_first_and_say_what_to_do() -> None:
    log = with_failures(make_log(busy=62, starved=38), BadRecord=300, BadResponse=20)
    first, second = advise(log)
    assert first.title == "4.0% of the rows failed"
    assert "300 of 320 failures are of the class BadRecord" in first.evidence
    assert "again with --retry_failures" in first.action
    assert second.title.startswith("Starved")
    missing = only(with_failures(make_log(), MissingValue=300, BadRecord=20))
    assert missing.action.startswith("Fill in what these rows lack, or leave them out of the source; then run the same")
    cut = only(with_failures(make_log(), BadResponse=300))
    assert "Raise max_tokens" in cut.action
    assert "then run into another output, or with --overwrite" in cut.action
    assert "--retry_failures" not in cut.action  # refused: the parts that are there were made with other parameters
    for cause, number in (("EngineOutOfMemory", "Lower max_batch_size"), ("DeadlineExceeded", "Raise the records'")):
        of_code = only(with_failures(make_log(), **{cause: 300})).action
        assert of_code.startswith(number)
        assert "then run into another output, or with --overwrite" in of_code
        assert "--retry_failures" not in of_code  # refused: the number stands in the code, which is another then
    unknown = only(with_failures(make_log(), KeyError=300))
    assert (
        "Look at the example rows below. If you mend rows, run the same command again with --retry_failures"
        in unknown.action
    )
    assert "if you mend the code that they fail in, run into another output" in unknown.action
    of_earlier_runs = with_failures(make_log(), KeyError=300)
    of_earlier_runs.examples = []
    assert "Look at the column 'error' of these rows. " in only(of_earlier_runs).action
    assert titles(with_failures(make_log(), BadRecord=80)) == []  # 1% of 8,000
    assert len(titles(with_failures(make_log(), BadRecord=81))) == 1


def test_dead_engines_are_told_even_of_the_shortest_run() -> None:
    log = make_log(busy=0.1, loading=0.1, starved=0.1, assembling=0, late=0, tail=0, died=["a", "b"])
    assert titles(log) == ["Engines died 2 times"]


def test_a_run_of_seconds_is_too_short_to_speak_of_its_time() -> None:
    times = {"busy": 1.0, "starved": 0.9, "loading": 0.0, "assembling": 0.0, "late": 0.0, "tail": 0.0}
    assert titles(make_log(**times)) == []
    assert titles(make_log(**{name: 2 * each for name, each in times.items()})) != []


def test_slow_records_are_told_where_they_are_few_and_far_beyond_the_others() -> None:
    slow, long = {1.0: 980, 19.9526231: 20}, {16.0: 980, 96.0: 20}
    assert "more than 20 times" in only(make_log(latencies=slow, response_lengths=long)).title
    assert titles(make_log(latencies={1.0: 995, 19.9526231: 5}, response_lengths=long)) == []
    assert titles(make_log(latencies={10.0: 980, 19.9526231: 20}, response_lengths=long)) == []
    assert titles(make_log(latencies=slow, response_lengths={16.0: 980, 48.0: 20})) == []  # they waited in the queue


def test_while_a_run_goes_on_nothing_is_said_of_its_load_and_its_tail() -> None:
    assert titles(make_log(busy=40, loading=40, tail=20, outcome="running")) == []
    assert "Starved" in titles(make_log(busy=40, starved=60, outcome="running"))[0]
    early = make_log(busy=40, starved=60, outcome="running", plan=make_plan(rows=80_000))
    assert titles(early) == []


def test_the_largest_saving_comes_first() -> None:
    found = advise(make_log(busy=40, starved=20, assembling=40, late=0, loading=0, tail=0))
    assert [advice.saves for advice in found] == [80.0, 40.0]


SECONDS = st.floats(0, 1000)
COUNTS = st.integers(1, 500)
_CHANGE = re.compile(r"from ([\d,]+) to ([\d,]+)")
_INSTEAD = re.compile(r"(\d+) instead of (\d+)")


@settings(deadline=None)
@given(
    time=st.fixed_dictionaries(dict.fromkeys(("busy", "loading", "starved", "assembling", "late", "tail"), SECONDS)),
    replicas=st.integers(1, 5),
    chunks=st.integers(1, 30),
    fill=st.floats(0.01, 1),
    plan=st.fixed_dictionaries(
        {
            "rows": st.integers(1, 10**7),
            "chunk_rows": COUNTS,
            "concurrency": st.integers(1, 100),
            "batch_rows": COUNTS,
            "rows_per_s": st.floats(0.01, 1e5),
            "replicas": st.integers(1, 100),
        }
    ),
    outcome=st.sampled_from(["running", "done", "failed"]),
)
def test_no_advice_is_to_keep_a_value_nor_below_sense(
    time: dict[str, float], replicas: int, chunks: int, fill: float, plan: dict[str, Any], outcome: str
) -> None:
    log = make_log(**time, replicas=replicas, chunks=chunks, fill=fill, plan=make_plan(**plan), outcome=outcome)
    for advice in advise(log):
        assert advice.title
        assert advice.evidence
        assert "nan" not in f"{advice}".lower().split()
        assert advice.saves is None or (0 <= advice.saves <= log.time_shares().total and math.isfinite(advice.saves))
        for before, after in _CHANGE.findall(advice.action):
            old, new = int(before.replace(",", "")), int(after.replace(",", ""))
            assert new >= 1
            assert new > old if "concurrency" in advice.action else new < old
        for fewer, seen in _INSTEAD.findall(advice.action):
            assert 1 <= int(fewer) < int(seen) == replicas


def test_a_device_that_was_busy_for_next_to_nothing_gets_the_most_slots() -> None:
    assert [_slots(1, used) for used in (0.0, 2.2250738585e-313)] == [MOST_CONCURRENCY] * 2
    assert [_slots(1, used) for used in (0.5, 1.0)] == [3, 2]
