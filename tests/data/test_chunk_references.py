from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import flyte
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.data.chunks import Chunk, ChunkReport, iter_rows, plan_chunks, read_chunk
from flyte_batch.data.sources import Source, open_source
from flyte_batch.errors import BadInput
from flyte_batch.records import SamplingParameters

env = flyte.TaskEnvironment("chunk_references")


@env.task
async def echo_chunk(chunk: Chunk) -> Chunk:
    return chunk


@env.task
async def echo_report(report: ChunkReport) -> ChunkReport:
    return report


def plan(path: Path, rows_per_chunk: int = 2, limit: int | None = None, **given: object) -> list[Chunk]:
    return plan_chunks(open_source(str(path)), "/out", rows_per_chunk, settings=given, limit=limit)


def test_naming_a_chunk_in_a_signature_loads_no_pyarrow() -> None:
    code = "import sys, flyte_batch.data.chunks; print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_chunks_and_reports_cross_a_task_boundary_unchanged(tmp_path: Path, write_rows: Any) -> None:
    write_rows("a.jsonl", [{"n": 1}])
    write_rows("b.jsonl", [{"n": 2}, {"n": 3}])
    (chunk,) = plan(tmp_path, rows_per_chunk=10)
    assert len(chunk.spans) == 2
    flyte.init()
    assert flyte.run(echo_chunk, chunk).outputs()[0] == chunk
    report = ChunkReport(chunk.id, 0, 3, 1, 2**40, 2**40, chunk.part, 0.25, '{"process":"é"}')
    assert flyte.run(echo_report, report).outputs()[0] == report


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    rows_per_chunk=st.integers(1, 15),
    limit=st.none() | st.integers(1, 80),
    row_group=st.integers(1, 5),
)
def test_every_row_is_in_exactly_one_chunk_in_source_order(
    tmp_path_factory: pytest.TempPathFactory, files: list[int], rows_per_chunk: int, limit: int | None, row_group: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    n = 0
    for number, rows in enumerate(files):
        values = list(range(n, n + rows))
        n += rows
        if number % 2:
            table = pa.table({"n": pa.array(values, pa.int64())})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=row_group)
        else:
            (folder / f"{number}.jsonl").write_text("".join(f'{{"n": {value}}}\n' for value in values))
    chunks = plan(folder, rows_per_chunk, limit)
    expected = list(range(n if limit is None else min(n, limit)))
    assert [value for chunk in chunks for value in read_chunk(chunk)["n"].to_pylist()] == expected
    assert all(chunk.rows == rows_per_chunk for chunk in chunks[:-1])
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.first_row for chunk in chunks] == [index * rows_per_chunk for index in range(len(chunks))]
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    assert sorted(chunk.part for chunk in chunks) == [chunk.part for chunk in chunks]
    assert all(sum(span.rows for span in chunk.spans) == chunk.rows for chunk in chunks)
    assert all(span.rows > 0 for chunk in chunks for span in chunk.spans)


@pytest.mark.parametrize("rows_per_chunk", [0, -1])
def test_a_chunk_size_below_one_is_refused(write_rows: Any, rows_per_chunk: int) -> None:
    with pytest.raises(BadInput, match=f"at least 1, got {rows_per_chunk}"):
        plan(write_rows("a.jsonl", [{"n": 1}]), rows_per_chunk)


def test_a_limit_below_one_is_refused(write_rows: Any) -> None:
    with pytest.raises(BadInput, match="limit must be at least 1"):
        plan(write_rows("a.jsonl", [{"n": 1}]), limit=0)


def ids(chunks: list[Chunk]) -> list[str]:
    return [chunk.id for chunk in chunks]


def test_an_id_depends_on_the_rows_and_the_settings_and_on_nothing_else(tmp_path: Path, write_rows: Any) -> None:
    rows = [{"n": n, "text": "x"} for n in range(6)]
    base = plan(write_rows("a.jsonl", rows), model="m", parameters=SamplingParameters())
    moved = plan(write_rows("elsewhere/b.jsonl", rows), parameters=SamplingParameters(), model="m")
    assert ids(base) == ids(moved)
    assert not set(ids(base)) & set(ids(plan(tmp_path / "a.jsonl", model="other", parameters=SamplingParameters())))
    changed = plan(tmp_path / "a.jsonl", model="m", parameters=SamplingParameters(temperature=0.5))
    assert not set(ids(base)) & set(ids(changed))
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids(base))


def test_appended_rows_and_a_raised_limit_leave_the_ids_of_whole_chunks_alone(write_rows: Any) -> None:
    rows = [{"n": n} for n in range(5)]
    short = plan(write_rows("a.jsonl", rows))
    longer = plan(write_rows("a.jsonl", [*rows, {"n": 5}, {"n": 6}]))
    assert ids(short)[:2] == ids(longer)[:2]
    assert short[2].id != longer[2].id
    assert ids(plan(write_rows("a.jsonl", rows), limit=3))[:1] == ids(short)[:1]


