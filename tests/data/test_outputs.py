from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.data import storage
from flyte_batch.data.chunks import Chunk, plan_chunks, read_chunk
from flyte_batch.data.manifest import MANIFEST_FILE, RUN_FILE, Manifest, read_run
from flyte_batch.data.output import STALE_AFTER_S, Output, iter_output, left_to_retry, read_output
from flyte_batch.data.parts import PartInfo, read_part_info, write_part
from flyte_batch.data.sources import open_source
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES, BadInput, BadRecord, ChunkFailed, RunError
from flyte_batch.records import Completion

Infer = Callable[[Chunk], PartInfo]
MODEL: Mapping[str, object] = {"model": "small", "sampling": {"temperature": 0.0, "stop": []}}


@pytest.fixture
def source(write_rows: Any) -> Path:
    path: Path = write_rows("data/a.jsonl", [{"n": n} for n in range(6)])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(
    source: Path,
    folder: Path,
    rows_per_chunk: int = 2,
    run: Mapping[str, object] = MODEL,
    limit: int | None = None,
    overwrite: bool = False,
) -> tuple[Output, list[Chunk]]:
    found = open_source(str(source))
    output = Output.open(str(folder), run, found, overwrite=overwrite)
    return output, plan_chunks(found, output.path, rows_per_chunk, settings=run, limit=limit)


def finish(output: Output, chunks: list[Chunk], infer: Infer) -> list[int]:
    """Runs a plan as a driver does; returns the chunks that were made."""
    done = output.resume(chunks)
    made = [chunk for chunk in chunks if chunk.id not in done]
    for chunk in made:
        infer(chunk)
    output.commit(chunks)
    return [chunk.index for chunk in made]


def parts_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part-*"))


def test_an_output_is_unfinished_until_its_manifest_is_written_last(source: Path, folder: Path, infer: Infer) -> None:
    output, chunks = begin(source, folder)
    for chunk in chunks:
        infer(chunk)
    assert output.manifest() is None
    with pytest.raises(RunError, match="not finished"):
        output.table()
    manifest = output.commit(chunks)
    assert output.manifest() == manifest
    assert (manifest.rows, manifest.failures, manifest.prompt_tokens, manifest.response_tokens) == (6, 0, 30, 12)
    assert manifest.size == sum((folder / name).stat().st_size for name in parts_in(folder))
    assert [part.name for part in manifest.parts] == parts_in(folder)
    assert output.table()["response"].to_pylist() == ["0", "1", "2", "3", "4", "5"]
    assert read_output(str(folder), columns=["n"]).to_pydict() == {"n": [0, 1, 2, 3, 4, 5]}
    assert ds.dataset(folder, format="parquet").count_rows() == 6


