"""Samples of answers: from the first parts, finished or not, with little reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flyte_batch as fb
from flyte_batch.data import storage
from flyte_batch.report.samples import MOST_CHARACTERS, SampleAnswer, sample_answers
from tests.helpers import questions
from tests.report.logs import make_log
from tests.report.outputs import write_output


def test_the_first_rows_of_the_first_parts_are_shown_with_answers_and_errors(tmp_path: Path) -> None:
    rows = [{"id": n, "question": f"question {n}"} for n in range(20)]
    write_output(tmp_path / "out", rows, failed=frozenset({4}))
    found = sample_answers(storage.locate(tmp_path / "out"), count=5)
    assert [each.row for each in found] == [0, 1, 4, 5, 8]
    assert found[0] == SampleAnswer(0, {"id": "0", "question": "question 0"}, "answer 0", None)
    assert (found[2].response, found[2].error) == (None, "BadRecord: bad 4")


async def test_answers_of_a_run_that_this_one_replaces_are_none_of_its_own(tmp_path: Path) -> None:
    """They lie beside its own until it commits, and are deleted then."""
    source, output = questions(tmp_path / "in.jsonl", 40), tmp_path / "out"
    seen: list[list[str | None]] = []

    def solving(word: str) -> Any:
        @fb.singleton
        async def solver() -> fb.EngineBatcher[Any, Any]:
            return fb.EngineBatcher(fb.FakeEngine(lambda _: word), batch_timeout_s=0.001)

        async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
            report = await fb.infer(chunk, solver, prompt="{question}")
            seen.append([each.response for each in sample_answers(storage.locate(output))])
            return report

        return infer_chunk

    await fb.run(source, str(output), solving("old"), chunk_size=10, settings={"word": "old"})
    options: Any = {"settings": {"word": "new"}, "overwrite": True, "concurrency": 1}
    await fb.run(source, str(output), solving("new"), chunk_size=10, **options)
    assert {word for words in seen[:4] for word in words} == {"old"}
    assert {word for words in seen[4:] for word in words} == {"new"}


@pytest.mark.parametrize("settings", [{"prompt": {"text": "Q: {f} {e}"}}, {"prompt": {"column": "f", "other": ["e"]}}])
def test_columns_that_the_prompt_reads_come_first_and_others_fill_up(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_output(tmp_path / "out", [{name: f"{name}!" for name in "abcdef"}])
    (found,) = sample_answers(storage.locate(tmp_path / "out"), make_log(settings=settings))
    assert list(found.columns) == ["e", "f", "a", "b"]


def test_pictures_are_not_read_and_long_texts_are_cut(tmp_path: Path) -> None:
    row = {"picture": b"\x89PNG" * 10, "pictures": [{"bytes": b"x"}], "text": "x" * 10_000, "turns": [{"role": "user"}]}
    write_output(tmp_path / "out", [row])
    (found,) = sample_answers(storage.locate(tmp_path / "out"))
    assert found.columns == {"text": "x" * (MOST_CHARACTERS - 1) + "…", "turns": '[{"role": "user"}]'}


def test_what_is_no_part_and_what_is_cut_off_is_left_out(tmp_path: Path) -> None:
    chunks = write_output(tmp_path / "out", [{"q": f"{n}"} for n in range(12)])
    first = tmp_path / "out" / chunks[0].part
    first.write_bytes(first.read_bytes()[:-20])
    pq.write_table(pa.table({"q": ["foreign"]}), tmp_path / "out" / "part-a.parquet")
    assert [each.row for each in sample_answers(storage.locate(tmp_path / "out"))] == [4, 5, 8, 9]


def test_a_folder_without_parts_or_that_is_not_there_has_no_answers(tmp_path: Path) -> None:
    assert sample_answers(storage.locate(tmp_path)) == []
    assert sample_answers(storage.locate(tmp_path / "missing")) == []
