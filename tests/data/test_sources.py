from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flyte_batch.data.chunks import plan_chunks, read_chunk
from flyte_batch.data.sources import open_source
from flyte_batch.errors import BadInput


def rows_of(path: object, columns: list[str] | None = None, rows_per_chunk: int = 2) -> list[dict[str, Any]]:
    source = open_source(str(path), columns=columns)
    chunks = plan_chunks(source, "/nowhere", rows_per_chunk, settings={})
    return [row for chunk in chunks for row in read_chunk(chunk).to_pylist()]


def complaint(path: object, columns: list[str] | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        open_source(str(path), columns=columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is found ------------------------------------------------------------------------------------------------------


def test_a_folder_is_its_visible_files_of_both_formats_in_the_order_of_their_names(
    tmp_path: Path, write_rows: Any
) -> None:
    write_rows("c.jsonl", [{"n": 4}])
    write_rows("a.NDJSON", [{"n": 1}, {"n": 2}])
    pq.write_table(pa.table({"n": [3]}), tmp_path / "b.parquet")
    write_rows("_manifest.jsonl", [{"n": 100}])
    write_rows(".hidden.jsonl", [{"n": 100}])
    write_rows("README.md", b"not data")
    write_rows("sub/d.jsonl", [{"n": 100}])
    source = open_source(str(tmp_path))
    assert [file.location.name for file in source.files] == ["a.NDJSON", "b.parquet", "c.jsonl"]
    assert source.rows == 4
    assert [row["n"] for row in rows_of(tmp_path, rows_per_chunk=3)] == [1, 2, 3, 4]


def test_mixed_files_get_one_schema_and_what_a_file_lacks_is_null(tmp_path: Path, write_rows: Any) -> None:
    write_rows("a.jsonl", [{"n": 1, "text": "x", "tags": []}])
    pq.write_table(
        pa.table(
            {
                "text": pa.array(["y", "z"]).dictionary_encode(),
                "n": pa.array([1.5, None], pa.float32()),
                "tags": pa.array([["t"], None]),
            }
        ),
        tmp_path / "b.parquet",
    )
    write_rows("c.jsonl", [{"new": {"k": True}, "n": None}])
    source = open_source(str(tmp_path))
    assert source.schema == pa.schema(
        [
            ("n", pa.float64()),
            ("text", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("new", pa.struct([("k", pa.bool_())])),
        ]
    )
    assert rows_of(tmp_path) == [
        {"n": 1.0, "text": "x", "tags": [], "new": None},
        {"n": 1.5, "text": "y", "tags": ["t"], "new": None},
        {"n": None, "text": "z", "tags": None, "new": None},
        {"n": None, "text": None, "tags": None, "new": {"k": True}},
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[ac].jsonl", ["a.jsonl"]),
        ("*/*.jsonl", ["sub/c.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]),
        ("sub/**", ["sub/c.jsonl", "sub/deep/d.jsonl"]),
        ("_*.jsonl", ["_private.jsonl"]),
        ("?.*", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_a_glob_matches_as_in_a_shell(tmp_path: Path, write_rows: Any, pattern: str, names: list[str]) -> None:
    for name in (
        "a.jsonl",
        "b.jsonl",
        "sub/c.jsonl",
        "sub/deep/d.jsonl",
        "_private.jsonl",
        ".h.jsonl",
        "x.txt",
        "e.md",
    ):
        write_rows(name, [{"name": name}])
    assert [row["name"] for row in rows_of(tmp_path / pattern)] == names


def test_a_name_with_brackets_or_percent_or_blanks_is_that_file_before_it_is_a_pattern(write_rows: Any) -> None:
    assert rows_of(write_rows("a[1] 20%25#é.jsonl", [{"n": 1}])) == [{"n": 1}]


def test_a_file_uri_is_a_local_path(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": 1}])
    assert open_source(f"file://{path}").files[0].path == str(path)


@pytest.mark.parametrize("uri", ["file://{}/?%20x.jsonl", "file://{}/[ab] x.jsonl", "file://localhost{}/* x.jsonl"])
def test_a_file_uri_may_be_a_glob_and_hold_what_other_uris_may_not(tmp_path: Path, write_rows: Any, uri: str) -> None:
    for name in ("a x", "b x", "cc"):
        write_rows(f"{name}.jsonl", [{"q": name}])
    found = open_source(uri.format(tmp_path)).files
    assert [file.location.name for file in found] == ["a x.jsonl", "b x.jsonl"]


def test_a_file_uri_of_another_machine_is_refused() -> None:
    with pytest.raises(BadInput, match="names a host, data: write three slashes"):
        open_source("file://data/in.jsonl")


def test_a_relative_path_becomes_absolute_so_that_a_worker_finds_it(
    tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows("a.jsonl", [{"n": 1}])
    monkeypatch.chdir(tmp_path)
    chunk = plan_chunks(open_source("a.jsonl"), "out", 1, settings={})[0]
    assert (chunk.spans[0].path, chunk.output) == (str(path), str(tmp_path / "out"))


def test_the_head_of_a_source_is_its_first_rows_across_files_and_past_empty_ones(
    tmp_path: Path, write_rows: Any
) -> None:
    write_rows("a.jsonl", b"")
    write_rows("b.jsonl", [{"n": 1}])
    write_rows("c.jsonl", [{"n": 2}, {"n": 3}])
    source = open_source(str(tmp_path))
    assert [source.head(rows)["n"].to_pylist() for rows in (0, 1, 2, 9)] == [[], [1], [1, 2], [1, 2, 3]]


def test_files_without_rows_are_fine_beside_files_with_rows(tmp_path: Path, write_rows: Any) -> None:
    write_rows("a.jsonl", b"")
    pq.write_table(pa.table({"n": pa.array([], pa.string())}), tmp_path / "b.parquet")
    write_rows("c.jsonl", [{"n": 1}])
    assert rows_of(tmp_path) == [{"n": 1}]


# Parquet --------------------------------------------------------------------------------------------------------------


def test_parquet_rows_are_counted_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(1000)}), path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:4000] = bytes(3996)  # every page, but not the footer
    path.write_bytes(data)
    source = open_source(str(path))
    assert source.rows == 1000
    with pytest.raises(BadInput, match=r"a\.parquet is broken"):
        read_chunk(plan_chunks(source, str(tmp_path), 10, settings={})[0])


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10, 25, 1000])
def test_parquet_rows_are_found_across_row_groups(tmp_path: Path, rows_per_chunk: int) -> None:
    pq.write_table(pa.table({"n": range(95)}), tmp_path / "a.parquet", row_group_size=10)
    assert [row["n"] for row in rows_of(tmp_path / "a.parquet", rows_per_chunk=rows_per_chunk)] == list(range(95))


def test_a_column_with_a_dot_in_its_name_is_not_taken_for_a_field(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [{"b": 1}], "a.b": [2], "": [3]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", ["a.b"]) == [{"a.b": 2}]
    assert rows_of(tmp_path / "a.parquet", ["a"]) == [{"a": {"b": 1}}]
    assert rows_of(tmp_path / "a.parquet", [""]) == [{"": 3}]


def test_a_file_that_is_no_parquet_file_or_only_half_of_one_is_refused(tmp_path: Path, write_rows: Any) -> None:
    assert "is not a Parquet file (it begins with b'{\"n\"'" in complaint(write_rows("a.parquet", [{"n": 1}]))
    assert "is empty (0 bytes)" in complaint(write_rows("b.parquet", b""))
    assert "is not a Parquet file" in complaint(write_rows("t.parquet", b"PA"))
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()
    for cut in (5, 11, len(whole) // 2, len(whole) - 1):
        assert "cut off" in complaint(write_rows("d.parquet", whole[:cut]))
    garbled = whole[:-60] + b"\xff" * 52 + whole[-8:]
    assert "broken Parquet footer" in complaint(write_rows("e.parquet", garbled))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["n", "n"]), tmp_path / "a.parquet")
    assert "more than one column 'n'" in complaint(tmp_path / "a.parquet")


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_closest_name_that_is_there(tmp_path: Path, write_rows: Any) -> None:
    write_rows("questions.jsonl", [{"n": 1}])
    message = complaint(tmp_path / "question.jsonl")
    assert f"no such file or folder: {tmp_path}/question.jsonl" in message
    assert "did you mean 'questions.jsonl'?" in message
    assert "there is no folder" in complaint(tmp_path / "nowhere" / "a.jsonl")


def test_no_path_an_unknown_scheme_and_a_password_in_a_uri_are_refused() -> None:
    assert "empty path" in complaint("  ")
    assert "can't open ftpx://host/a.jsonl" in complaint("ftpx://host/a.jsonl")
    message = complaint("s3://key:hunter2@bucket/a.jsonl")
    assert "environment" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_source_without_rows_is_refused(write_rows: Any, content: bytes) -> None:
    assert "no rows" in complaint(write_rows("a.jsonl", content))


def test_rows_without_any_column_are_refused(write_rows: Any) -> None:
    assert "no columns" in complaint(write_rows("a.jsonl", [{}, {}]))


def test_a_folder_or_glob_without_a_supported_file_is_refused(tmp_path: Path, write_rows: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no files that end in .jsonl" in complaint(tmp_path / "empty")
    write_rows("outer/inner/a.jsonl", [{"n": 1}])
    assert f"{tmp_path}/outer/**/*.jsonl" in complaint(tmp_path / "outer")
    assert "nothing matches" in complaint(tmp_path / "*.jsonl")
    write_rows("a.csv", b"n\n1\n")
    assert "none of which ends in" in complaint(tmp_path / "*.csv")


def test_an_unknown_format_is_refused_with_the_formats_there_are(write_rows: Any) -> None:
    assert ".parquet" in complaint(write_rows("a.csv", b"n\n1\n"))
    assert "rename it to .jsonl" in complaint(write_rows("a.json", [{"n": 1}]))


def test_compressed_files_are_refused_and_never_left_out_silently(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows("b.jsonl.gz", b"\x1f\x8b")
    write_rows("a.jsonl", [{"n": 1}])
    for given in (path, tmp_path, tmp_path / "*"):
        message = complaint(given)
        assert "b.jsonl.gz is compressed" in message
        assert "unpack it" in message


def test_an_unknown_column_is_named_with_the_closest_and_all_others(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"question": "x", "answer": "y"}])
    message = complaint(path, ["questoin"])
    assert "no column 'questoin' (did you mean 'question'?)" in message
    assert "question, answer" in message


def test_a_choice_of_no_columns_or_of_one_twice_is_refused(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": 1}])
    assert "no columns chosen" in complaint(path, [])
    assert "twice" in complaint(path, ["n", "n"])


@pytest.mark.parametrize("name", ["response", "finish_reason", "error", "prompt_tokens", "response_tokens"])
def test_a_column_with_a_result_columns_name_is_refused_unless_left_out(write_rows: Any, name: str) -> None:
    path = write_rows("a.jsonl", [{"question": "x", name: "y"}])
    message = complaint(path)
    assert f"a column {name!r}" in message
    assert "--columns question" in message
    assert rows_of(path, ["question"]) == [{"question": "x"}]


def test_a_conflict_between_files_names_both_files_and_both_types(tmp_path: Path, write_rows: Any) -> None:
    write_rows("a.jsonl", [{"n": 1}])
    write_rows("b.jsonl", [{"n": "x"}])
    message = complaint(tmp_path)
    assert f"column 'n' is int64 in {tmp_path}/a.jsonl and string in {tmp_path}/b.jsonl" in message
    assert "--columns" in message


def test_a_file_that_this_user_may_not_read_is_named_with_the_systems_reason(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": 1}])
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder) != "/tmp" and folder != Path("/"):  # noqa: S108
            folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "from flyte_batch.data.sources import open_source\n"
        "from flyte_batch.errors import BadInput\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: open_source(sys.argv[1])\n"
        "except BadInput as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"can't read {path}: Permission denied" in done.stdout


# Identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_copy_in_another_folder_has_the_same_identity_and_an_edit_another(
    tmp_path: Path, write_rows: Any, suffix: str
) -> None:
    def make(folder: str, text: str) -> str:
        path = tmp_path / folder / f"a.{suffix}"
        rows = [{"n": 1, "text": text}, {"n": 2, "text": "zz"}]
        write_rows(f"{folder}/a.jsonl", rows)
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        return open_source(str(path)).identity

    assert make("one", "ab") == make("two", "ab")
    assert make("one", "ab") != make("three", "ac")
