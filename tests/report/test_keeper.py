"""The keeper: a report while the run goes on and at its end, and never at the run's cost."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from flyte_batch.data import storage
from flyte_batch.data.storage import Location
from flyte_batch.report import keeper
from flyte_batch.report.answer import tokens_done
from flyte_batch.report.history import LOG_FILE, MOST_RUNS, logs_of, other_logs
from flyte_batch.report.keeper import PAGE_FILE, ReportKeeper, pause_s
from flyte_batch.report.run_log import ChunkEntry, RunLog, logs_from_json, logs_to_json
from tests.helpers import ENVIRONMENT, ROOT
from tests.report.logs import STARTED, make_log, with_stalls
from tests.report.outputs import write_output
from tests.report.parsing import parse


class Shown:
    """What was published."""

    def __init__(self) -> None:
        self.fragments: list[str] = []
        self.one_more = asyncio.Event()

    async def __call__(self, fragment: str) -> None:
        self.fragments.append(fragment)
        self.one_more.set()

    async def wait(self) -> str:
        await asyncio.wait_for(self.one_more.wait(), 20)
        self.one_more.clear()
        return self.fragments[-1]


def kept(folder: Path) -> list[RunLog]:
    return logs_from_json((folder / LOG_FILE).read_bytes())


def running_log() -> RunLog:
    return make_log(outcome="running", started=time.time() - 100, ended=0.0)


def finish(log: RunLog) -> None:
    log.outcome, log.ended = "done", time.time()


async def test_at_the_end_log_page_and_fragment_tell_how_it_ended(tmp_path: Path) -> None:
    log, shown = running_log(), Shown()
    async with ReportKeeper(log, storage.locate(tmp_path), shown) as keeper_of_it:
        finish(log)
        assert not keeper_of_it.has_page
    assert keeper_of_it.has_page
    assert kept(tmp_path) == [log]
    assert len(shown.fragments) == 1
    for html in (*shown.fragments, (tmp_path / PAGE_FILE).read_text()):
        assert parse(html).all("h1")[0].text.startswith("8,000 of 8,000 rows answered")


async def test_while_the_run_goes_on_the_log_is_written_and_the_fragment_published(tmp_path: Path) -> None:
    log, shown = running_log(), Shown()
    async with ReportKeeper(log, storage.locate(tmp_path), shown, every_s=0.01):
        assert "8,000 of 8,000 rows done" in await shown.wait()
        assert abs(log.ended - time.time()) < 60
        assert kept(tmp_path)[0].outcome == "running"
        assert not (tmp_path / PAGE_FILE).exists()
        log.count(1000, 0, 0, 0, {}, {}, {})
        while "9,000" not in await shown.wait():
            pass
        finish(log)
    assert kept(tmp_path) == [log]


async def test_the_page_shows_the_answers_that_are_there_at_the_end(tmp_path: Path) -> None:
    """Rows that failed may have been done again since the first fragment."""
    log, shown, rows = running_log(), Shown(), [{"q": f"{n}"} for n in range(8)]
    write_output(tmp_path / "out", rows, failed=frozenset(range(8)))
    folder = storage.locate(tmp_path / "out")
    async with ReportKeeper(log, folder, shown, every_s=0.01):
        assert "bad 0" in await shown.wait()
        write_output(tmp_path / "out", rows)
        finish(log)
    for html in (shown.fragments[-1], (tmp_path / "out" / PAGE_FILE).read_text()):
        assert "answer 0" in html
        assert "bad 0" not in html


PROGRAM = """
import asyncio, sys, threading, time
from pathlib import Path
from flyte_batch.report import keeper

def write():
    writing.set()
    time.sleep(0.5)
    Path(sys.argv[1]).write_text("whole")