def test_the_small_files_say_what_the_output_is_and_nothing_of_the_environment(
    source: Path, folder: Path, infer: Infer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    finish(*begin(source, folder), infer)
    run, manifest = (json.loads((folder / name).read_text()) for name in (RUN_FILE, MANIFEST_FILE))
    assert run["settings"] == manifest["settings"] == MODEL
    assert manifest["totals"]["rows"] == 6
    assert manifest["columns"][:2] == [{"name": "n", "type": "int64"}, {"name": "response", "type": "string"}]
    assert "hf_secret" not in json.dumps([run, manifest])


def test_however_many_classes_of_errors_the_parts_have_together_the_manifest_tells_a_few_apart_and_counts_all(
    source: Path, folder: Path
) -> None:
    def part(first_row: int, causes: Mapping[str, int]) -> PartInfo:
        rows = sum(causes.values())
        return PartInfo(f"part-{first_row}", str(first_row), first_row, rows, rows, 0, 0, 9, causes)

    crowd = [part(n, {f"E{2 * n}": 1, f"E{2 * n + 1}": 2, OTHER_CAUSES: 7}) for n in range(100)]
    output, _ = begin(source, folder)
    manifest = Manifest.of(output.run, output.source, (*crowd, part(100, {"E0": 9})))
    totals = json.loads(manifest.to_json())["totals"]
    assert totals["causes"] == manifest.causes
    assert next(iter(manifest.causes)) == "E0"
    assert list(manifest.causes)[-1] == OTHER_CAUSES
    assert sorted(manifest.causes.values()) == [*[2] * (MOST_CAUSES - 1), 10, 100 * 7 + 99 + 2 * (101 - MOST_CAUSES)]
    assert sum(manifest.causes.values()) == manifest.failures == 1009


def test_a_re_run_of_a_finished_output_makes_nothing_and_changes_no_byte(
    source: Path, folder: Path, infer: Infer
) -> None:
    assert finish(*begin(source, folder), infer) == [0, 1, 2]
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert finish(*begin(source, folder), infer) == []
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


@settings(max_examples=25, deadline=None)
@given(damage=st.lists(st.sampled_from(["keep", "lose", "cut", "empty", "foreign", "swap"]), min_size=6, max_size=6))
def test_a_re_run_makes_exactly_the_parts_that_were_lost_or_damaged(
    tmp_path_factory: pytest.TempPathFactory, damage: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("resume")
    source = folder / "a.jsonl"
    source.write_text("".join(f'{{"n": {n}}}\n' for n in range(6)))

    def infer(chunk: Chunk) -> PartInfo:
        rows = read_chunk(chunk)
        return write_part(chunk, rows, [Completion(str(n), "stop", 1, 1) for n in rows["n"].to_pylist()])

    output, chunks = begin(source, folder / "out", rows_per_chunk=1)
    finish(output, chunks, infer)
    whole = {chunk.index: (folder / "out" / chunk.part).read_bytes() for chunk in chunks}
    for chunk, what in zip(chunks, damage, strict=True):
        path = folder / "out" / chunk.part
        if what == "lose":
            path.unlink()
        elif what == "cut":
            path.write_bytes(whole[chunk.index][:-7])
        elif what == "empty":
            path.write_bytes(b"")
        elif what == "foreign":
            pq.write_table(pa.table({"n": [1]}), path)
        elif what == "swap":
            path.write_bytes(whole[(chunk.index + 1) % 6])
    assert finish(output, chunks, infer) == [index for index, what in enumerate(damage) if what != "keep"]
    assert output.table()["response"].to_pylist() == ["0", "1", "2", "3", "4", "5"]


def test_a_raised_limit_keeps_what_is_done_and_deletes_what_no_longer_fits(
    source: Path, folder: Path, infer: Infer
) -> None:
    finish(*begin(source, folder, limit=3), infer)
    output, chunks = begin(source, folder)
    assert finish(output, chunks, infer) == [1, 2]
    assert parts_in(folder) == [chunk.part for chunk in chunks]
    assert ds.dataset(folder, format="parquet").count_rows() == 6


def test_appended_rows_and_added_files_are_made_beside_what_is_done(
    source: Path, folder: Path, infer: Infer, write_rows: Any
) -> None:
    finish(*begin(source.parent, folder), infer)
    with source.open("a") as file:
        file.write('{"n": 6}\n{"n": 7}\n')
    assert finish(*begin(source.parent, folder), infer) == [3]
    write_rows("data/b.jsonl", [{"n": 8}])
    assert finish(*begin(source.parent, folder), infer) == [4]
    assert read_output(str(folder))["n"].to_pylist() == list(range(9))


def test_another_chunk_size_replaces_all_parts_and_loses_no_row(source: Path, folder: Path, infer: Infer) -> None:
    finish(*begin(source, folder, rows_per_chunk=2), infer)
    assert finish(*begin(source, folder, rows_per_chunk=5), infer) == [0, 1]
    assert read_output(str(folder))["n"].to_pylist() == list(range(6))
    assert len(parts_in(folder)) == 2


def test_an_outdated_manifest_is_taken_back_before_new_work_starts(source: Path, folder: Path, infer: Infer) -> None:
    finish(*begin(source, folder, limit=2), infer)
    output, chunks = begin(source, folder)
    assert output.manifest() is not None
    output.resume(chunks)
    assert output.manifest() is None


def test_a_manifest_is_taken_back_when_one_of_its_parts_is_gone(source: Path, folder: Path, infer: Infer) -> None:
    output, chunks = begin(source, folder)
    finish(output, chunks, infer)
    (folder / chunks[1].part).unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        output.table()
    assert list(output.resume(chunks)) == [chunks[0].id, chunks[2].id]
    assert output.manifest() is None


def test_old_parts_are_deleted_only_while_there_is_no_manifest(
    source: Path, folder: Path, infer: Infer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(*begin(source, folder), infer)
    output, chunks = begin(source, folder, rows_per_chunk=3)
    for chunk in chunks:
        infer(chunk)
    states: dict[str, bool] = {}
    delete = storage.delete

    def watched(location: storage.Location) -> None:
        delete(location)
        states[location.name] = (folder / MANIFEST_FILE).exists()

    monkeypatch.setattr(storage, "delete", watched)
    output.commit(chunks)
    assert len(states) == 4
    assert not any(states.values())


def test_parts_that_vanish_during_the_commit_take_the_manifest_with_them(
    source: Path, folder: Path, infer: Infer, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, chunks = begin(source, folder)
    for chunk in chunks:
        infer(chunk)
    write = storage.write_atomically

    def another_driver_commits_another_plan(location: storage.Location, data: bytes) -> None:
        (folder / chunks[0].part).unlink()
        write(location, data)

    monkeypatch.setattr(storage, "write_atomically", another_driver_commits_another_plan)
    with pytest.raises(ChunkFailed, match="1 of 3 chunks"):
        output.commit(chunks)
    assert not (folder / MANIFEST_FILE).exists()


def test_commit_refuses_while_a_part_is_missing_and_changes_nothing(source: Path, folder: Path, infer: Infer) -> None:
    finish(*begin(source, folder, rows_per_chunk=3), infer)
    old = parts_in(folder)
    output, chunks = begin(source, folder)
    infer(chunks[0])
    with pytest.raises(ChunkFailed, match=r"2 of 3 chunks have no part .* chunk 1 \(rows 2 to 3\): run again"):
        output.commit(chunks)
    assert set(parts_in(folder)) == {*old, chunks[0].part}


# Other settings, other sources, other people's files -----------------------------------------------------------------


def complaint(source: Path, folder: Path, run: Mapping[str, object] = MODEL) -> str:
    with pytest.raises(BadInput) as caught:
        begin(source, folder, run=run)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_other_settings_are_refused_with_what_differs_and_both_remedies(
    source: Path, folder: Path, infer: Infer
) -> None:
    finish(*begin(source, folder), infer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = complaint(source, folder, {"model": "large", "sampling": {"temperature": 0.5, "stop": []}, "prompt": "p"})
    assert 'model: "small" -> "large"' in message
    assert "sampling.temperature: 0.0 -> 0.5" in message
    assert 'prompt: (not set) -> "p"' in message
    assert "stop" not in message
    assert "another --output" in message
    assert "--overwrite" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_of_two_long_prompts_the_message_shows_where_they_begin_to_differ(
    source: Path, folder: Path, infer: Infer
) -> None:
    finish(*begin(source, folder, run={"prompt": "x" * 500 + " briefly"}), infer)
    message = complaint(source, folder, {"prompt": "x" * 500 + " in detail"})
    assert "briefly" in message
    assert "in detail" in message
    assert len(message) < 500


def test_overwrite_replaces_another_runs_output_only_when_the_new_one_commits(
    source: Path, folder: Path, infer: Infer
) -> None:
    finish(*begin(source, folder), infer)
    old = set(parts_in(folder))
    output, chunks = begin(source, folder, run={"model": "large"}, overwrite=True)
    assert output.manifest() is None
    assert set(parts_in(folder)) == old
    assert finish(output, chunks, infer) == [0, 1, 2]
    assert not old & set(parts_in(folder))
    assert output.table().num_rows == 6


def test_overwrite_resumes_its_own_run_so_that_a_retried_driver_does_not_start_over(
    source: Path, folder: Path, infer: Infer
) -> None:
    finish(*begin(source, folder), infer)
    _, chunks = begin(source, folder, run={"model": "large"}, overwrite=True)
    infer(chunks[0])
    assert finish(*begin(source, folder, run={"model": "large"}, overwrite=True), infer) == [1, 2]


def test_another_source_is_refused_but_the_same_one_in_another_place_is_resumed(
    source: Path, folder: Path, infer: Infer, write_rows: Any
) -> None:
    finish(*begin(source, folder), infer)
    other = write_rows("other/b.jsonl", [{"n": 100}])
    assert f"source: {source} -> {other}" in complaint(other, folder)
    moved = write_rows("moved/a.jsonl", source.read_bytes())
    assert finish(*begin(moved, folder), infer) == []


def test_an_edited_source_replaces_the_chunks_that_were_edited(source: Path, folder: Path, infer: Infer) -> None:
    finish(*begin(source, folder), infer)
    source.write_text(source.read_text().replace("2", "7"))
    assert finish(*begin(source, folder), infer) == [1]
    assert read_output(str(folder))["n"].to_pylist() == [0, 1, 7, 3, 4, 5]


def test_parquet_files_that_are_not_ours_are_refused_and_left_alone(source: Path, folder: Path, infer: Infer) -> None:
    folder.mkdir()
    pq.write_table(pa.table({"n": [1]}), folder / "precious.parquet")
    assert "holds precious.parquet, which flyte_batch did not write" in complaint(source, folder)
    (folder / "precious.parquet").rename(folder / "precious.bak")
    (folder / "notes.txt").write_text("mine")
    finish(*begin(source, folder), infer)
    finish(*begin(source, folder, rows_per_chunk=3), infer)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "precious.bak").exists()


def test_the_sources_own_folder_is_refused_as_output(source: Path) -> None:
    assert "is the folder of the source" in complaint(source, source.parent)


def test_a_folder_that_cannot_be_written_to_is_refused_with_the_systems_reason(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file: choose a folder" in complaint(source, tmp_path / "file")
    assert f"can't write to the output folder {tmp_path}/file/out: Not a directory" in complaint(
        source, tmp_path / "file" / "out"
    )
    (tmp_path / "locked").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if len(folder.parts) > 2:
            folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "from flyte_batch.data import storage\n"
        "from flyte_batch.errors import BadInput\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "else: os.chmod(sys.argv[1], 0o555)\n"
        "try: storage.make_writable_folder(storage.locate(sys.argv[1]))\n"
        "except BadInput as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "locked")], capture_output=True, text=True, check=True
    )
    assert f"can't write to the output folder {tmp_path}/locked: Permission denied" in done.stdout


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
@pytest.mark.parametrize("name", [RUN_FILE, MANIFEST_FILE])
def test_a_small_file_that_is_not_ours_is_refused_and_not_overwritten(
    source: Path, folder: Path, name: str, content: str
) -> None:
    folder.mkdir()
    (folder / name).write_text(content)
    assert name in complaint(source, folder)
    assert (folder / name).read_text() == content


def test_parts_with_failures_are_left_to_retry_until_they_are_made_again_or_nobody_retries_any_more(
    source: Path, folder: Path, infer: Infer
) -> None:
    def left() -> list[int]:
        location = storage.locate(str(folder))
        parts = [info for chunk in chunks if (info := read_part_info(location.child(chunk.part))) is not None]
        inside = storage.entries(location)
        return [part.first_row for part in left_to_retry(read_run(location), inside, parts)]

    def make(chunk: Chunk, newer_s: float) -> None:
        write_part(chunk, read_chunk(chunk), [BadRecord("no")] * chunk.rows)
        written = (folder / RUN_FILE).stat().st_mtime + newer_s
        os.utime(folder / chunk.part, (written, written))

    output, chunks = begin(source, folder)
    output.resume(chunks)
    infer(chunks[0])
    for chunk in chunks[1:]:
        make(chunk, -60)
    output.commit(chunks)
    assert left() == []
    again, _ = begin(source, folder)
    assert list(again.resume(chunks, retry_failures=True)) == [chunks[0].id]
    assert left() == [2, 4]
    make(chunks[1], 60)
    assert left() == [4]
    begin(source, folder)
    assert left() == [4]
    os.utime(folder / chunks[1].part, (1, 1))  # as long ago as another run is after a kill
    third, _ = begin(source, folder)
    third.resume(chunks, retry_failures=True)
    assert left() == [2, 4]
    third.resume(chunks)
    assert left() == []


# Readers -------------------------------------------------------------------------------------------------------------


def test_reading_names_a_missing_folder_an_unfinished_one_and_an_unknown_column(
    source: Path, folder: Path, infer: Infer
) -> None:
    with pytest.raises(BadInput, match="no such output folder"):
        read_output(str(folder))
    finish(*begin(source, folder), infer)
    with pytest.raises(BadInput, match="no column 'k'; it has n, response"):
        read_output(str(folder), columns=["k"])
    assert [table.num_rows for table in iter_output(str(folder))] == [2, 2, 2]


def test_a_flipped_bit_in_a_part_is_noticed_when_it_is_read(source: Path, folder: Path, infer: Infer) -> None:
    output, chunks = begin(source, folder)
    finish(output, chunks, infer)
    path = folder / chunks[1].part
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    begin_of_column = column.dictionary_page_offset or column.data_page_offset
    data[begin_of_column + column.total_compressed_size - 1] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"part .* is damaged"):
        output.table()


# Leftovers and company ------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_writers_are_deleted_and_those_of_writers_at_work_are_not(
    source: Path, folder: Path, infer: Infer
) -> None:
    output, chunks = begin(source, folder)
    old, fresh, foreign = (folder / name for name in (f"{storage.TEMPORARY_PREFIX}old", ".tmp-fresh", ".mine"))
    for path in (old, fresh, foreign):
        path.write_bytes(b"half")
    hours_ago = time.time() - STALE_AFTER_S - 60
    for path in (old, foreign):
        os.utime(path, (hours_ago, hours_ago))
    finish(output, chunks, infer)
    assert [path.exists() for path in (old, fresh, foreign)] == [False, True, True]


def test_two_drivers_in_step_on_one_output_both_finish_with_each_row_once(
    source: Path, folder: Path, infer: Infer
) -> None:
    (one, chunks), (other, same) = begin(source, folder), begin(source, folder)
    one.resume(chunks)
    infer(chunks[0])
    assert list(other.resume(same)) == [chunks[0].id]
    for chunk in chunks:
        infer(chunk)
        infer(chunk)
    manifests: list[Manifest] = [one.commit(chunks), other.commit(same)]
    assert manifests[0] == manifests[1]
    assert read_output(str(folder))["n"].to_pylist() == list(range(6))


def test_a_driver_whose_parts_another_plan_deleted_is_told_and_leaves_the_others_manifest(
    source: Path, folder: Path, infer: Infer
) -> None:
    (one, chunks), (other, larger) = begin(source, folder), begin(source, folder, rows_per_chunk=3)
    for chunk in [*chunks, *larger]:
        infer(chunk)
    other.commit(larger)
    with pytest.raises(ChunkFailed, match="3 of 3 chunks"):
        one.commit(chunks)
    assert read_output(str(folder))["n"].to_pylist() == list(range(6))
