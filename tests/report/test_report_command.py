"""``flyte batch report``, and the report of a real run: its numbers are the output's."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import flyte_batch as fb
from flyte_batch.cli.report import command
from flyte_batch.data import storage
from flyte_batch.data.manifest import MANIFEST_FILE, RUN_FILE
from flyte_batch.data.storage import Location
from flyte_batch.report.history import LOG_FILE, SILENT_S
from flyte_batch.report.keeper import PAGE_FILE
from flyte_batch.report.run_log import logs_from_json, logs_to_json
from flyte_batch.singletons import close_all
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, write_jsonl
from tests.report.logs import STARTED, make_log, make_plan
from tests.report.parsing import Element, parse

ROWS = 300
POISON = {17, 120, 299}


@fb.singleton
async def solver() -> Any:
    def respond(text: str) -> str:
        if "poison" in text:
            raise fb.BadRecord(f"can't answer {text!r}")
        return text.upper()

    return fb.EngineBatcher(fb.FakeEngine(respond), max_batch_size=32)


async def answer(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")


def source(folder: Path) -> str:
    texts = ["poison <b>" if n in POISON else f"question {n}" for n in range(ROWS)]
    return write_jsonl(folder / "in.jsonl", [{"id": n, "question": text} for n, text in enumerate(texts)])


async def run(folder: Path, **options: Any) -> Path:
    output = folder / "out"
    try:
        settings = {"prompt": "{question}"}
        await fb.run(
            source(folder),
            str(output),
            settings=settings,
            **{"run_chunk": answer, "code_version": "1", "chunk_size": 50, "progress": "off", **options},
        )
    finally:
        await close_all()
    return output


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def figures(output: Path) -> dict[str, Any]:
    result = report(output, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def page(output: Path) -> Element:
    return parse((output / PAGE_FILE).read_text())


async def test_the_sums_of_a_run_are_the_same_in_report_manifest_and_rows(tmp_path: Path) -> None:
    output = await run(tmp_path)
    rows = pq.read_table(output).to_pylist()
    manifest = json.loads((output / MANIFEST_FILE).read_text())["totals"]
    causes = Counter(row["error"].partition(":")[0] for row in rows if row["error"])
    sums = {
        "rows": len(rows), "failures": sum(causes.values()), "causes": dict(causes),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "response_tokens": sum(row["response_tokens"] or 0 for row in rows),
    }  # fmt: skip
    assert sums["failures"] == len(POISON)
    told = figures(output)
    assert {name: told[name] for name in sums} == {name: manifest[name] for name in sums} == sums
    root = page(output)
    assert root.figures()["Rows"][0] == f"{ROWS}"
    assert root.figures()["Failures"][0] == "3"
    assert root.table("Failed rows by cause")[1:] == [["BadRecord", "3", "1.0%"]]
    assert {int(row[0]) for row in root.table("Failed rows of this run, for example")[1:]} <= POISON
    lengths = Counter(row["response_tokens"] for row in rows if not row["error"])
    assert sum(int(row[1]) for row in root.table("Response lengths")[1:]) == sum(lengths.values())
    assert sum(int(row[1]) for row in root.table("Latencies")[1:]) == ROWS
    chunks = root.table("Chunks, the slowest first")[1:]
    assert [sum(int(row[column]) for row in chunks) for column in (1, 2)] == [ROWS, 3]
    samples = [each.text for each in root.all("article")[0].all("dd")]
    assert samples == ["question 0", "0", "QUESTION 0"]


@pytest.mark.parametrize("is_written", [True, False])
async def test_the_last_line_of_a_run_names_its_page_only_where_that_was_written(
    tmp_path: Path, is_written: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not is_written:
        (tmp_path / "out" / PAGE_FILE).mkdir(parents=True)
    output = await run(tmp_path, progress="plain")
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"6 parts, 0 of them kept: {output}" in last
    assert last.endswith(f"; how it went: {PAGE_FILE} there" if is_written else str(output))


async def test_the_page_made_again_is_the_page_that_the_run_left(tmp_path: Path) -> None:
    output = await run(tmp_path)
    left = (output / PAGE_FILE).read_text()
    result = report(output)
    assert result.exit_code == 0, result.output
    assert (output / PAGE_FILE).read_text() == left
    lines = result.stdout.splitlines()
    assert lines[0].startswith("297 of 300 rows answered in ")
    assert lines[1] == "rows 300 (of 300); failures 3 (1.0% of the rows done)"
    assert lines[-1] == f"report: {output / PAGE_FILE}"


async def test_a_resumed_run_counts_all_rows_and_lists_the_run_before(tmp_path: Path) -> None:
    output = await run(tmp_path)
    for part in sorted(output.glob("part-*.parquet"))[:2]:
        part.unlink()
    await run(tmp_path)
    told = figures(output)
    assert (told["rows"], told["rows_of_this_run"], told["failures"]) == (ROWS, 100, 3)
    root = page(output)
    assert root.figures()["Rows"] == ("300", "of 300, 200 by earlier runs")
    assert [row[3] for row in root.table("Earlier runs over this output")[1:]] == ["300"]


async def test_a_failed_run_leaves_a_report_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(fb.TooManyFailures):
        await run(tmp_path, max_failure_rate=0.001)
    output = tmp_path / "out"
    told = figures(output)
    assert told["outcome"] == "failed"
    assert told["error"].startswith("TooManyFailures: ")
    assert page(output).all("pre")[0].text == told["error"]
    lines = report(output).stdout.splitlines()
    assert lines[0].startswith("Failed after ")
    assert lines[1] == told["error"]


def test_an_error_is_one_line_of_text_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log(outcome="failed", error="E: \x1b[2Ja\nb")]))
    assert report(tmp_path).stdout.splitlines()[1] == "E:  [2Ja b"


async def test_of_a_run_that_was_killed_the_parts_count_too(tmp_path: Path) -> None:
    output = await run(tmp_path)
    (output / MANIFEST_FILE).unlink()
    plan = make_plan(rows=ROWS, chunks=6, chunk_rows=50)
    log = make_log(replicas=0, outcome="running", plan=plan)
    (output / LOG_FILE).write_bytes(logs_to_json([log]))
    parts = sorted(output.glob("part-*.parquet"))
    parts[0].unlink()
    told = figures(output)
    assert (told["outcome"], told["rows"], told["failures"]) == ("running", 250, 2)
    assert told["causes"] == {"BadRecord": 2}
    first = report(output).stdout.splitlines()[0]
    assert first.startswith("250 of 300 rows done (83%)")
    assert re.search(r"Last heard of [\d.]+ m?s ago\.$", first)
    (output / LOG_FILE).write_bytes(logs_to_json([make_log(outcome="failed", error="E")]))  # knows of 8,000 rows
    assert figures(output)["rows"] == 8_000


async def test_of_a_killed_run_that_retries_failures_parts_that_it_did_not_come_to_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = await run(tmp_path)

    async def answer_first(chunk: fb.Chunk) -> fb.ChunkReport:
        if chunk.index > 0:
            raise RuntimeError("the driver is killed here")
        return await answer(chunk)

    with pytest.raises(fb.ChunkFailed):  # chunks 0, 2 and 5 hold failed rows; 0 fails again
        await run(tmp_path, run_chunk=answer_first, retry_failures=True, concurrency=1)
    log = make_log(replicas=0, outcome="running", plan=make_plan(rows=ROWS, chunks=6, chunk_rows=50))
    written = (output / RUN_FILE).stat().st_mtime + 60
    os.utime(next(output.glob("part-000000000000-*.parquet")), (written, written))
    for logs in (logs_to_json([log]), (output / LOG_FILE).read_bytes()):
        (output / LOG_FILE).write_bytes(logs)
        caplog.clear()
        told = figures(output)
        assert (told["rows"], told["failures"], told["causes"]) == (ROWS - 100, 1, {"BadRecord": 1})
        assert f"not counted: 100 rows of earlier runs in {output}, of which 2 failed" in caplog.text
    await run(tmp_path)  # finds all rows done
    assert (figures(output)["rows"], figures(output)["failures"]) == (ROWS, 3)


async def test_a_run_that_only_gives_up_rows_tells_of_those_that_are_left(tmp_path: Path) -> None:
    await run(tmp_path)
    output = await run(tmp_path, limit=100, overwrite=True)
    assert (figures(output)["rows"], figures(output)["failures"]) == (100, 1)
    assert pq.read_table(output).num_rows == 100


async def test_a_part_that_can_not_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = await run(tmp_path)
    for name in (LOG_FILE, MANIFEST_FILE):
        (output / name).unlink()
    assert figures(output)["rows"] == ROWS
    assert "can't be read" not in caplog.text
    broken = sorted(output.glob("part-*.parquet"))[0]
    broken.write_bytes(b"")
    assert figures(output)["rows"] == ROWS - 50
    assert f"1 of 6 parts in {output} can't be read, and are not counted; the first is {broken.name}" in caplog.text


async def test_without_a_log_the_parts_tell_what_they_hold(tmp_path: Path) -> None:
    output = await run(tmp_path)
    (output / LOG_FILE).unlink()
    result = report(output)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("297 of 300 rows in the parts have a response; 3 rows failed.")
    assert page(output).table("Failed rows by cause")[1:] == [["BadRecord", "3", "1.0%"]]
    (output / MANIFEST_FILE).unlink()
    sorted(output.glob("part-*.parquet"))[0].unlink()
    told = figures(output)
    assert (told["outcome"], told["rows"], told["failures"], told["seconds"]) == ("unfinished", 250, 2, None)
    assert "the output is not finished" in page(output).all("h1")[0].text
    assert page(output).by_id("fb-content").table("Parameters")


async def test_a_finished_log_is_not_believed_where_a_later_run_took_the_manifest_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = await run(tmp_path)
    (output / MANIFEST_FILE).unlink()  # as a run does that overwrites it, before its first log
    sorted(output.glob("part-*.parquet"))[0].unlink()
    result = report(output)
    assert "the output is not finished" in result.stdout
    assert f"a later run began on {output}, and has written no log" in caplog.text
    assert (figures(output)["outcome"], figures(output)["rows"]) == ("unfinished", 250)


async def test_parts_of_a_run_that_is_being_overwritten_do_not_count(tmp_path: Path) -> None:
    output = await run(tmp_path, code_version="1", chunk_size=20)
    overwritten = {part: part.read_bytes() for part in output.glob("part-*.parquet")}
    await run(tmp_path, code_version="2", overwrite=True)
    for name in (LOG_FILE, MANIFEST_FILE):  # as if it had been killed
        (output / name).unlink()
    sorted(output.glob("part-*.parquet"))[-1].unlink()
    for part, content in overwritten.items():
        part.write_bytes(content)
    assert figures(output)["rows"] == ROWS - 50
    log = make_log(replicas=0, outcome="running", plan=make_plan(rows=ROWS, chunks=6, chunk_rows=50))
    (output / LOG_FILE).write_bytes(logs_to_json([log]))
    assert figures(output)["rows"] == ROWS - 50


@pytest.mark.parametrize("first_row", [100, 120])
async def test_rows_that_were_cut_otherwise_before_count_once(tmp_path: Path, first_row: int) -> None:
    output = await run(tmp_path, chunk_size=20)
    (earlier,) = [part for part in output.glob("part-*.parquet") if f"-{first_row:012d}-" in part.name]
    content = earlier.read_bytes()
    await run(tmp_path, overwrite=True)
    for name in (LOG_FILE, MANIFEST_FILE):
        (output / name).unlink()
    earlier.write_bytes(content)
    os.utime(earlier, (1, 1))
    assert (figures(output)["rows"], figures(output)["failures"]) == (ROWS, 3)


async def test_parts_alone_and_a_run_that_only_began_are_outputs_too(tmp_path: Path) -> None:
    output = await run(tmp_path)
    for name in (LOG_FILE, MANIFEST_FILE):
        (output / name).unlink()
    began = tmp_path / "began"
    began.mkdir()
    (output / RUN_FILE).rename(began / RUN_FILE)
    assert (figures(output)["rows"], figures(began)["rows"]) == (ROWS, 0)
    assert page(began).table("Parameters")[1] == ["prompt", "{question}"]
    assert page(began).all("h1")[0].text.startswith("0 of 0 rows in the parts")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"format_version": 99, "runs": []}',
        b'{"format_version": 1, "runs": [{}]}',
        b'{"format_version": 1, "runs": []}',
    ],
)
async def test_a_broken_log_is_told_and_the_parts_are_used(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    output = await run(tmp_path)
    (output / LOG_FILE).write_bytes(content)
    assert figures(output)["rows"] == ROWS
    assert f"{output / LOG_FILE} can't be understood" in caplog.text
    assert (output / LOG_FILE).read_bytes() == content


@pytest.mark.parametrize("with_log", [True, False])
async def test_a_part_of_a_finished_output_that_is_cut_off_or_gone_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, with_log: bool
) -> None:
    output = await run(tmp_path)
    if not with_log:
        (output / LOG_FILE).unlink()
    assert report(output).exit_code == 0
    assert "can't be read" not in caplog.text
    cut, gone = sorted(output.glob("part-*.parquet"))[2:4]
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    assert report(output).exit_code == 0
    assert f"2 of 6 parts in {output} can't be read" in caplog.text
    assert f"the first is {cut.name}" in caplog.text
    await run(tmp_path)
    caplog.clear()
    assert report(output).exit_code == 0
    assert "can't be read" not in caplog.text


def test_a_run_that_is_silent_for_long_is_not_said_to_be_running(tmp_path: Path) -> None:
    log = make_log(outcome="running", started=STARTED, ended=STARTED + 50)  # by a clock that is far off
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([log]))
    for silent_s, outcome in ((1.0, "running"), (SILENT_S + 60, "unfinished")):
        written = time.time() - silent_s
        os.utime(tmp_path / LOG_FILE, (written, written))
        assert figures(tmp_path)["outcome"] == outcome
    assert page(tmp_path).all("h1")[0].text.startswith("No word any more after 50 s, with 8,000 of 8,000 rows done")


def test_the_page_goes_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log()]))
    result = report(tmp_path, "--html", tmp_path / "other.html")
    assert result.exit_code == 0, result.output
    assert parse((tmp_path / "other.html").read_text()).all("h1")
    assert not (tmp_path / PAGE_FILE).exists()
    assert logs_from_json((tmp_path / LOG_FILE).read_bytes()) == [make_log()]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("missing", "missing is not there"),
        ("file", "file is a file, no folder"),
        ("empty", "empty is no output"),
        ("ftp://x/y", "ftp://x/y"),
    ],
)
def test_what_is_no_output_is_refused_in_one_line(tmp_path: Path, given: str, complaint: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    result = report(given if "://" in given else tmp_path / given)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_page_that_can_not_be_written_costs_the_figures_nothing_and_names_the_option(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log()]))
    (tmp_path / PAGE_FILE).mkdir()
    for where in ((), ("--html", tmp_path / "no" / "such" / "page.html")):
        result = report(tmp_path, *where)
        assert result.exit_code == 1
        assert result.stdout.startswith("8,000 of 8,000 rows answered")
        assert "report:" not in result.stdout
        assert result.stderr.startswith("Error: the page was not written: ")
        assert "name another file with --html" in result.stderr
    told = report(tmp_path, "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["report"] is None
    assert json.loads(told.stdout)["rows"] == 8000


def test_on_a_full_disk_the_figures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(location: Location, data: bytes) -> None:
        raise OSError(errno.ENOSPC, f"can't write {location}: No space left on device")

    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log()]))
    monkeypatch.setattr(storage, "write_atomically", write)
    result = report(tmp_path)
    assert result.exit_code == 1
    assert result.stdout.startswith("8,000 of 8,000 rows answered")
    assert "No space left on device" in result.stderr


def test_it_is_a_command_of_flyte(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log()]))
    done = subprocess.run(
        [FLYTE, "batch", "report", str(tmp_path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8,000 of 8,000 rows answered" in done.stdout


def test_flyte_batch_alone_names_its_commands() -> None:
    done = subprocess.run(
        [FLYTE, "batch"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("report", "load", "check", "dashboards", "kernels"):
        assert re.search(rf"^ +{name} ", done.stdout, re.MULTILINE)
