"""What Flyte is told and tells: the report of a task, and whose work it is."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import flyte
import pytest

import flyte_batch as fb
from flyte_batch import flyte_ui
from flyte_batch.demo.problems import generate
from flyte_batch.monitoring.scope import new_scope
from tests.helpers import flyte_run, write_jsonl

names = fb.driver_environment("names")


@names.task
async def whose() -> tuple[str, str, str, str]:
    scope = new_scope()
    run, action = flyte_ui.action_names()
    return scope.run, scope.action, run, action


def test_a_run_leaves_its_report_where_flyte_shows_it(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": problem.question} for problem in generate(120, 4)])
    done = flyte_run("generate.py", "--source", source, "--output", str(tmp_path / "out"), "--chunk_size", "30")
    assert done.returncode == 0, done.stderr
    (folder,) = re.findall(r"Path: (\S+)", re.sub(r"\x1b\[[\d;]*m", "", done.stdout))
    (report,) = [path for path in Path(folder).rglob("report.html") if "fb-report" in path.read_text()]
    text = re.sub(r"<[^>]+>", " ", report.read_text())
    assert "120 rows answered" in re.sub(r"\s+", " ", text)
    assert "Where the time went" in text


def test_inside_a_task_work_is_its_actions_and_outside_nobodys() -> None:
    flyte.init()
    run, action, *same = flyte.run(whose).outputs()
    assert [run, action] == same
    assert action
    assert flyte_ui.action_names() == ("", "")


def test_outside_of_a_task_nothing_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(flyte_ui.publish("<p>hello</p>"))
    assert not list(tmp_path.rglob("*"))
