"""Changing the import is the whole migration: the ten-task program of Flyte's documentation runs, and runs well.

`tests/dropin/ten_tasks.py`, by ``flyte run --local``, with an engine whose calls block.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.demo.problems import Problem, generate, is_right
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, write_jsonl

PROGRAM = ROOT / "tests" / "dropin" / "ten_tasks.py"
PROBLEMS, TASKS = 500, 10
LONGEST_BLOCK_S = 0.05


@dataclass
class Run:
    """One run of the program: what it printed, answered and observed."""

    output: str
    answers: list[str]
    figures: dict[str, Any]

    def right(self, problems: list[Problem]) -> int:
        return sum(is_right(answer, p.answer) for answer, p in zip(self.answers, problems, strict=True))


def run_ten_tasks(problems: list[Problem], folder: Path, style: str, program: Path = PROGRAM) -> Run:
    source = write_jsonl(folder / "problems.jsonl", [{"question": problem.question} for problem in problems])
    figures, answers = folder / "figures.json", folder / "answers.json"
    done = subprocess.run(
        [FLYTE, "run", "--local", program.name, "main", "--source", source, "--style", style, "--tasks", str(TASKS),
         "--figures", str(figures), "--answers", str(answers)],
        cwd=program.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.stdout + done.stderr, json.loads(answers.read_text()), json.loads(figures.read_text()))


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(generate(PROBLEMS, 31))


@pytest.fixture(scope="module")
def plain(problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The program with a plain ``def`` as its function; the first of up to three runs that nothing disturbed.

    Code that blocks its loop does so in every run. The machine may do it in one: it takes the processor from a thread
    that holds the interpreter's lock, and the loop waits for that thread.
    """
    for _ in range(3):
        run = run_ten_tasks(problems, tmp_path_factory.mktemp("plain"), "def")
        if run.figures["longest_block_s"] <= LONGEST_BLOCK_S:
            break
    return run


def test_no_call_of_the_engine_holds_the_event_loop(plain: Run) -> None:
    assert plain.figures["longest_block_s"] <= LONGEST_BLOCK_S
    assert plain.figures["longest_call_s"] > 2 * LONGEST_BLOCK_S  # what it would be if a call held the loop
    assert plain.figures["beats"] > 10 * len(plain.figures["batches"])


def test_every_answer_is_right_and_at_its_place(plain: Run, problems: list[Problem]) -> None:
    assert plain.right(problems) >= 0.99 * PROBLEMS


def test_batches_hold_records_of_several_tasks(plain: Run) -> None:
    batches = plain.figures["batches"]
    assert sum(len(batch) for batch in batches) == PROBLEMS
    assert max(len(batch) for batch in batches) == 64
    assert sum(len(set(batch)) for batch in batches) / len(batches) > TASKS / 2


def test_the_statistics_are_what_the_engine_saw(plain: Run) -> None:
    figures, stats = plain.figures, plain.figures["stats"]
    assert (stats["total_submitted"], stats["total_completed"], stats["total_failed"]) == (PROBLEMS, PROBLEMS, 0)
    assert (stats["total_batches"], stats["total_batch_records"]) == (len(figures["batches"]), PROBLEMS)
    assert stats["avg_batch_size"] == pytest.approx(PROBLEMS / len(figures["batches"]))
    assert stats["busy_time_s"] == pytest.approx(figures["device_s"], abs=0.1 * figures["seconds"])
    assert stats["busy_time_s"] + stats["idle_time_s"] >= figures["seconds"]
    assert stats["utilization"] == pytest.approx(stats["busy_time_s"] / (stats["busy_time_s"] + stats["idle_time_s"]))
    assert stats["loop_blocked_s"] == 0


def test_a_blocking_async_def_as_in_flytes_example_is_survived_measured_and_named(
    problems: list[Problem], tmp_path: Path
) -> None:
    run = run_ten_tasks(problems, tmp_path, "async def")
    assert run.right(problems) >= 0.99 * PROBLEMS
    assert run.figures["longest_block_s"] >= run.figures["longest_call_s"] > 2 * LONGEST_BLOCK_S
    assert run.figures["stats"]["loop_blocked_s"] == pytest.approx(run.figures["device_s"], rel=0.1)
    assert re.search(r"generate_on_the_loop blocked the event loop for \d", run.output)


def test_with_the_import_changed_back_it_is_flytes_program_and_gives_the_same_answers(
    plain: Run, problems: list[Problem], tmp_path: Path
) -> None:
    """Otherwise it would prove nothing that it runs with ours."""
    ours, theirs = "from flyte_batch import TokenBatcher\n", "from flyte.extras import TokenBatcher\n"
    text = PROGRAM.read_text()
    assert text.count(ours) == 1
    (tmp_path / "flytes.py").write_text(text.replace(ours, theirs))
    run = run_ten_tasks(problems, tmp_path, "async def", program=tmp_path / "flytes.py")
    assert run.answers == plain.answers
    assert run.figures["longest_block_s"] > 2 * LONGEST_BLOCK_S