writing = threading.Event()
threading.Thread(target=lambda: asyncio.run(keeper._on_thread(write)), daemon=True).start()  # as Flyte's, of a driver
writing.wait()
"""


def test_a_report_under_way_is_written_before_the_interpreter_ends(tmp_path: Path) -> None:
    report = tmp_path / "report"
    subprocess.run([sys.executable, "-c", PROGRAM, str(report)], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=60)
    assert report.read_text() == "whole"


@pytest.mark.parametrize(("took_s", "wait_s"), [(0.0, 10.0), (0.5, 10.0), (1.0, 19.0), (60.0, 1140.0)])
def test_reports_take_a_twentieth_of_the_time_at_most(took_s: float, wait_s: float) -> None:
    assert pause_s(10.0, took_s) == pytest.approx(wait_s)


async def test_the_module_publishes_for_keepers_that_are_given_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, log = Shown(), running_log()
    monkeypatch.setattr(keeper, "publisher", shown)
    async with ReportKeeper(log, storage.locate(tmp_path)):
        finish(log)
    assert len(shown.fragments) == 1


async def test_earlier_runs_are_kept_the_last_one_whole_and_of_others_their_sums(tmp_path: Path) -> None:
    earlier = []
    for index in range(MOST_RUNS + 5):
        log = with_stalls(make_log(started=STARTED + index), ("f (a.py:1)", 1.5))
        engine = log.engines["batcher-0"]
        engine.samples.insert(1, engine.samples[0])
        log.chunks.append(ChunkEntry(90, 100, 0, 0, 0, error="EngineDead"))
        earlier.append(log)
    (tmp_path / LOG_FILE).write_bytes(logs_to_json(earlier))
    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path)):
        finish(log)
    logs = kept(tmp_path)
    assert [each.started for each in logs[:-1]] == [STARTED + index for index in range(6, MOST_RUNS + 5)]
    assert logs[-2:] == [earlier[-1], log]
    assert len(logs) == MOST_RUNS
    first, whole = logs[0], earlier[6]
    for name in ("rows", "rows_done", "failures", "causes", "seconds", "replica_seconds"):
        assert getattr(first, name) == getattr(whole, name), name
    assert tokens_done(first) == tokens_done(whole)
    assert first.time_shares().busy == whole.time_shares().busy
    assert (len(first.chunks), len(first.engines["batcher-0"].samples), first.stalls) == (2, 2, [])


async def test_an_earlier_run_that_was_killed_is_not_said_to_go_on(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([running_log()]))
    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path)):
        finish(log)
    assert [each.outcome for each in kept(tmp_path)] == ["unfinished", log.outcome]
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([running_log(), log]))
    assert [each.outcome for each in logs_of(storage.locate(tmp_path))] == ["unfinished", log.outcome]


async def test_a_run_that_had_nothing_to_do_costs_the_one_before_nothing(tmp_path: Path) -> None:
    done = make_log()
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([done]))
    for _ in range(2):
        log = make_log(replicas=0, started=time.time() - 1, ended=time.time())
        async with ReportKeeper(log, storage.locate(tmp_path)):
            pass
    assert kept(tmp_path)[0] == done
    assert parse((tmp_path / PAGE_FILE).read_text()).table("All replicas over time")


async def test_of_two_drivers_on_one_output_at_once_both_runs_are_kept(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(logs_to_json([make_log()]))
    first, second = running_log(), running_log()
    shown, shown_too = Shown(), Shown()
    async with ReportKeeper(first, storage.locate(tmp_path), shown, every_s=3600, first_s=0.01):
        await shown.wait()
        async with ReportKeeper(second, storage.locate(tmp_path), shown_too, every_s=3600, first_s=0.01):
            await shown_too.wait()
            assert [log.outcome for log in kept(tmp_path)] == ["done", "running", "running"]
            finish(second)
        finish(first)
    logs = kept(tmp_path)
    assert [(log.started, log.outcome) for log in logs] == [
        (STARTED, "done"),
        (second.started, "done"),
        (first.started, "done"),
    ]
    assert logs[1:] == [second, first]


@pytest.mark.parametrize(("ended", "outcome"), [(-1.0, "unfinished"), (150.0, "running"), (20.0, "unfinished")])
def test_a_run_of_another_driver_goes_on_while_its_log_is_written(tmp_path: Path, ended: float, outcome: str) -> None:
    own = make_log(outcome="running", started=STARTED + 1, ended=STARTED + 160)
    other = make_log(outcome="running", started=STARTED - 50, ended=STARTED + ended)
    (known,) = other_logs(storage.locate(tmp_path), logs_to_json([other]), own)
    assert known.outcome == outcome


async def test_a_log_that_nobody_else_wrote_is_read_and_not_made_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_out: list[bytes] = []

    def count(folder: Location, data: bytes, own: RunLog) -> list[RunLog]:
        made_out.append(data)
        return other_logs(folder, data, own)

    monkeypatch.setattr(keeper, "other_logs", count)
    left = logs_to_json([make_log()])
    (tmp_path / LOG_FILE).write_bytes(left)
    log, shown = running_log(), Shown()
    async with ReportKeeper(log, storage.locate(tmp_path), shown, every_s=0.01):
        for _ in range(3):
            await shown.wait()
        finish(log)
    assert made_out == [left]
    assert len(kept(tmp_path)) == 2


async def test_a_broken_log_of_earlier_runs_is_a_warning_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LOG_FILE).write_text("{")
    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path)):
        finish(log)
    assert kept(tmp_path) == [log]
    assert "what earlier runs left" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no UI today"), TimeoutError("no UI today"), OSError("no UI today")])
async def test_whatever_fails_is_one_warning_and_no_error(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = Shown()

    async def broken(fragment: str) -> None:
        await shown(fragment)
        raise error

    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path), broken, every_s=0.01):
        for _ in range(3):
            await shown.wait()
        finish(log)
    assert [record.getMessage() for record in caplog.records] == [
        f"the run's report is not up to date: {type(error).__name__}: no UI today"
    ]
    assert kept(tmp_path) == [log]


async def test_a_folder_that_takes_no_files_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path / "missing")) as kept_nowhere:
        finish(log)
    assert not kept_nowhere.has_page
    assert "not up to date" in caplog.text
    assert log.outcome == "done"


class _Hanging:
    """A store that is away, until it is let go."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()

    def location(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
        write = storage.write_atomically

        def hang(location: Location, data: bytes) -> None:
            self.asked.set()
            self.go.wait(60)
            write(location, data)

        monkeypatch.setattr(storage, "write_atomically", hang)
        return Location(pafs.LocalFileSystem(), str(folder))


async def test_a_store_that_is_away_delays_the_end_no_longer_than_the_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging, log = _Hanging(), running_log()
    folder = hanging.location(tmp_path, monkeypatch)
    try:
        async with ReportKeeper(log, folder, every_s=0.01, patience_s=0.1):
            await asyncio.to_thread(hanging.asked.wait, 20)
            finish(log)
        assert caplog.messages == ["the run's report is not up to date: it was not written within 0.1 s"]
        assert not (tmp_path / LOG_FILE).exists()
    finally:
        hanging.go.set()


async def test_a_log_that_was_held_up_never_replaces_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, log = _Hanging(), running_log()
    folder = hanging.location(tmp_path, monkeypatch)
    async with ReportKeeper(log, folder, every_s=0.01):
        await asyncio.to_thread(hanging.asked.wait, 20)
        finish(log)
        hanging.go.set()
    assert kept(tmp_path) == [log]
    assert (tmp_path / PAGE_FILE).exists()


async def test_a_cancelled_run_has_its_report_too(tmp_path: Path) -> None:
    log, inside = running_log(), asyncio.Event()

    async def work() -> None:
        async with ReportKeeper(log, storage.locate(tmp_path)):
            inside.set()
            try:
                await asyncio.Event().wait()
            finally:
                log.outcome, log.ended, log.error = "cancelled", time.time(), "CancelledError"

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kept(tmp_path) == [log]
    assert "Cancelled after" in (tmp_path / PAGE_FILE).read_text()


async def test_an_error_of_the_body_passes_through(tmp_path: Path) -> None:
    log = running_log()

    async def work() -> None:
        async with ReportKeeper(log, storage.locate(tmp_path)):
            log.outcome, log.ended = "failed", time.time()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert kept(tmp_path) == [log]


async def test_where_no_thread_can_be_started_any_more_the_report_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    log = running_log()
    async with ReportKeeper(log, storage.locate(tmp_path)):
        finish(log)
        monkeypatch.setattr(threading.Thread, "start", refuse)
    assert kept(tmp_path) == [log]


async def test_a_log_that_grows_while_a_thread_reads_it_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, shown = running_log(), Shown()
    other = make_log(replicas=1).engines["batcher-0"]
    async with ReportKeeper(log, storage.locate(tmp_path), shown, every_s=0.001):
        for number in range(400):
            log.engines[f"more-{number}"] = other
            log.causes[f"cause-{number}"] = 1
            log.chunks.append(log.chunks[0])
            await asyncio.sleep(0.001)
        finish(log)
    assert caplog.records == []
    assert len(kept(tmp_path)[0].chunks) == 80 + 400


@pytest.fixture(autouse=True)
def _warnings_are_caught(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flyte_batch")
