"""``python -m flyte_batch.demo`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flyte_batch.demo import model_path
from flyte_batch.demo.__main__ import main
from flyte_batch.demo.problems import Split, generate
from flyte_batch.errors import BadInput


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


ROWS: list[dict[str, str | None]] = [
    {"answer": "#### 3", "response": "1 + 2 = 3\n#### 3"},
    {"answer": "#### 4", "response": "#### 5"},
    {"answer": "#### 4", "response": None},
    {"answer": "#### 6", "response": "#### 6"},
]


class TestScore:
    def test_counts_a_failed_row_as_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, ROWS)))
        assert main(["score", str(path)]) == 0
        assert capsys.readouterr().out == "2 of 4 right (50.00%), 1 without a response\n"

    def test_reads_every_part_of_a_folder_and_nothing_unfinished(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "parts").mkdir()
        for at in range(3):
            pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "parts" / f"{at}.parquet")
        (tmp_path / "parts" / ".3.parquet").write_bytes(b"half")
        assert main(["score", str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith("6 of 12 right")

    def test_may_be_told_the_columns(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"expected": "#### 3", "said": "#### 3"}\n\n')
        assert main(["score", str(path), "--response", "said", "--answer", "expected"]) == 0
        assert capsys.readouterr().out == "1 of 1 right (100.00%)\n"

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ('{"answer": "#### 1"}', "no column 'response', only 'answer': name it with --response"),
            ("{", "rows.jsonl, line 1, is no JSON"),
            ("[1]", "line 1, is a list, not an object"),
            ("", "no rows to score"),
        ],
    )
    def test_says_what_is_wrong_with_a_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, why: str
    ) -> None:
        (tmp_path / "rows.jsonl").write_text(content)
        assert main(["score", str(tmp_path / "rows.jsonl")]) == 1
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1

    def test_says_what_is_wrong_with_a_path(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["score", str(tmp_path / "none")]) == 1
        assert "does not exist" in capsys.readouterr().err
        assert main(["score", str(tmp_path)]) == 1
        assert "holds no .jsonl or .parquet" in capsys.readouterr().err
        (tmp_path / "x.parquet").write_bytes(b"no parquet")
        assert main(["score", str(tmp_path)]) == 1
        assert "x.parquet is no Parquet file" in capsys.readouterr().err


def test_the_model_comes_in_two_formats_and_no_third() -> None:
    assert (model_path() / "model.bin").is_file()
    assert (model_path("hf") / "config.json").is_file()
    with pytest.raises(BadInput, match="ctranslate2 and hf"):
        model_path("gguf")  # type: ignore[arg-type]
