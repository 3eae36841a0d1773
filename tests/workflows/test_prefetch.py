"""`flyte run --local workflows/prefetch.py main ...` as a user types it, and what `generate.py` makes of the copy."""

from __future__ import annotations

from pathlib import Path

import flyte_batch as fb
from flyte_batch.demo import model_path
from flyte_batch.demo.problems import generate, is_right
from tests.helpers import flyte_run, write_jsonl


def test_a_prefetched_model_is_used_by_its_folder_and_refused_while_a_file_is_missing(tmp_path: Path) -> None:
    folder, out = tmp_path / "models" / "demo", tmp_path / "out"
    prefetch = ("prefetch.py", "--model", str(model_path()), "--folder", str(folder))
    first = flyte_run(*prefetch)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "6 of them copied now" in first.stdout
    (folder / "model.bin").unlink()
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": p.question, "answer": p.answer} for p in generate(20, 5)])
    answer = ("generate.py", "--source", source, "--output", str(out), "--model", str(folder))
    refused = flyte_run(*answer)
    assert refused.returncode != 0
    assert "copied by half" in refused.stdout + refused.stderr
    again = flyte_run(*prefetch)
    assert "1 of them copied now" in again.stdout
    answered = flyte_run(*answer)
    assert answered.returncode == 0, answered.stdout + answered.stderr
    rows = fb.read_output(str(out)).to_pylist()
    assert sum(is_right(row["response"], row["answer"]) for row in rows) == 20


def test_what_cannot_be_copied_is_said_in_flytes_panel(tmp_path: Path) -> None:
    run = flyte_run("prefetch.py", "--model", "docs", "--folder", str(tmp_path / "models"))
    assert run.returncode != 0
    assert "there is no model in docs" in run.stdout + run.stderr