def test_an_edited_or_moved_row_changes_its_chunk_only(write_rows: Any) -> None:
    rows = [{"n": n} for n in range(6)]
    base = ids(plan(write_rows("a.jsonl", rows)))
    edited = ids(plan(write_rows("a.jsonl", [*rows[:2], {"n": 9}, *rows[3:]])))
    swapped = ids(plan(write_rows("a.jsonl", [*rows[:4], rows[5], rows[4]])))
    assert [one == other for one, other in zip(base, edited, strict=True)] == [True, False, True]
    assert [one == other for one, other in zip(base, swapped, strict=True)] == [True, True, False]


def test_other_columns_or_types_are_other_chunks(tmp_path: Path, write_rows: Any) -> None:
    path = str(write_rows("a.jsonl", [{"n": 1, "m": 2}]))
    everything = plan_chunks(open_source(path), "/out", 1, settings={})
    one = plan_chunks(open_source(path, columns=["n"]), "/out", 1, settings={})
    assert everything[0].id != one[0].id


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"model": object()}, "settings.model is a object"),
        ({"deep": [1, {"f": float("nan")}]}, r"settings.deep\[1\].f is nan"),
        ({"deep": {1: 2}}, "settings.deep has the key 1"),
    ],
)
def test_a_setting_that_no_manifest_can_hold_is_named(write_rows: Any, setting: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan(write_rows("a.jsonl", [{"n": 1}]), **setting)


def test_rows_come_in_tables_of_bounded_size_with_the_columns_asked_for(tmp_path: Path, write_rows: Any) -> None:
    write_rows("a.jsonl", [{"n": n, "m": -n} for n in range(7)])
    pq.write_table(pa.table({"n": range(7, 20), "m": range(13)}), tmp_path / "b.parquet", row_group_size=5)
    (chunk,) = plan(tmp_path, rows_per_chunk=100)
    tables = list(iter_rows(chunk, columns=["n"], batch_rows=4))
    assert max(table.num_rows for table in tables) <= 4
    assert all(table.column_names == ["n"] for table in tables)
    assert [n for table in tables for n in table["n"].to_pylist()] == list(range(20))
    with pytest.raises(BadInput, match="no column 'k'"):
        list(iter_rows(chunk, columns=["k"]))


def read_all(chunks: list[Chunk]) -> list[pa.Table]:
    return [read_chunk(chunk) for chunk in chunks]


def edit_in_place(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"3", b"4"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


def insert_a_row(path: Path) -> None:
    path.write_bytes(b'{"n": 0}\n' + path.read_bytes())


def break_it(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def other_type(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"5", b'""').replace(b" ", b"", 1))


@pytest.mark.parametrize("change", [edit_in_place, cut_off, insert_a_row, break_it, other_type])
def test_a_jsonl_file_that_changed_since_the_plan_is_noticed(write_rows: Any, change: Any) -> None:
    path = write_rows("a.jsonl", [{"n": n} for n in range(6)])
    chunks = plan(path, rows_per_chunk=3)
    change(path)
    with pytest.raises(BadInput, match="was changed since its chunks were planned: run again"):
        read_all(chunks)


def test_rows_appended_since_the_plan_disturb_no_chunk(write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"n": n} for n in range(6)])
    chunks = plan(path, rows_per_chunk=4)
    with path.open("a") as file:
        file.write('{"n": 6}\n')
    assert [read_chunk(chunk).num_rows for chunk in chunks] == [4, 2]


def test_a_parquet_file_that_changed_since_the_plan_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3]}), path)
    (chunk,) = plan(path, rows_per_chunk=3)
    for rows in ([1, 2, 4], [1, 2]):
        pq.write_table(pa.table({"n": rows}), path)
        with pytest.raises(BadInput, match="was changed since"):
            read_chunk(chunk)
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="was changed since"):
        read_chunk(chunk)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_is_gone_is_named(tmp_path: Path, write_rows: Any, suffix: str) -> None:
    path = write_rows("a.jsonl", [{"n": 1}])
    if suffix == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"n": [1]}), path)
    (chunk,) = plan(path, rows_per_chunk=3)
    path.unlink()
    with pytest.raises(BadInput, match=f"no such file or folder: {path}"):
        read_chunk(chunk)


def test_the_test_questions_of_gsm8k_come_back_row_by_row() -> None:
    path = next(
        (
            folder / "shared/data/gsm8k/test.jsonl"
            for folder in Path(__file__).parents
            if (folder / "shared/data/gsm8k").is_dir()
        ),
        None,
    )
    if path is None:
        pytest.skip("no shared/data/gsm8k beside this checkout")
    source: Source = open_source(str(path))
    assert (source.rows, source.schema.names) == (1319, ["question", "answer"])
    chunks = plan_chunks(source, "/out", 100, settings={})
    assert sum(read_chunk(chunk).num_rows for chunk in chunks) == 1319
