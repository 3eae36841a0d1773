"""``python -m flyte_batch.demo`` as a user types it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.demo import model_path
from flyte_batch.demo.__main__ import main
from flyte_batch.demo.problems import Split, generate
from flyte_batch.errors import BadInput
from tests.helpers import write_jsonl


class TestProblems:
    def test_go_to_standard_output_as_jsonl(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["problems", "--count", "3", "--seed", "4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == [problem.to_json() for problem in generate(3, 4)]
        assert [sorted(json.loads(line)) for line in lines] == [["answer", "question"]] * 3

    def test_come_from_the_split_that_was_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["problems", "--count", "1", "--split", "train"]) == 0
        assert capsys.readouterr().out.strip() == next(generate(1, 0, Split.TRAIN)).to_json()

    def test_go_to_a_file_in_a_folder_that_need_not_exist(self, tmp_path: Path) -> None:
        output = tmp_path / "new" / "problems.jsonl"
        assert main(["problems", "--count", "5", "--output", str(output)]) == 0
        assert len(output.read_text().splitlines()) == 5
        assert list(output.parent.iterdir()) == [output]

    def test_the_same_seed_writes_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            main(["problems", "--count", "50", "--seed", "9", "--output", str(tmp_path / name)])
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_into_a_folder_is_an_error_that_names_a_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["problems", "--output", str(tmp_path)]) == 1
        assert (
            capsys.readouterr().err
            == f"error: {tmp_path} is a folder: name a file, for example {tmp_path}/problems.jsonl\n"
        )

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            (["--count", "many"], "'many' is not a whole number"),
            (["--count", "-1"], "-1 is negative"),
            (["--split", "validation"], "invalid choice"),
            (["--seed", "x"], "invalid int"),
        ],
    )
    def test_with_an_option_that_cannot_be_say_which(
        self, options: list[str], why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["problems", *options])
        assert caught.value.code == 2
        assert why in capsys.readouterr().err

    def test_stop_quietly_when_the_reader_has_seen_enough(self) -> None:
        command = [sys.executable, "-m", "flyte_batch.demo", "problems", "--count", "20000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline().startswith("{")
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0


class TestScore:
    @staticmethod
    def output(folder: Path, rows: list[dict[str, str | None]]) -> str:
        """A finished run over the rows whose engine says what the question says."""
        source = write_jsonl(folder / "in.jsonl", rows)

        @fb.singleton
        async def solver() -> fb.EngineBatcher[Any, Any]:
            return fb.EngineBatcher(fb.FakeEngine(lambda text: text))

        async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
            return await fb.infer(chunk, solver, prompt="{question}")

        asyncio.run(fb.run(source, str(folder / "out"), infer_chunk, chunk_size=2))
        return str(folder / "out")

    def test_counts_a_failed_row_as_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = [("1 + 2 = 3\n#### 3", "#### 3"), ("#### 5", "#### 4"), (None, "#### 4"), ("#### 1,006", "#### 1006")]
        output = self.output(tmp_path, [{"question": question, "answer": answer} for question, answer in said])
        assert main(["score", output]) == 0
        assert capsys.readouterr().out.endswith("\n2 of 4 right (50.00%), 1 without a response\n")

    def test_may_be_told_the_column_of_the_reference(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = self.output(tmp_path, [{"question": "#### 3", "expected": "#### 3"}])
        assert main(["score", output, "--answer", "expected"]) == 0
        assert capsys.readouterr().out.endswith("\n1 of 1 right (100.00%)\n")
        assert main(["score", output]) == 1
        assert "no column 'answer'" in capsys.readouterr().err

    def test_refuses_what_is_no_finished_output(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for folder, why in ((tmp_path, "is not finished"), (tmp_path / "none", "no such output folder")):
            assert main(["score", str(folder)]) == 1
            error = capsys.readouterr().err
            assert why in error
            assert error.count("\n") == 1


def test_the_model_comes_in_two_formats_and_no_third() -> None:
    assert (model_path() / "model.bin").is_file()
    assert (model_path("hf") / "config.json").is_file()
    with pytest.raises(BadInput, match="ctranslate2 and hf"):
        model_path("gguf")  # type: ignore[arg-type]
