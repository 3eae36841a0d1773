from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.data.chunks import plan_chunks, read_chunk
from flyte_batch.data.formats import RowIndex
from flyte_batch.data.jsonl import BLOCK_BYTES, Jsonl
from flyte_batch.data.sources import open_source
from flyte_batch.data.storage import locate
from flyte_batch.errors import BadInput


def rows_of(path: Path, columns: list[str] | None = None, rows_per_chunk: int = 3) -> list[dict[str, Any]]:
    source = open_source(str(path), columns=columns)
    chunks = plan_chunks(source, str(path.parent / "out"), rows_per_chunk, settings={})
    return [row for chunk in chunks for row in read_chunk(chunk).to_pylist()]


def complaint(path: Path, columns: list[str] | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        open_source(str(path), columns=columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_blank_lines_crlf_and_a_missing_newline_at_the_end_are_no_rows_and_no_errors(write_rows: Any) -> None:
    path = write_rows("a.jsonl", b'\n{"n": 1}\r\n\r\n   \n{"n": 2}\n\n{"n": 3}')
    assert [row["n"] for row in rows_of(path, rows_per_chunk=1)] == [1, 2, 3]


def test_a_byte_order_mark_is_not_part_of_the_first_row(write_rows: Any) -> None:
    path = write_rows("a.jsonl", b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n')
    assert rows_of(path, rows_per_chunk=1) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"n": }', "broken JSON"),
        (b'{"n": 1} {"n": 2}', "broken JSON: Extra data"),
        (b'{"n": 1', "broken JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"n": "\xff\xfe"}', "not UTF-8 (byte 0xff at column 8)"),
        (b'{"n": "\\ud800"}', "surrogate"),
        (b'{"n": 1, "n": 2}', "the key 'n' occurs twice"),
        (b'{"deep": {"n": 1, "n": 2}}', "the key 'n' occurs twice"),
        (b'{"n": ' + b"[" * 200_000, "line 7"),
        (b'{"n": ' + b"1" * 5000 + b"}", "line 7"),
    ],
)
def test_a_line_that_cannot_be_a_row_is_named_by_file_and_line_number(write_rows: Any, line: bytes, says: str) -> None:
    path = write_rows("a.jsonl", b'{"n": 1}\n' * 5 + b"\n" + line + b'\n{"n": 1}\n')
    message = complaint(path)
    assert f"{path}, line 7:" in message
    assert says in message


def test_the_line_number_is_right_far_behind_the_first_block_that_is_read(write_rows: Any) -> None:
    good = b'{"text": "%s"}\n' % (b"x" * 1000)
    lines = 3 * BLOCK_BYTES // len(good)
    path = write_rows("a.jsonl", good * lines + b"{broken\n" + good)
    assert f"line {lines + 1}:" in complaint(path)


def test_a_json_array_is_recognised_and_the_way_to_convert_it_is_given(write_rows: Any) -> None:
    assert "jq -c '.[]'" in complaint(write_rows("a.jsonl", b'[\n{"n": 1},\n{"n": 2}\n]\n'))


def test_texts_that_look_like_dates_or_numbers_stay_texts(write_rows: Any) -> None:
    row = {"day": "2020-01-01", "time": "2020-01-01T00:00:00Z", "zip": "01234"}
    assert rows_of(write_rows("a.jsonl", [row, row])) == [row, row]


def test_an_integer_among_floats_becomes_a_float_wherever_it_stands(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": 1}, {"n": 2.5}, {"n": 2**60 + 1}])
    assert open_source(str(path)).schema == pa.schema([("n", pa.float64())])
    assert [row["n"] for row in rows_of(path)] == [1.0, 2.5, float(2**60 + 1)]


def test_null_and_missing_keys_fit_every_type(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"a": None}, {}, {"a": "x", "b": 1}, {"b": None}])
    assert rows_of(path) == [
        {"a": None, "b": None},
        {"a": None, "b": None},
        {"a": "x", "b": 1},
        {"a": None, "b": None},
    ]


def test_large_integers_are_kept_to_the_last_digit(write_rows: Any) -> None:
    rows = [{"signed": -(2**63), "unsigned": 2**64 - 1}, {"signed": 2**63 - 1, "unsigned": 0}]
    assert rows_of(write_rows("a.jsonl", rows)) == rows


def test_an_integer_beyond_64_bits_is_refused_instead_of_rounded(write_rows: Any) -> None:
    message = complaint(write_rows("a.jsonl", [{"id": 2**64}]))
    assert "'id'" in message
    assert "write them as texts" in message


