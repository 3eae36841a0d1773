"""`flyte run --local workflows/generate.py main ...` as a user types it, with the demo model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, flyte_run, questions, write_jsonl

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"


def problems(path: Path, count: int, seed: int = 77_001) -> str:
    return write_jsonl(path, [{"question": p.question, "answer": p.answer} for p in generate(count, seed)])


def panel(output: str) -> str:
    """The text of flyte's last panel, in one line."""
    lines = re.findall(r"│(.*)│", output)
    return " ".join(" ".join(lines).split())


def right_share(output: Path) -> float:
    rows = fb.read_output(str(output)).to_pylist()
    return sum(is_right(row["response"], row["answer"]) for row in rows) / len(rows)


def test_problems_that_nobody_saw_are_answered_right_in_order_with_a_summary(tmp_path: Path) -> None:
    source = problems(tmp_path / "in.jsonl", 600)
    run = flyte_run("generate.py", "--source", source, "--output", str(tmp_path / "out"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "600/600 rows (100%)" in run.stdout
    assert "rows=600, failures=0" in panel(run.stdout)
    table = fb.read_output(str(tmp_path / "out"))
    assert table.column_names == [
        "question", "answer", "response", "finish_reason", "error", "prompt_tokens", "response_tokens"
    ]  # fmt: skip
    assert table["question"].to_pylist() == [p.question for p in generate(600, 77_001)]
    assert right_share(tmp_path / "out") >= 0.99


def test_a_run_killed_half_way_is_finished_by_the_same_command_and_nothing_done_is_repeated(tmp_path: Path) -> None:
    source, out = problems(tmp_path / "in.jsonl", 1500), tmp_path / "out"
    command = ["--source", source, "--output", str(out), "--chunk_size", "50"]
    process = subprocess.Popen(
        [FLYTE, "run", "--local", "workflows/generate.py", "main", *command], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while len(list(out.glob("part-*"))) < 15:
            assert process.poll() is None, process.communicate()[0]
            os.sched_yield()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    parts = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 15 <= len(parts) < 30
    assert not (out / "_manifest.json").exists()
    again = flyte_run("generate.py", *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"chunks=30, chunks_reused={len(parts)}" in panel(again.stdout)
    assert {name: (out / name).stat().st_mtime_ns for name in parts} == parts
    command[3] = str(tmp_path / "undisturbed")
    assert flyte_run("generate.py", *command).returncode == 0
    assert fb.read_output(str(out)).equals(fb.read_output(str(tmp_path / "undisturbed")))


def test_a_null_and_an_oversized_prompt_become_failure_rows_and_the_others_are_answered(tmp_path: Path) -> None:
    (good,) = generate(1, 5)
    rows = [{"question": good.question}, {"question": None}, {"question": "why? " * 5000}, {"question": good.question}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run = flyte_run("generate.py", "--source", source, "--output", str(tmp_path / "out"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rows=4, failures=2" in panel(run.stdout)
    table = fb.read_output(str(tmp_path / "out"))
    assert [error is None for error in table["error"].to_pylist()] == [True, False, False, True]
    assert [response is None for response in table["response"].to_pylist()] == [False, True, True, False]


def _broken(path: Path) -> str:
    path.write_text('{"question": "a"}\n{"question": "b"}\n{"question": \n')
    return str(path)


def _text(path: Path) -> str:
    path.write_text("no parquet at all\n")
    return str(path)


def _empty(path: Path) -> str:
    path.write_text("")
    return str(path)


def _folder(path: Path) -> str:
    path.mkdir()
    return str(path)


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing file": (lambda p: ["--source", str(p / "nope.jsonl")], r"nope\.jsonl"),
    "empty file": (lambda p: ["--source", _empty(p / "empty.jsonl")], r"empty\.jsonl.*no rows"),
    "unknown column": (lambda p: ["--prompt_column", "questoin"], r"no column 'questoin'.*did you mean 'question'"),
    "unknown template column": (lambda p: ["--prompt_template", "{nope}"], r"no column 'nope'"),
    "broken JSON": (lambda p: ["--source", _broken(p / "broken.jsonl")], r"broken\.jsonl.*line 3"),
    "not Parquet": (lambda p: ["--source", _text(p / "text.parquet")], r"text\.parquet.*Parquet"),
    "unwritable output": (lambda p: ["--output", "/proc/nope"], r"/proc/nope"),
    "no time": (lambda p: ["--chunk_timeout_s", "0"], r"chunk_timeout_s must be a positive number of seconds"),
    "no speed": (lambda p: ["--rows_per_s", "-5"], r"rows_per_s must be a positive number"),
    "chunk size 0": (lambda p: ["--chunk_size", "0"], r"chunk_size must be at least 1"),
    "unknown engine": (lambda p: ["--engine", "ctranslate"], r"unknown engine 'ctranslate'.*did you mean ctranslate2"),
    "no model there": (lambda p: ["--model", _folder(p / "model")], r"holds no model.*model\.bin"),
    "no such model": (lambda p: ["--model", str(p / "nothing")], r"there is no folder"),
    "max_tokens 0": (lambda p: ["--max_tokens", "0"], r"max_tokens must be at least 1"),
    "temperature below 0": (lambda p: ["--temperature", "-1"], r"temperature must be 0"),
    "unknown engine option": (
        lambda p: ["--engine_options", '{"compute": "int8"}'],
        r"no option 'compute'.*compute_type",
    ),
    "engine options no JSON": (lambda p: ["--engine_options", "int8"], r"--engine_options is no JSON"),
    "unknown sampling option": (lambda p: ["--sampling_options", '{"topp": 1}'], r"'topp': did you mean top_p"),
    "an engine without schemas": (lambda p: ["--json_schema", "{}"], r"CTranslate2 engine has no structured.*vLLM"),
    "no such schema": (lambda p: ["--json_schema", "nope.json"], r"--json_schema nope\.json.*no file"),
    "unknown messages column": (lambda p: ["--messages_column", "turns"], r"no column 'turns'"),
    "vllm missing": (lambda p: ["--engine", "vllm"], r"the engine vllm needs vllm, not installed here"),
    "failure rate": (lambda p: ["--max_failure_rate", "2"], r"max_failure_rate must be between 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_an_exit_code_before_the_model_loads(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    options = ["--source", questions(tmp_path / "in.jsonl", 3), "--output", str(tmp_path / "out"), *make(tmp_path)]
    run = flyte_run("generate.py", *options, PYTHONPROFILEIMPORTTIME="1")  # lists the imports on standard error
    assert run.returncode != 0
    assert re.search(message, panel(run.stdout)), run.stdout + run.stderr
    imported = set(re.findall(r"\|\s+([\w.]+)$", run.stderr, re.MULTILINE))
    assert "flyte_batch.engines" in imported
    assert not {"ctranslate2", "tokenizers"} & imported
    assert "Execution failed" in panel(run.stdout)
    assert not list(tmp_path.glob("out/part-*"))
    assert not list(tmp_path.glob("out/_manifest.json"))


def test_the_fake_engine_answers_without_a_model(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 10)
    options = ["--engine", "fake", "--limit", "4", "--prompt_template", "say {id}", "--columns", "id"]
    run = flyte_run("generate.py", "--source", source, "--output", str(tmp_path / "out"), *options)
    assert run.returncode == 0, run.stdout + run.stderr
    table = fb.read_output(str(tmp_path / "out"), columns=["id", "response"])
    assert table.to_pylist() == [{"id": i, "response": f"echo: say {i}"} for i in range(4)]


def test_conversations_are_asked_with_the_sampling_and_engine_options_given(tmp_path: Path) -> None:
    (problem,) = generate(1, 5)
    turns = [{"role": "user", "content": problem.question}]
    source = write_jsonl(tmp_path / "in.jsonl", [{"turns": turns}, {"turns": []}])
    options = ["--messages_column", "turns", "--sampling_options", '{"stop": ["####"]}', "--engine_options"]
    out = str(tmp_path / "out")
    run = flyte_run("generate.py", "--source", source, "--output", out, *options, '{"compute_type": "float32"}')
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = fb.read_output(out).to_pylist()
    assert "=" in first["response"]
    assert "####" not in first["response"]
    assert "the conversation is empty" in second["error"]


def test_parquet_folders_and_globs_are_sources_too(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(pa.table({"question": [f"{name}{i}" for i in range(3)]}), tmp_path / f"{name}.parquet")
    for source in (str(tmp_path), str(tmp_path / "*.parquet")):
        out = tmp_path / "out" / str(len(source))
        run = flyte_run("generate.py", "--source", source, "--output", str(out), "--engine", "fake")
        assert run.returncode == 0, run.stdout + run.stderr
        assert fb.read_output(str(out))["question"].to_pylist() == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's test questions are not beside this checkout")
def test_every_gsm8k_question_gets_an_answer_in_order(tmp_path: Path) -> None:
    run = flyte_run("generate.py", "--source", str(GSM8K), "--output", str(tmp_path / "out"), "--max_tokens", "64")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rows=1319, failures=0" in panel(run.stdout)
    asked = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    assert fb.read_output(str(tmp_path / "out"))["question"].to_pylist() == asked
