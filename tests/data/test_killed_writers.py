"""Processes that really die, at every step they take, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flyte_batch.data import storage
from flyte_batch.data.chunks import Chunk, plan_chunks, read_chunk
from flyte_batch.data.output import Output, read_output
from flyte_batch.data.parts import read_part_info, write_part
from flyte_batch.data.sources import open_source
from flyte_batch.records import Completion

DRIVER = """
import os, signal, sys
from flyte_batch.data import storage
from flyte_batch.data.chunks import plan_chunks, read_chunk
from flyte_batch.data.output import Output
from flyte_batch.data.parts import write_part
from flyte_batch.data.sources import open_source
from flyte_batch.records import Completion

def drive(path, folder, model, rows_per_chunk):
    source = open_source(path)
    output = Output.open(folder, {"model": model}, source, overwrite=True)
    chunks = plan_chunks(source, output.path, rows_per_chunk, settings={"model": model})
    done = output.resume(chunks)
    for chunk in chunks:
        if chunk.id not in done:
            rows = read_chunk(chunk)
            write_part(chunk, rows, [Completion(model, "stop", 1, 1)] * rows.num_rows)
    output.commit(chunks)
"""

DIES_AT_STEP = """
steps_left = int(sys.argv[4])
def counted(step):
    def run(*given):
        global steps_left
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps_left -= 1
        return step(*given)
    return run
os.replace = counted(os.replace)
storage.delete = counted(storage.delete)
drive(sys.argv[1], sys.argv[2], sys.argv[3], 3)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def drive(source: Path, folder: Path, model: str, rows_per_chunk: int) -> None:
    scope: dict[str, Any] = {}
    exec(DRIVER, scope)  # noqa: S102 - the same driver as in the processes that die
    scope["drive"](str(source), str(folder), model, rows_per_chunk)


@pytest.fixture
def source(write_rows: Any) -> Path:
    path: Path = write_rows("data/a.jsonl", [{"n": n} for n in range(6)])
    return path


def test_wherever_a_driver_is_killed_a_manifest_is_right_or_absent_and_a_re_run_finishes(
    source: Path, tmp_path: Path
) -> None:
    # Each step of a run that replaces a finished output: probe, record, manifest, parts, old parts, manifest.
    running = []
    for step in range(40):
        folder = tmp_path / f"out-{step}"
        drive(source, folder, "old", 2)
        running.append((folder, python(DRIVER + DIES_AT_STEP, source, folder, "new", step)))
        if step % 4 == 3:  # a few at a time
            survived = [process.wait() == 0 for _, process in running[-4:]]
            if all(survived):
                break
    killed = 0
    for folder, process in running:
        errors = process.communicate()[1]
        assert process.returncode in (0, -9), errors
        killed += process.returncode == -9
        manifest = storage.entry(storage.locate(folder / "_manifest.json"))
        if manifest is not None:
            models = set(read_output(str(folder), columns=["response"])["response"].to_pylist())
            assert len(models) == 1
            assert read_output(str(folder))["n"].to_pylist() == list(range(6))
            if models == {"new"}:
                assert len(list(folder.glob("part-*"))) == 2
        drive(source, folder, "new", 3)
        table = read_output(str(folder))
        assert table["n"].to_pylist() == list(range(6))
        assert set(table["response"].to_pylist()) == {"new"}
        assert len(list(folder.glob("part-*"))) == 2
    assert killed >= 8


def test_a_writer_killed_between_writing_and_renaming_leaves_no_part(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    code = """
def stop(*_):
    print("written", flush=True)
    sys.stdin.read()
os.replace = stop
(chunk,) = plan_chunks(open_source(sys.argv[1]), sys.argv[2], 10, settings={})
write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)] * 6)
"""
    process = python(DRIVER + code, source, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    (left,) = folder.iterdir()
    assert left.name.startswith(storage.TEMPORARY_PREFIX)
    (chunk,) = plan_chunks(open_source(str(source)), str(folder), 10, settings={})
    write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)] * 6)
    assert pq.read_table(folder / chunk.part).num_rows == 6


def test_a_writer_killed_in_the_middle_of_its_work_leaves_whole_parts_only(tmp_path: Path, write_rows: Any) -> None:
    rows = 2000
    source = write_rows("a.jsonl", [{"n": n} for n in range(rows)])
    folder = tmp_path / "out"
    folder.mkdir()
    code = """
for chunk in plan_chunks(open_source(sys.argv[1]), sys.argv[2], 1, settings={}):
    write_part(chunk, read_chunk(chunk), [Completion(os.urandom(100_000).hex(), "stop", 1, 1)])
    print(chunk.index, flush=True)
"""
    process = python(DRIVER + code, source, folder)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.communicate()
    chunks = {chunk.part: chunk for chunk in plan_chunks(open_source(str(source)), str(folder), 1, settings={})}
    parts = [path for path in folder.iterdir() if not path.name.startswith(storage.TEMPORARY_PREFIX)]
    assert 3 <= len(parts) < rows
    for path in parts:
        assert read_part_info(storage.locate(path), chunks[path.name]) is not None
        assert pq.read_table(path, page_checksum_verification=True).num_rows == 1


def test_drivers_that_race_on_one_output_all_finish_and_each_row_is_there_once(tmp_path: Path, write_rows: Any) -> None:
    source = write_rows("a.jsonl", [{"n": n} for n in range(60)])
    folder = tmp_path / "out"
    code = 'print("ready", flush=True); sys.stdin.readline(); drive(sys.argv[1], sys.argv[2], "m", 2)'
    drivers = [python(DRIVER + code, source, folder) for _ in range(3)]
    for driver in drivers:
        assert driver.stdout is not None
        driver.stdout.readline()
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("go\n")
        driver.stdin.flush()
    for driver in drivers:
        errors = driver.communicate()[1]
        assert driver.returncode == 0, errors
    assert read_output(str(folder))["n"].to_pylist() == list(range(60))
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".parquet") == [
        chunk.part for chunk in plan(source, folder)
    ]
    assert not [path for path in folder.iterdir() if path.name.startswith(storage.TEMPORARY_PREFIX)]


def plan(source: Path, folder: Path) -> list[Chunk]:
    found = open_source(str(source))
    output = Output.open(str(folder), {"model": "m"}, found)
    return plan_chunks(found, output.path, 2, settings={"model": "m"})
