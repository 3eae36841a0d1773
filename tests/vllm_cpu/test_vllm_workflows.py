"""`generate.py` and `gsm8k.py` as a user types them, with the real vLLM: whole runs, one of which loses its engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, flyte_run, write_jsonl

EAGER = '{"max_model_len": 512, "engine_args": {"enforce_eager": true, "distributed_executor_backend": "uni"}}'
TIMEOUT_S = 300.0


def problems(path: Path, count: int) -> str:
    return write_jsonl(path, [{"question": p.question, "answer": p.answer} for p in generate(count, 88_001)])


def test_generate_answers_a_dataset_right_and_a_bad_row_costs_no_other(tmp_path: Path) -> None:
    rows = [{"question": p.question, "answer": p.answer} for p in generate(300, 88_001)]
    rows[100]["question"] = "why? " * 2000
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), str(tmp_path / "out")
    run = flyte_run(
        "generate.py", "--source", source, "--output", out, "--engine", "vllm", "--engine_options", EAGER,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    table = fb.read_output(out).to_pylist()
    assert [row["question"] for row in table] == [row["question"] for row in rows]
    assert "tokens, the model's context" in table.pop(100)["error"] or "characters" in table[100]["error"]
    assert sum(is_right(row["response"], row["answer"]) for row in table) >= 296


def test_responses_have_the_form_that_was_asked_for(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    form = '{"structured": {"regex": "#### [0-9]{1,4}"}}'
    run = flyte_run(
        "generate.py", "--source", problems(tmp_path / "in.jsonl", 40), "--output", out, "--engine", "vllm",
        "--engine_options", EAGER, "--sampling_options", form, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    responses = fb.read_output(out)["response"].to_pylist()
    assert all(re.fullmatch("#### [0-9]{1,4}", response) for response in responses)


def test_an_engine_killed_in_the_middle_of_a_run_loses_no_row(tmp_path: Path) -> None:
    source, out = problems(tmp_path / "in.jsonl", 1200), tmp_path / "out"
    process = subprocess.Popen(
        [
            FLYTE, "run", "--local", "workflows/generate.py", "main", "--source", source, "--output", str(out),
            "--engine", "vllm", "--engine_options", EAGER, "--chunk_size", "50",
        ],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while len(list(out.glob("part-*"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    (core,) = cores_of(process.pid)
    os.kill(core, signal.SIGKILL)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert "building the engine anew" in said
    assert "failures=0" in said
    rows = fb.read_output(str(out)).to_pylist()
    assert [row["question"] for row in rows] == [p.question for p in generate(1200, 88_001)]
    assert sum(is_right(row["response"], row["answer"]) for row in rows) >= 1188
    assert not Path(f"/proc/{core}").exists()


def test_gsm8k_is_answered_and_scored_with_its_utilization(tmp_path: Path) -> None:
    source = problems(tmp_path / "in.jsonl", 100)
    run = flyte_run(
        "gsm8k.py", "--num_questions", "100", "--chunk_size", "10", "--source", source, "--engine", "vllm",
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"100 questions in 10 chunks, 0 failed, (\d+) right", run.stdout)
    assert found
    assert int(found[1]) >= 98
    running = re.search(r"utilization (\d+\.\d)%, (\d+\.\d) records in flight", run.stdout)
    assert running
    assert float(running[2]) > 20  # ten calls share one engine


def cores_of(pid: int) -> list[int]:
    """vLLM's engine cores among the descendants of a process."""
    found = []
    threads = Path(f"/proc/{pid}/task").glob("*/children")  # a child belongs to the thread that started it
    for child in (int(each) for thread in threads for each in thread.read_text().split()):
        name = Path(f"/proc/{child}/comm").read_text().strip()
        found += [child] if "EngineCor" in name else cores_of(child)
    return found
