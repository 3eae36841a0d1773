"""What `flyte batch load` and workflows/load.py share: the plan, the batcher, the evidence, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import platform
import re
import types
from pathlib import Path
from typing import Any

import pytest
from virtual_time import in_virtual_time

import flyte_batch as fb
from flyte_batch.demo.problems import generate
from flyte_batch.load import Limit, ServiceLevel
from flyte_batch.load.measure import measure
from flyte_batch.load.plan import InteractiveBatching, LoadTest, plan_load_test, read_prompts
from flyte_batch.load.report import (
    TABLE_HEADER,
    LoadReport,
    conclusions,
    conditions,
    hardware,
    prepare_output,
    read_report,
    table_row,
    write_report,
)
from flyte_batch.replica import VARIABLE, ReplicaSettings
from flyte_batch.versions import versions
from tests.helpers import write_jsonl


class InlineThreads:
    """What `asyncio.to_thread` does, on the loop: virtual time does not know what threads do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("asyncio.to_thread", self)

    async def __call__(self, function: Any, /, *args: Any) -> Any:
        return function(*args)


@pytest.fixture(autouse=True)
def _inline_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    InlineThreads(monkeypatch)


def measured(test: LoadTest, engine: fb.FakeEngine) -> LoadReport:
    async def main() -> LoadReport:
        async with test.batching.batcher(engine, test.sampling) as batcher:

            async def solver() -> Any:
                return batcher

            return await measure(test, solver)

    return in_virtual_time(main())


def plan(**options: Any) -> LoadTest:
    return plan_load_test(engine="fake", **{"max_tokens": 16, **options})


# -- What is asked ---------------------------------------------------------


def test_without_a_source_the_problems_of_the_demo_are_asked() -> None:
    assert [prompt.text for prompt in read_prompts(plan(seed=5))] == [p.question for p in generate(1000, 5)]


