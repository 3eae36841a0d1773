"""A log that somebody else wrote, or that was damaged: a page of it, or an error that says what is wrong."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import flyte_batch as fb
from flyte_batch.cli.report import command
from flyte_batch.data.manifest import MANIFEST_FILE
from flyte_batch.report.history import LOG_FILE
from flyte_batch.report.keeper import PAGE_FILE
from flyte_batch.report.page import render_fragment, render_page
from flyte_batch.report.run_log import RunLog, logs_from_json, logs_to_json
from tests.helpers import questions
from tests.report.logs import gpu_use, make_log, make_plan, with_failures, with_stalls
from tests.report.parsing import parse

BAD: list[Any] = [
    None, True, "x", "", "<script>alert(1)</script>", -1, 0, 1e308, -1e308, 10**30, 10**400, float("nan"), float("inf"),
    1e-320, [], {}, [1], {"a": 1}, "\ud800", "\x00\x1b[31m",
]  # fmt: skip


def a_log() -> RunLog:
    log = make_log(chunks=3, gpus=(gpu_use(),), plan=make_plan(price_per_hour=1.5))
    return with_stalls(with_failures(log, BadRecord=3), ("f (a.py:1)", 2.0))


PLAIN = json.loads(logs_to_json([a_log()]))


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(node, dict):
        for key in node:
            yield from places(node[key], (*at, key))
    elif isinstance(node, list):
        for index in range(min(2, len(node))):
            yield from places(node[index], (*at, index))


def changed(place: tuple[Any, ...], value: Any) -> bytes:
    content = copy.deepcopy(PLAIN)
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return json.dumps(content).encode()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(places(PLAIN))), st.sampled_from(BAD))
def test_whatever_is_in_a_log_it_is_a_page_or_no_log(place: tuple[Any, ...], value: Any) -> None:
    try:
        logs = logs_from_json(changed(place, value))
    except ValueError:
        return
    if logs:
        assert not parse(render_page(logs)).all("script")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("plan", "rows"), 10**400),
        (("plan", "rows"), -1),
        (("plan", "concurrency"), 0),
        (("plan", "rows_per_s"), 0),
        (("started",), float("nan")),
        (("ended",), 1e308),
        (("rows",), 0),
        (("rows",), "x"),
        (("chunks", 0, 6), "x"),
        (("engines", 0, "samples", 0, 1), float("inf")),
        (("latencies",), {"x": 1}),
        (("causes",), []),
    ],
)
def test_what_nobody_can_reckon_with_is_no_log(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError):
        logs_from_json(changed(("runs", 0, *place), value))


def test_the_command_says_what_is_wrong_with_a_log_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LOG_FILE).write_bytes(changed(("runs", 0, "plan", "rows"), "many"))
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "can't be understood (not a log of runs: ValueError: plan.rows: Input should be a valid int" in caplog.text


@pytest.mark.parametrize(
    ("place", "value"),
    [(("format_version",), "\x1b[2J"), (("runs", 0, "latencies"), {"\x1b[2J\n": 1}), (("runs", 0), "\x1b[2J")],
)
def test_what_is_said_of_a_log_moves_no_cursor(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError) as raised:
        logs_from_json(changed(place, value))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", []),
        ("rows", 10**30),
        ("failures", 10**30),
        ("causes", True),
        ("causes", {"E": "\x1b[2J"}),
        ("rows", -1),
    ],
)
async def test_a_manifest_that_no_run_wrote_is_refused_in_one_line(tmp_path: Path, field: str, value: Any) -> None:
    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(fb.FakeEngine(), batch_timeout_s=0.001)

    async def answer(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    output = tmp_path / "out"
    await fb.run(questions(tmp_path / "in.jsonl", 20), str(output), answer, code_version="1", progress="off")
    (output / LOG_FILE).unlink()
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    manifest["parts"][0][field] = value
    (output / MANIFEST_FILE).write_text(json.dumps(manifest))
    result = CliRunner().invoke(command, [str(output)])
    assert isinstance(result.exception, SystemExit)
    assert "was written by no run of flyte_batch" in result.output
    assert len(result.output.splitlines()) == 1
    assert result.output.strip().isprintable()


def test_half_a_surrogate_pair_costs_no_report(tmp_path: Path) -> None:
    log = with_failures(a_log(), BadRecord=3)
    log.examples = [replace(log.examples[0], message="can't answer \ud83d")]
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([log]))
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "can&#39;t answer \\ud83d" in (tmp_path / PAGE_FILE).read_text()
    assert "can&#39;t answer \\ud83d" in render_fragment([log])


@pytest.mark.parametrize("levels", [30, 400, 900, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [('{"a":', "}"), ("[", "]")])
def test_settings_nested_as_deep_as_you_like_are_a_page_or_no_log(levels: int, opens: str, closes: str) -> None:
    nested = opens * levels + '{"hf_token":"seen"}' + closes * levels
    data = logs_to_json([replace(a_log(), settings={"deep": "HERE"})]).decode().replace('"HERE"', nested)
    try:
        logs = logs_from_json(data.encode())
    except ValueError:
        assert levels > 400
        return
    assert "seen" not in render_page(logs)


def test_a_secret_is_masked_wherever_it_is_nested() -> None:
    text = json.dumps({"hf_token": "seen"})
    for value in ([text], {"a": [text]}, functools.reduce(lambda inner, _: {"a": inner}, range(40), text)):
        assert "seen" not in render_page([replace(a_log(), settings={"deep": value})])


def test_a_time_that_no_calendar_has_and_one_without_an_end_are_unknown() -> None:
    log = make_log(started=1e14, ended=1e14 + 5, plan=make_plan(rows_per_s=1e-320))
    assert "unknown" in parse(render_page([log])).text
