"""Each alert fires when it should, and not otherwise: promtool plays them against series of numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from flyte_batch.errors import BadInput
from flyte_batch.monitoring import metrics
from flyte_batch.monitoring.alerts import Thresholds, rules
from tests.monitoring.tools import promtool

RULES = {rule["alert"]: rule for group in yaml.safe_load(rules())["groups"] for rule in group["rules"]}
REPLICA = 'job="pool",instance="r1"'


@dataclass(frozen=True)
class Case:
    """Series of one value a minute, and when the alert fires.

    Attributes:
        alert: which.
        why: what this case shows.
        series: name and labels -> values in promtool's notation: ``0+5x10`` counts by 5, ten times.
        fires: at these minutes.
        silent: at these it does not.
        labels: of the alert, beside its severity.
        summary: what it says when it fires.
    """

    alert: str
    why: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    labels: tuple[tuple[str, str], ...] = (("job", "pool"),)
    summary: str = ""


ON_REPLICA = (("job", "pool"), ("instance", "r1"))
RECORDS = f'flyte_batch_records_total{{{REPLICA},engine="VLLMEngine",outcome="%s"}}'
SUBMITTED = f'flyte_batch_records_submitted_total{{{REPLICA},engine="VLLMEngine"}}'
EXPIRED = f'flyte_batch_records_expired_total{{{REPLICA},engine="VLLMEngine"}}'
ROWS = f'flyte_batch_rows_total{{{REPLICA},outcome="%s"}}'
DEVICE = f'flyte_batch_device_seconds_total{{{REPLICA},engine="VLLMEngine",state="%s"}}'
CHUNKS = f"flyte_batch_chunks_running{{{REPLICA}}}"
RUNS = f"flyte_batch_runs_running{{{REPLICA}}}"
RUN_DONE = f"flyte_batch_run_rows_done{{{REPLICA}}}"
DEATHS = f'flyte_batch_engine_deaths_total{{{REPLICA},engine="VLLMEngine"}}'
BLOCKED = f"flyte_batch_loop_blocked_seconds_sum{{{REPLICA}}}"
LATENCY = f'flyte_batch_record_latency_seconds_bucket{{{REPLICA},engine="VLLMEngine",caller="%s",le="%s"}}'


def latencies(caller: str, **counts: str) -> dict[str, str]:
    return {LATENCY % (caller, bound.strip("_")): values for bound, values in counts.items()}


CASES = [
    Case(
        "FlyteBatchErrorRate", "a tenth of the records that were not taken back fails, after five minutes of it",
        {RECORDS % "ok": "0+90x40", RECORDS % "failed": "0+10x40", RECORDS % "abandoned": "0+200x40"},
        fires=(15, 30), silent=(3,),
        summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchErrorRate", "rows that fail before or after the engine count, where records are fine",
        {ROWS % "ok": "0+90x40", ROWS % "failed": "0+10x40", RECORDS % "ok": "0+90x40", RECORDS % "failed": "0x40"},
        fires=(15, 30),
        summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchErrorRate", "both are one alert",
        {ROWS % "ok": "0+90x40", ROWS % "failed": "0+10x40", RECORDS % "ok": "0+90x40", RECORDS % "failed": "0+10x40"},
        fires=(15, 30),
        summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchErrorRate", "one in a hundred may fail, and abandoned ones did not",
        {RECORDS % "ok": "0+99x40", RECORDS % "failed": "0+1x40", RECORDS % "abandoned": "0+100x40"}, silent=(15, 30),
    ),
    Case(
        "FlyteBatchErrorRate", "what a dead engine lost is asked again",
        {RECORDS % "ok": "0+99x40", RECORDS % "failed": "0+1x40", RECORDS % "lost": "0x10 5000x30"}, silent=(15, 30),
    ),
    Case(
        "FlyteBatchErrorRate", "callers that get nothing in time, from an engine that gives records back",
        {SUBMITTED: "0+100x40", EXPIRED: "0+10x40", RECORDS % "ok": "0x40", RECORDS % "abandoned": "0+100x40"},
        fires=(15, 30), summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchErrorRate", "one in a hundred may be late",
        {SUBMITTED: "0+100x40", EXPIRED: "0+1x40", RECORDS % "ok": "0+100x40"}, silent=(15, 30),
    ),
    Case(
        "FlyteBatchErrorRate", "it ends when they fail no more",
        {RECORDS % "ok": "0+90x60", RECORDS % "failed": "0+10x20 200x40"}, fires=(20,), silent=(35, 50),
        summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchErrorRate", "the one replica that fails them all is not lost among others",
        {
            RECORDS % "ok": "0+90x40",
            RECORDS.replace("r1", "r2") % "ok": "0x40", RECORDS.replace("r1", "r2") % "failed": "0+10x40",
        },
        fires=(15, 30),
        summary="10% of the records of pool fail.",
    ),
    Case(
        "FlyteBatchStarved", "chunks are there, and the device is free most of the time",
        {DEVICE % "busy": "0+15x60", DEVICE % "starved": "0+45x60", CHUNKS: "4x60"},
        fires=(20, 50), silent=(10,), labels=ON_REPLICA,
        summary="r1 has chunks, and nothing to do 75% of the time.",
    ),
    Case(
        "FlyteBatchStarved", "without chunks a replica has every right to be free",
        {DEVICE % "busy": "0x60", DEVICE % "starved": "0+60x60", CHUNKS: "0x60"}, silent=(20, 50),
    ),
    Case(
        "FlyteBatchStarved", "a busy device is not starved",
        {DEVICE % "busy": "0+50x60", DEVICE % "starved": "0+10x60", CHUNKS: "4x60"}, silent=(20, 50),
    ),
    Case(
        "FlyteBatchRunStalled", "a run is under way for more than an hour without a row",
        {RUNS: "1x100", RUN_DONE: "500x100"}, fires=(65, 90), silent=(55,),
        summary="A run of pool is under way, and gets no row done.",
    ),
    Case(
        "FlyteBatchRunStalled", "rows that come every half hour are progress",
        {RUNS: "1x200", RUN_DONE: "0x30 100x30 200x30 300x30 400x30 500x30"}, silent=(65, 90, 150),
    ),
    Case(
        "FlyteBatchRunStalled", "a run that is over makes no progress",
        {RUNS: "1x10 0x100", RUN_DONE: "0+10x10 100x100"}, silent=(65, 100),
    ),
    Case(
        "FlyteBatchReplicaStalled", "chunks, and no record done for an hour",
        {CHUNKS: "4x100", RECORDS % "ok": "700x100", RECORDS % "failed": "0x100"},
        fires=(65, 90), silent=(55,), labels=ON_REPLICA,
        summary="r1 has chunks, and gets no record done.",
    ),
    Case(
        "FlyteBatchReplicaStalled", "an engine that never comes up has no records at all",
        {CHUNKS: "4x100"}, fires=(65, 90), silent=(55,), labels=ON_REPLICA,
        summary="r1 has chunks, and gets no record done.",
    ),
    Case(
        "FlyteBatchReplicaStalled", "a record now and then is progress, a failed one too",
        {CHUNKS: "4x100", RECORDS % "ok": "0x30 1x70", RECORDS % "failed": "0x60 1x40"}, silent=(65, 85),
    ),
    Case(
        "FlyteBatchReplicaStalled", "no chunks, no alert",
        {CHUNKS: "0x100", RECORDS % "ok": "7x100"}, silent=(65, 90),
    ),
    Case(
        "FlyteBatchEngineRestarts", "two deaths within an hour",
        {DEATHS: "0x10 1x10 2x100"}, fires=(30,), silent=(15,),
        summary="2 engines of pool died within an hour.",
    ),
    Case("FlyteBatchEngineRestarts", "one is bad luck", {DEATHS: "0x10 1x100"}, silent=(11, 15, 30, 60)),
    Case("FlyteBatchEngineRestarts", "two in two hours are, too", {DEATHS: "0x10 1x70 2x70"}, silent=(30, 79, 100)),
    Case(
        "FlyteBatchLatency", "two of a hundred take between 2 and 5 seconds",
        latencies("direct", _2="0+98x30", _5="0+100x30", **{"+Inf": "0+100x30"}), fires=(10, 25), silent=(2,),
        summary="1% of the records of direct callers of pool take 3.5s or more.",
    ),
    Case(
        "FlyteBatchLatency", "all are quick",
        latencies("direct", _2="0+100x30", _5="0+100x30", **{"+Inf": "0+100x30"}), silent=(10, 25),
    ),
    Case(
        "FlyteBatchLatency", "records of chunks wait by the thousand on purpose",
        latencies("chunk", _2="0x30", _5="0x30", _600="0+100x30", **{"+Inf": "0+100x30"}), silent=(10, 25),
    ),
    Case(
        "FlyteBatchLoopBlocked", "a tenth of the time and more",
        {BLOCKED: "0+12x30"}, fires=(15, 25), labels=ON_REPLICA,
        summary="The event loop of r1 stands still 20% of the time.",
    ),
    Case(
        "FlyteBatchLoopBlocked", "one long stall counts when it is over",
        {BLOCKED: "0x10 120x30"}, fires=(12, 18), silent=(9, 30), labels=ON_REPLICA,
        summary="The event loop of r1 stands still 20% of the time.",
    ),
    Case("FlyteBatchLoopBlocked", "a second now and then", {BLOCKED: "0+1x30"}, silent=(5, 25)),
]  # fmt: skip


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "alerts.yml"
    file.write_text(rules())
    return file


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.why}")
def test_an_alert_fires_when_it_should_and_only_then(case: Case, rule_file: Path, tmp_path: Path) -> None:
    rule = RULES[case.alert]
    alert = {
        "exp_labels": {**dict(case.labels), **rule["labels"]},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{minute}m",
                "alertname": case.alert,
                "exp_alerts": [alert] if minute in case.fires else [],
            }
            for minute in (*case.fires, *case.silent)
        ],
    }
    test_file = tmp_path / "test.yml"
    test_file.write_text(yaml.safe_dump({"rule_files": [str(rule_file)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", str(test_file))


def test_each_alert_is_seen_to_fire_and_not_to_fire() -> None:
    fired = {case.alert for case in CASES if case.fires}
    silent = {case.alert for case in CASES if not case.fires}
    assert fired == silent == set(RULES)


def test_promtool_finds_no_fault_in_the_rules(rule_file: Path) -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", str(rule_file))


@pytest.mark.parametrize("name", RULES)
def test_each_alert_says_what_is_wrong_and_what_to_do(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "remedy"}
    for text in rule["annotations"].values():
        assert re.fullmatch(r"\S.*\.", text)
    known = {
        f"{metric.name}{suffix}"
        for metric in metrics.METRICS
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    assert set(re.findall(r"flyte_batch_\w+", rule["expr"])) <= known


def test_thresholds_come_where_they_belong() -> None:
    given = Thresholds(
        error_rate=0.011, starved=0.022, no_progress_s=33.3, engine_deaths=44, p99_latency_s=5.5, loop_blocked=0.066
    )
    found = {rule["alert"]: rule for rule in yaml.safe_load(rules(given))["groups"][0]["rules"]}
    assert found["FlyteBatchErrorRate"]["expr"].count("> 0.011") == 3
    assert "> 0.022" in found["FlyteBatchStarved"]["expr"]
    assert found["FlyteBatchRunStalled"]["for"] == found["FlyteBatchReplicaStalled"]["for"] == "34s"
    assert ">= 44" in found["FlyteBatchEngineRestarts"]["expr"]
    assert "> 5.5" in found["FlyteBatchLatency"]["expr"]
    assert "> 0.066" in found["FlyteBatchLoopBlocked"]["expr"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"error_rate": 0}, {"error_rate": 1}, {"starved": 50}, {"no_progress_s": 0}, {"engine_deaths": -1},
        {"p99_latency_s": float("inf")}, {"loop_blocked": float("nan")},
    ],
)  # fmt: skip
def test_a_threshold_that_makes_no_sense_is_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=name):
        replace(Thresholds(), **wrong)
