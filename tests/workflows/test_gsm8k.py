"""`flyte run --local workflows/gsm8k.py main ...`: the well-known example, scored against the ground truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flyte_batch.demo.problems import generate
from tests.helpers import ROOT, flyte_run, write_jsonl
from tests.workflows.test_generate import panel

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"


def test_answers_come_by_chunk_and_the_accuracy_is_counted(tmp_path: Path) -> None:
    rows = [{"question": p.question, "answer": p.answer} for p in generate(55, 9_001)]
    rows[3]["answer"] = "a reference that nobody can reach\n#### 123456"
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run = flyte_run("gsm8k.py", "--num_questions", "50", "--chunk_size", "20", "--source", source)
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"50 questions in 3 chunks, 0 failed, (\d+) right: accuracy", run.stdout)
    assert found
    assert 48 <= int(found[1]) <= 49
    assert all(f"'chunk-000{i}'" in panel(run.stdout) for i in range(3))


@pytest.mark.parametrize(("option", "message"), [("num_questions", "num_questions"), ("chunk_size", "chunk_size")])
def test_numbers_below_one_are_refused(option: str, message: str) -> None:
    run = flyte_run("gsm8k.py", f"--{option}", "0")
    assert run.returncode != 0
    assert f"{message} must be at least 1" in panel(run.stdout)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's test questions are not beside this checkout")
def test_all_of_gsm8k_is_answered_and_scored_honestly() -> None:
    options = ["--num_questions", "1319", "--source", str(GSM8K), "--max_tokens", "64"]
    run = flyte_run("gsm8k.py", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"1,319 questions in 27 chunks, 0 failed, \d+ right: accuracy \d", run.stdout)


def test_a_question_that_is_null_costs_no_other_and_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (good,) = generate(1, 3)
    rows = [{"question": None, "answer": "#### 1"}, {"question": good.question, "answer": good.answer}]
    run = flyte_run("gsm8k.py", "--source", write_jsonl(tmp_path / "a.jsonl", rows))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 questions in 1 chunks, 1 failed, 1 right" in run.stdout
    assert "'chunk-0000': [None, '" in panel(run.stdout)
    assert re.search(r"utilization \d+\.\d%, \d+\.\d records in flight", run.stdout)
    run = flyte_run("gsm8k.py", "--source", write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "answer": 5}]))
    assert run.returncode != 0
    assert "column 'answer' of" in panel(run.stdout)
    run = flyte_run(
        "gsm8k.py", "--source", write_jsonl(tmp_path / "c.jsonl", rows[:1] * 2 + [{"question": " ", "answer": ""}])
    )
    assert run.returncode != 0
    assert "none of 3 questions was answered" in panel(run.stdout)
