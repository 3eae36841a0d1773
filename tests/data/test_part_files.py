from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from flyte_batch.data import storage
from flyte_batch.data.chunks import RESULT_COLUMNS, Chunk, plan_chunks, read_chunk
from flyte_batch.data.parts import MAX_ERROR_CHARACTERS, PartInfo, read_part_info, write_part
from flyte_batch.data.sources import open_source
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES, BadRecord
from flyte_batch.records import Completion


@pytest.fixture
def chunk(tmp_path: Path, write_rows: Any) -> Chunk:
    path = write_rows("a.jsonl", [{"n": n, "tags": ["é"]} for n in range(3)])
    (tmp_path / "out").mkdir()
    return plan_chunks(open_source(str(path)), str(tmp_path / "out"), 3, settings={"model": "m"})[0]


RESULTS = [
    Completion("one", "stop", 5, 1),
    BadRecord("too long: 9000 tokens"),
    Completion("three\ud800", "length", 7, 3),
]


def info_of(chunk: Chunk, checked_against: Chunk | None = None) -> PartInfo | None:
    return read_part_info(storage.locate(chunk.output).child(chunk.part), checked_against or chunk)


def test_a_part_holds_the_sources_columns_then_the_results_in_source_order(chunk: Chunk) -> None:
    info = write_part(chunk, read_chunk(chunk), RESULTS)
    table = pq.read_table(Path(chunk.output) / info.name)
    assert table.column_names == ["n", "tags", *RESULT_COLUMNS]
    assert table.to_pylist() == [
        {"n": 0, "tags": ["é"], "response": "one", "finish_reason": "stop", "error": None}
        | {"prompt_tokens": 5, "response_tokens": 1},
        {"n": 1, "tags": ["é"], "response": None, "finish_reason": None, "error": "BadRecord: too long: 9000 tokens"}
        | {"prompt_tokens": None, "response_tokens": None},
        {"n": 2, "tags": ["é"], "response": "three?", "finish_reason": "length", "error": None}
        | {"prompt_tokens": 7, "response_tokens": 3},
    ]


def test_the_footer_alone_says_which_chunk_it_is_and_what_it_counts(chunk: Chunk) -> None:
    info = write_part(chunk, read_chunk(chunk), RESULTS)
    size = (Path(chunk.output) / info.name).stat().st_size
    contents = {"BadRecord": 1}, {"6": 1, "8": 1}, {"1": 1, "3": 1}
    assert info == PartInfo(chunk.part, chunk.id, 0, 3, 1, 12, 4, size, *contents)
    assert info_of(chunk) == info


def test_the_name_sorts_in_source_order_and_names_the_content(chunk: Chunk) -> None:
    assert chunk.part == f"part-000000000000-{chunk.id[:16]}.parquet"
    assert replace(chunk, first_row=999).part < replace(chunk, first_row=10_000).part


def test_the_same_rows_and_results_give_the_same_bytes(chunk: Chunk) -> None:
    path = Path(chunk.output) / chunk.part
    write_part(chunk, read_chunk(chunk), RESULTS)
    first = path.read_bytes()
    write_part(chunk, read_chunk(chunk), RESULTS)
    assert path.read_bytes() == first
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_parts_share_one_schema_even_when_a_chunk_has_nothing_but_nulls_or_failures(
    tmp_path: Path, write_rows: Any
) -> None:
    path = write_rows("a.jsonl", [{"n": None, "m": None}, {"n": 1, "m": {"k": [1.5]}}])
    (tmp_path / "out").mkdir()
    chunks = plan_chunks(open_source(str(path)), str(tmp_path / "out"), 1, settings={})
    for one, result in zip(chunks, [ValueError("x"), Completion("y", "stop", 1, 1)], strict=True):
        write_part(one, read_chunk(one), [result])
    schemas = [pq.read_schema(tmp_path / "out" / one.part).remove_metadata() for one in chunks]
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None], pa.timestamp("us", "UTC")),
        pa.array([b"\xff", None]),
        pa.array([[{"a": 1}], None]),
        pa.array([{"a": {"b": "x"}}, None]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.array([1, None], pa.decimal128(20, 3)),
        pa.array(["a", None]).dictionary_encode(),
        pa.array(["a", None], pa.large_string()),
        pa.array([[1, 2], None], pa.list_(pa.float32(), 2)),
        pa.nulls(2),
    ],
    ids=lambda column: str(column.type),
)
def test_every_kind_of_parquet_column_travels_through_to_the_part(tmp_path: Path, column: pa.Array[Any]) -> None:
    pq.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
    (chunk,) = plan_chunks(open_source(str(tmp_path / "a.parquet")), str(tmp_path / "out"), 5, settings={})
    (tmp_path / "out").mkdir()
    write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)] * 2)
    assert pq.read_table(tmp_path / "out" / chunk.part)["c"].to_pylist() == column.to_pylist()
    assert info_of(chunk) is not None