def test_lists_and_objects_keep_their_structure(write_rows: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hi", "weight": None}], "tags": [], "meta": {"score": 1.0}},
        {"messages": [{"role": "user", "content": "é", "weight": 2.5}], "tags": ["a"], "meta": {"score": 0.5}},
    ]
    assert rows_of(write_rows("a.jsonl", rows), rows_per_chunk=1) == rows


def test_objects_without_any_field_are_nulls_because_parquet_has_no_such_thing(write_rows: Any) -> None:
    assert rows_of(write_rows("a.jsonl", [{"a": 1, "e": {}}, {"a": 2, "e": {}}])) == [
        {"a": 1, "e": None},
        {"a": 2, "e": None},
    ]


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        ("x", 1, ("a text", "an integer")),
        (True, 1, ("a true/false", "an integer")),
        (1.5, "x", ("a number", "a text")),
        ([1], 1, ("a list", "an integer")),
        ({"k": 1}, [1], ("an object", "a list")),
    ],
)
def test_a_conflict_of_types_names_the_column_both_types_both_lines_and_the_remedy(
    write_rows: Any, first: object, second: object, kinds: tuple[str, str]
) -> None:
    path = write_rows("a.jsonl", [{"ok": 1}, {"ok": 1, "c": first}, {"ok": 1}, {"ok": 1, "c": second}])
    message = complaint(path)
    assert f"column 'c' is {kinds[0]} in line 2 and {kinds[1]} in line 4" in message
    assert "--columns" in message
    assert len(rows_of(path, columns=["ok"])) == 4


def test_a_conflict_inside_a_list_or_an_object_names_the_place(write_rows: Any) -> None:
    assert "'messages[].role'" in complaint(
        write_rows("a.jsonl", [{"messages": [{"role": "user"}]}, {"messages": [{"role": 1}]}])
    )


def test_keys_that_are_data_are_refused_before_they_become_columns(write_rows: Any) -> None:
    message = complaint(write_rows("a.jsonl", [{"scores": {f"user-{n}": 1}} for n in range(3000)]))
    assert "column 'scores'" in message
    assert "2000 different keys" in message


def test_columns_come_in_the_order_in_which_they_are_first_seen_or_chosen(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"b": 1, "a": 2}, {"c": 3, "a": 2, "b": 1}])
    assert open_source(str(path)).schema.names == ["b", "a", "c"]
    assert open_source(str(path), columns=["c", "b"]).schema.names == ["c", "b"]


json_scalars = st.one_of(
    st.none(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from('\u2028\u2029\x00\x1f\x7f\x85\ufeff\\"\n\r😀é')),
)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(json_scalars, min_size=1, max_size=30),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
    rows_per_chunk=st.integers(1, 8),
)
def test_every_text_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    ascii_only: bool,
    newline: str,
    rows_per_chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    lines = [json.dumps({"n": n, "text": text}, ensure_ascii=ascii_only) for n, text in enumerate(texts)]
    path.write_bytes(newline.join(lines).encode())
    assert [row["text"] for row in rows_of(path, rows_per_chunk=rows_per_chunk)] == texts


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), capacity=st.integers(2, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_full_index_thins_out_and_still_finds_every_row(
    lengths: list[int], capacity: int, data: st.DataObject
) -> None:
    index, exact, offsets = RowIndex(capacity), RowIndex(10**6), [0]
    for n, length in enumerate(lengths):
        for one in (index, exact):
            one.append(offsets[-1], offsets[-1] + length, n * 7919 + length)
        offsets.append(offsets[-1] + length)
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start + 1, len(lengths)))
    offset, end, skip, digest = index.window(start, stop)
    assert offset == offsets[start - skip]
    assert end >= offsets[stop]
    assert skip < index.stride
    assert exact.window(start, stop)[:3] == (offsets[start], offsets[stop], 0)
    assert digest == exact.window(start - skip, offsets.index(end))[3]


def test_chunks_of_a_file_with_a_thin_index_hold_the_right_rows(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": n} for n in range(1000)])
    file = Jsonl().scan(locate(path), path.stat().st_size, None, None, index_entries=16)
    assert file.index is not None
    assert file.index.stride > 1
    found = []
    for start in range(0, 1000, 7):
        span = file.span(start, min(start + 7, 1000))
        found += [n for table in Jsonl().read(span, file.schema, 3) for n in table["n"].to_pylist()]
    assert found == list(range(1000))


def test_scanning_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"question": "x" * 480, "n": 1}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(line * 1000)
    assert path.stat().st_size > 50_000_000
    tracemalloc.start()
    try:
        assert open_source(str(path)).rows == 100_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000


def test_values_nested_deeper_than_parquet_can_hold_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    for value in ("[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40):
        path.write_text('{"x": 1}\n{"y": ' + value + "}\n")
        with pytest.raises(BadInput, match="line 2 is nested more than 32 deep"):
            open_source(str(path))