def test_a_source_is_asked_by_its_template_and_at_most_a_thousand_rows_of_it(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": i, "text": f"t{i}"} for i in range(1200)])
    prompts = read_prompts(plan(source=source, prompt_template="{id}: {text}"))
    assert [prompt.text for prompt in prompts] == [f"{i}: t{i}" for i in range(1000)]
    assert read_prompts(plan(source=source, prompt_column="text"))[7].text == "t7"
    assert [prompt.text for prompt in read_prompts(plan(prompt="just this"))] == ["just this"]


def test_a_row_that_makes_no_prompt_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": "a"}, {"question": None}])
    with pytest.raises(
        fb.BadInput, match=r"row 1 .counted from 0. cannot be asked .column 'question' is null.*leave it out"
    ):
        read_prompts(plan(source=source))


def test_a_prompt_that_the_engine_refuses_is_named_before_the_load(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": "a"}, {"question": "b " * 5000}])
    engine = fb.FakeEngine()
    with pytest.raises(fb.BadInput, match=r"prompt 1 .counted from 0. cannot be asked .*5000 tokens"):
        measured(plan(source=source, rate_per_s=1.0), engine)
    assert engine.batches == []


def test_a_source_that_cannot_be_read_is_found_before_the_model_loads() -> None:
    async def solver() -> Any:
        raise AssertionError("the model was loaded")

    with pytest.raises(fb.BadInput, match=r"nope\.jsonl"):
        in_virtual_time(measure(plan(source="nope.jsonl"), solver))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fak"}, "unknown engine 'fak'"),
        ({"source": "a.jsonl", "prompt": "b"}, "both a source and a prompt"),
        ({"rate_per_s": -1.0}, "rate must be finite and above 0"),
        ({"start_per_s": 0.0}, "start_rate must be finite and above 0"),
        ({"timeout_s": 1.0}, "timeout_s .1. must be above the p99"),
        ({"precision": 0.0}, "precision must be finite and above 0"),
        ({"engine_options": '{"contxt": 3}'}, "no option 'contxt': did you mean context"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fb.BadInput, match=message):
        plan_load_test(**{"engine": "fake", **options})


# -- The batcher -----------------------------------------------------------


async def test_an_engine_with_continuous_batching_gets_a_continuous_batcher_and_both_reject() -> None:
    for engine, kind in ((fb.FakeEngine(), fb.EngineBatcher), (fb.FakeContinuousEngine(), fb.ContinuousBatcher)):
        batching = InteractiveBatching(max_queue_size=4)
        async with batching.batcher(engine, fb.SamplingParameters(max_tokens=4)) as batcher:
            assert isinstance(batcher, kind)
            with pytest.raises(fb.QueueFull):
                await batcher.submit_batch([engine.prepare(fb.Prompt("x"))] * 5)


async def test_callers_progress_alike() -> None:
    engine = fb.FakeEngine()
    async with InteractiveBatching(max_batch_size=4).batcher(engine, fb.SamplingParameters(max_tokens=4)) as batcher:
        await asyncio.gather(*(batcher.map([engine.prepare(fb.Prompt(caller))] * 8) for caller in "ab"))
    assert sorted(engine.batches[1]) == ["a", "a", "b", "b"]


def test_callers_share_batches_of_the_size_that_was_asked_for() -> None:
    engine = fb.FakeEngine(seconds_per_batch=0.1)
    report = measured(plan(rate_per_s=60.0, batching=InteractiveBatching(max_batch_size=8)), engine)
    assert report.is_kept
    sizes = [len(batch) for batch in engine.batches]
    assert max(sizes) == 8
    assert sum(sizes) == pytest.approx(60 * 25, abs=200)


def test_an_engine_with_continuous_batching_is_loaded_record_by_record() -> None:
    engine = fb.FakeContinuousEngine(slots=8, seconds_per_step=0.01)
    report = measured(plan(rate_per_s=30.0), engine)
    (step,) = report.limit.steps
    assert report.is_kept
    assert step.ok == step.requests < engine.finished  # those of the warm-up are not counted


# -- The evidence ----------------------------------------------------------


@pytest.fixture(scope="module")
def searched() -> LoadReport:
    with pytest.MonkeyPatch.context() as patch:
        InlineThreads(patch)
        return measured(
            plan(batching=InteractiveBatching(max_batch_size=10, max_queue_size=40)),
            fb.FakeEngine(seconds_per_batch=0.1),
        )


def test_a_search_finds_what_the_engine_can_do_and_says_what_it_rests_on(searched: LoadReport) -> None:
    kept = searched.limit.highest_kept_per_s
    assert kept is not None
    assert 80 < kept < 105
    assert searched.is_kept
    assert searched.prompts == 1000
    assert searched.versions["python"] == platform.python_version()
    assert {"flyte-batch", "flyte"} <= set(searched.versions)
    assert searched.hardware.cores > 0
    assert searched.test.choice.engine == "fake"
    assert searched.started_at.endswith("+00:00")


class TwoGpus(contextlib.nullcontext["TwoGpus"]):
    """A `GpuSampler` on a machine with two GPUs of a kind."""

    def __enter__(self) -> TwoGpus:
        return self

    def latest(self) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(name="NVIDIA L4")] * 2


def test_the_hardware_names_the_gpus_that_are_there_or_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise fb.BadInput("no driver")

    monkeypatch.setattr("flyte_batch.load.report.GpuSampler", no_gpu)
    assert hardware().gpus == ()
    assert re.search(r"^.+, \d+ cores?$", str(hardware()))
    monkeypatch.setenv(VARIABLE, ReplicaSettings("pool", gpu="A10G:1").variable()[VARIABLE])
    assert hardware().gpus == ("A10G:1",)
    monkeypatch.setattr("flyte_batch.load.report.GpuSampler", TwoGpus)
    assert str(hardware()).endswith(", 2 x NVIDIA L4")


def test_the_conditions_of_figures_are_one_line() -> None:
    said = conditions("pytest", "no-package-of-that-name")
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    assert re.fullmatch(rf"{re.escape(str(hardware()))}; load average [\d.]+; (.+), pytest {pytest.__version__}", said)
    assert f"; {named}, pytest" in said
    assert "no-package" not in said


def test_a_report_survives_being_written_and_read(searched: LoadReport, tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "load.json")
    prepare_output(path)
    write_report(searched, path)
    assert read_report(path) == searched
    assert json.loads(Path(path).read_text())["limit"]["highest_kept_per_s"] == searched.limit.highest_kept_per_s
    assert LoadTest.from_json(searched.test.to_json()) == searched.test


def test_what_is_no_report_is_refused_by_name(searched: LoadReport, tmp_path: Path) -> None:
    other_day = json.dumps(json.loads(searched.to_json()) | {"started_at": "yesterday"})
    for text in ("nonsense", "[]", "{}", '{"test": 1}', other_day):
        (tmp_path / "load.json").write_text(text)
        with pytest.raises(fb.BadInput, match=r"load\.json: this is no report of `flyte batch load"):
            read_report(str(tmp_path / "load.json"))
    with pytest.raises(fb.BadInput, match=r"no report of a load test at .*nope\.json"):
        read_report(str(tmp_path / "nope.json"))


def test_a_place_that_cannot_be_written_is_refused_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(fb.BadInput, match=r"is a folder: name a file in it, .*load\.json"):
        prepare_output(str(tmp_path))
    with pytest.raises(fb.BadInput, match="/proc/nope"):
        prepare_output("/proc/nope/load.json")


def test_a_row_of_the_table_has_40_columns_and_says_all_or_none_only_where_it_is_so(searched: LoadReport) -> None:
    step = dataclasses.replace(searched.limit.steps[0], requests=100_000, errors={}, unavailable={})
    assert re.search(r" 0% +100%$", table_row(step))
    step = dataclasses.replace(step, errors={"ValueError": 1}, unavailable={"QueueFull": 1}, rate_per_s=99_900.0)
    assert re.search(r"^ +99,900 .* 0\.01% +99\.99%$", table_row(step))
    every = [table_row(each) for each in searched.limit.steps]
    assert {len(row) for row in [TABLE_HEADER, *every]} == {40}
    assert all("*" in row for row, each in zip(every, searched.limit.steps, strict=True) if not each.is_kept)


def test_the_conclusion_says_where_the_level_breaks_and_why(searched: LoadReport) -> None:
    limit = searched.limit
    first, *_ = conclusions(searched)
    assert f"is kept up to {limit.highest_kept_per_s:g} requests/s, not at {limit.lowest_broken_per_s:g}: " in first
    assert "QueueFull" in first
    assert "p50 < 500 ms, p99 < 2000 ms, errors < 0.1%, availability > 99.9%" in first


def test_the_conclusion_says_what_so_few_requests_do_not_show_and_how_many_would(searched: LoadReport) -> None:
    report = measured(plan(rate_per_s=20.0), fb.FakeEngine(seconds_per_batch=0.1))
    kept = report.limit.steps[0]
    assert 299 < kept.requests < 2995
    text = " ".join(conclusions(report))
    assert "is kept at 20 requests/s." in text
    assert f"{kept.requests} requests do not show it for errors, availability with 95% confidence" in text
    assert "takes 2,995 without a bad one (--rate 20 --seconds 165)" in text
    longer = measured(plan(rate_per_s=20.0, seconds=165.0), fb.FakeEngine(seconds_per_batch=0.1))
    assert "do not show" not in " ".join(conclusions(longer))


def test_the_conclusion_says_that_arrivals_ran_late(searched: LoadReport) -> None:
    step = dataclasses.replace(searched.limit.steps[0], late_p99_ms=60.0, late_max_ms=80.0)
    late = dataclasses.replace(searched, limit=Limit.of([step]))
    assert any("Arrivals ran late (p99 60 ms, at most 80 ms)" in line for line in conclusions(late))
    assert not any("Arrivals" in line for line in conclusions(searched))


def test_the_conclusion_says_that_no_rate_is_kept() -> None:
    report = measured(plan(level=ServiceLevel(p50_ms=50)), fb.FakeEngine(seconds_per_batch=0.1))
    assert not report.is_kept
    assert "is not kept at 0.5 requests/s: p50 " in conclusions(report)[0]