def test_of_many_classes_of_errors_the_most_frequent_are_told_apart_and_the_others_are_counted_together(
    tmp_path: Path, write_rows: Any
) -> None:
    names = [f"E{n:02}" for n in range(30)] + ["E29", "E29", "E28", OTHER_CAUSES, OTHER_CAUSES, OTHER_CAUSES]
    path = write_rows("a.jsonl", [{"n": n} for n in range(len(names))])
    (tmp_path / "out").mkdir()
    (chunk,) = plan_chunks(open_source(str(path)), str(tmp_path / "out"), 99, settings={})
    write_part(chunk, read_chunk(chunk), [type(name, (Exception,), {})("no") for name in names])
    info = info_of(chunk)
    assert info is not None
    once = [f"E{n:02}" for n in range(MOST_CAUSES - 2)]
    assert list(info.causes.items()) == [
        ("E29", 3), ("E28", 2), *((name, 1) for name in once), (OTHER_CAUSES, 30 - MOST_CAUSES + 3),
    ]  # fmt: skip


def test_an_endless_error_message_is_cut(chunk: Chunk) -> None:
    write_part(chunk, read_chunk(chunk), [ValueError("x" * 10**6)] * 3)
    errors = pq.read_table(Path(chunk.output) / chunk.part)["error"].to_pylist()
    assert max(map(len, errors)) == MAX_ERROR_CHARACTERS + len("...")


def test_rows_or_results_that_are_not_the_chunks_are_refused_before_anything_is_written(chunk: Chunk) -> None:
    rows = read_chunk(chunk)
    with pytest.raises(ValueError, match="3 rows, got 3 rows, 2 results"):
        write_part(chunk, rows, RESULTS[:2])
    with pytest.raises(ValueError, match="got 2 rows"):
        write_part(chunk, rows.slice(0, 2), RESULTS)
    with pytest.raises(ValueError, match="has the columns"):
        write_part(chunk, rows.select(["tags", "n"]), RESULTS)
    assert list(Path(chunk.output).iterdir()) == []


def test_no_part_cut_anywhere_is_taken_for_whole(chunk: Chunk) -> None:
    write_part(chunk, read_chunk(chunk), RESULTS)
    path = Path(chunk.output) / chunk.part
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        assert info_of(chunk) is None
    path.write_bytes(whole[:4] + whole[200:])  # a hole, footer intact
    assert info_of(chunk) is None
    path.write_bytes(whole)
    assert info_of(chunk) is not None


def test_a_foreign_file_or_another_chunks_part_under_the_right_name_is_not_trusted(chunk: Chunk) -> None:
    path = Path(chunk.output) / chunk.part
    pq.write_table(pa.table({"n": [1, 2, 3]}), path)
    assert info_of(chunk) is None
    write_part(chunk, read_chunk(chunk), RESULTS)
    assert info_of(chunk, replace(chunk, id="0" * 32)) is None
    assert info_of(chunk, replace(chunk, rows=4)) is None
    assert read_part_info(storage.locate(path.with_name("nothing.parquet"))) is None


def test_a_part_whose_rows_are_not_as_many_as_it_claims_is_not_trusted(chunk: Chunk) -> None:
    write_part(chunk, read_chunk(chunk), RESULTS)
    path = Path(chunk.output) / chunk.part
    pq.write_table(pq.read_table(path).slice(0, 2), path)  # the footer's metadata travels along
    assert info_of(chunk) is None


def test_a_reader_of_the_folder_never_sees_a_file_that_is_being_written(chunk: Chunk) -> None:
    write_part(chunk, read_chunk(chunk), RESULTS)
    folder = Path(chunk.output)
    (folder / f"{storage.TEMPORARY_PREFIX}abc").write_bytes(b"PAR1 half")
    assert ds.dataset(folder, format="parquet").count_rows() == 3


def test_a_full_disk_leaves_nothing_behind_and_the_next_attempt_is_whole(chunk: Chunk) -> None:
    code = (
        "import os, resource, sys, json\n"
        "from flyte_batch.data import storage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: storage.write_atomically(storage.locate(sys.argv[1]), os.urandom(5000))\n"
        "except OSError as error: print(error.strerror, os.listdir(os.path.dirname(sys.argv[1])))\n"
    )
    path = Path(chunk.output) / chunk.part
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"can't write {path}: File too large []"
    write_part(chunk, read_chunk(chunk), RESULTS)
    assert info_of(chunk) is not None


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = storage.locate(tmp_path / "file")
    storage.write_atomically(location, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        storage.write_atomically(location, b"new")
    assert storage.read_bytes(location) == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_pipe_stays_a_pipe_and_gets_the_content(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    storage.write_atomically(storage.locate(pipe), b"content")
    assert reader.communicate(timeout=20)[0] == b"content"
    assert pipe.is_fifo()


def test_a_link_stays_a_link_and_its_target_gets_the_content(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    for content in (b"new", b"newer"):
        storage.write_atomically(storage.locate(link), content)
        assert link.is_symlink()
        assert target.read_bytes() == content
