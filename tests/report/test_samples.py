"""Samples of answers: from the first parts, finished or not, with little reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flyte_batch.data import storage
from flyte_batch.data.chunks import Chunk, plan_chunks, read_chunk
from flyte_batch.data.parts import write_part
from flyte_batch.data.sources import open_source
from flyte_batch.errors import BadRecord
from flyte_batch.records import Completion
from flyte_batch.report.samples import MOST_CHARACTERS, SampleAnswer, sample_answers
from tests.report.logs import make_log


def write_output(folder: Path, rows: list[dict[str, Any]], failed: frozenset[int] = frozenset()) -> list[Chunk]:
    """An output of four rows a chunk, without a manifest; rows are answered with their number, or fail."""
    folder.mkdir(parents=True)
    source = folder.parent / f"{folder.name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    chunks = plan_chunks(open_source(str(source)), str(folder), 4, settings={})
    for chunk in chunks:
        numbers = range(chunk.first_row, chunk.first_row + chunk.rows)
        results = [BadRecord(f"bad {n}") if n in failed else Completion(f"answer {n}", "stop", 5, 2) for n in numbers]
        write_part(chunk, read_chunk(chunk), results)
    return chunks


def test_the_first_rows_of_the_first_parts_are_shown_with_answers_and_errors(tmp_path: Path) -> None:
    rows = [{"id": n, "question": f"question {n}"} for n in range(20)]
    write_output(tmp_path / "out", rows, failed=frozenset({4}))
    found = sample_answers(storage.locate(tmp_path / "out"), count=5)
    assert [each.row for each in found] == [0, 1, 4, 5, 8]
    assert found[0] == SampleAnswer(0, {"id": "0", "question": "question 0"}, "answer 0", None)
    assert (found[2].response, found[2].error) == (None, "BadRecord: bad 4")


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
