from __future__ import annotations

import asyncio
import io
import logging
import sys
from typing import Any

import pytest
from rich.console import Console

import flyte_batch as fb
from flyte_batch.errors import BadInput
from flyte_batch.monitoring.details import ChunkDetails, EngineLife, Sample, Stall
from flyte_batch.progress import VARIABLE, RunView, texts
from flyte_batch.progress.figures import Figures, Pace, queues_here
from flyte_batch.progress.frame import Moment, frame
from flyte_batch.progress.texts import idle
from flyte_batch.report.run_log import ChunkEntry, Plan, RunLog


@pytest.fixture(autouse=True)
def _no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def a_log(rows: int = 1000, reused: int = 0, slots: int = 2) -> RunLog:
    log = RunLog("out", "source", {}, Plan(rows, rows // 100, 100, reused, reused // 100, 1, slots, 256, 100.0))
    log.rows = reused
    log.started = Clock.START
    return log


def add(log: RunLog, at: float, rows: int = 100, process: str = "host-1", batcher: str = "b1", **causes: int) -> None:
    """A chunk of ten seconds until ``at``: one to load the model, nine with the device at work for 0.7 of them."""
    samples = (
        Sample(at - 9, (at - 9) * 0.7, (at - 9) * 0.3, 0, 0, 0, 0, 0, 0, 0),
        Sample(at, at * 0.7, at * 0.3, 0, 0, 0, 0, 0, 30, 7),
    )
    life = EngineLife(batcher, "Engine", at - 10, at - 9, at, samples, rows, 10 * rows)
    details = ChunkDetails(process, (life,), causes=causes)
    entry = ChunkEntry(len(log.chunks), rows, sum(causes.values()), 4 * rows, 6 * rows, batcher, at - 10, at)
    log.add_chunk(entry, details)


class Clock:
    START = 1000.0

    def __init__(self) -> None:
        self.now = self.START

    def __call__(self) -> float:
        return self.now


def a_plain_view(log: RunLog) -> tuple[RunView, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return RunView(log, out=out, clock=clock), out, clock


# -- Plain lines ----------------------------------------------------------


def test_a_line_says_how_far_how_fast_and_how_long_still_and_not_more_often_than_every_two_seconds() -> None:
    log = a_log(reused=200)
    view, out, clock = a_plain_view(log)
    with view:
        clock.now += 1
        add(log, clock.now)
        view.refresh()
        assert out.getvalue() == ""  # too soon
        clock.now += 3
        add(log, clock.now, 300, BadRecord=2)
        view.refresh()
        assert out.getvalue() == (
            "600/1,000 rows (60%), 200 by earlier runs, "
            "100 rows/s, 4 s left, 2 failed (BadRecord 2), 1,000 tokens/s, device busy 65%\n"
        )
        clock.now += 0.1
        add(log, clock.now)
        view.refresh()
        assert out.getvalue().count("\n") == 1
        add(log, clock.now, 300)
        view.refresh()
        assert (
            out.getvalue()
            .splitlines()[-1]
            .startswith("1,000/1,000 rows (100%), 200 by earlier runs, 195 rows/s, 2 failed")
        )
    assert out.getvalue().count("\n") == 2  # the last line is not said twice


def test_a_run_that_breaks_off_says_how_far_it_came() -> None:
    log = a_log()
    view, out, clock = a_plain_view(log)

    def break_off() -> None:
        with view:
            clock.now += 1
            add(log, clock.now)
            view.refresh()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert out.getvalue().startswith("100/1,000 rows (10%), 100 rows/s, stopped, 0 failed")


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_the_last_line_of_a_run_that_ended_early_says_how_it_ended_and_not_how_long_is_left(outcome: str) -> None:
    log = a_log(slots=1)
    view, out, clock = a_plain_view(log)
    with view:
        for _ in range(3):
            clock.now += 2
            add(log, clock.now)
            view.refresh()
        assert "14 s left" in out.getvalue().splitlines()[-1]
        log.outcome = outcome  # type: ignore[assignment]
    *_, before, last = out.getvalue().splitlines()
    assert before.startswith("300/1,000 rows (30%), 50 rows/s, 14 s left, 0 failed")
    assert last.startswith(f"300/1,000 rows (30%), 50 rows/s, {outcome}, 0 failed")


def test_a_run_that_ended_before_its_first_row_prints_no_line() -> None:
    log = a_log()
    view, out, _ = a_plain_view(log)
    with view:
        log.outcome = "failed"
    assert out.getvalue() == ""


def test_a_run_with_nothing_to_do_prints_only_what_it_is_told_to_say() -> None:
    view, out, _ = a_plain_view(a_log(reused=1000))
    with view:
        view.say("10 of 10 chunks are finished already")
    view.say("1,000 rows")
    assert out.getvalue() == "10 of 10 chunks are finished already\n1,000 rows\n"


def test_the_most_frequent_causes_are_named_and_the_others_counted() -> None:
    log = a_log()
    view, out, clock = a_plain_view(log)
    with view:
        clock.now += 2
        add(log, clock.now, A=1, B=4, C=3, D=2, E=1)
        view.refresh()
    assert "11 failed (B 4, C 3, D 2, 2 more causes)" in out.getvalue()


def test_off_prints_nothing() -> None:
    log, out = a_log(), io.StringIO()
    with RunView(log, "off", out) as view:
        add(log, 5)
        view.refresh()
        view.say("hello")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("choose", "printed"), [("off", ""), ("plain", "hello\n"), ("auto", "hello\n"), ("", "hello\n")]
)
def test_the_environment_names_the_mode_where_the_code_does_not(
    choose: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, choose)
    out, told = io.StringIO(), io.StringIO()
    with RunView(a_log(), out=out) as view:
        view.say("hello")
    with RunView(a_log(), "plain", out=told) as view:
        view.say("hello")
    assert (out.getvalue(), told.getvalue()) == (printed, "hello\n")


def test_an_unknown_mode_is_refused_by_the_name_that_it_was_given_by(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="progress is 'fancy': choose one of auto, live, plain, off"):
        RunView(a_log(), "fancy")  # type: ignore[arg-type]
    monkeypatch.setenv(VARIABLE, "loud")
    with pytest.raises(BadInput, match="FLYTE_BATCH_PROGRESS is 'loud': choose one of auto, live, plain, off"):
        RunView(a_log())


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_closed_terminal_does_not_cost_the_run(mode: str) -> None:
    out, log = io.StringIO(), a_log(100)
    out.close()
    with RunView(log, mode, out) as view:  # type: ignore[arg-type]
        add(log, 5)
        view.refresh()
        view.say("hello")
    assert log.rows == 100


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_terminal_without_a_letter_gets_it_escaped(mode: str) -> None:
    raw, log = io.BytesIO(), a_log(100)
    out = io.TextIOWrapper(raw, encoding="ascii")
    with RunView(log, mode, out) as view:  # type: ignore[arg-type]
        add(log, 5, Ärger=1)
        view.refresh()
        view.say("größer")
    out.flush()
    assert "gr\\xf6\\xdfer" in raw.getvalue().decode("ascii")
    assert "1 failed (\\xc4rger 1)" in raw.getvalue().decode("ascii")


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_texts_of_others_do_nothing_to_the_terminal(mode: str) -> None:
    out, log = io.StringIO(), a_log(100)
    with RunView(log, mode, out) as view:  # type: ignore[arg-type]
        add(log, 5, **{"\x1b[2Jcause": 1})
        view.refresh()
        view.say("chunk 1: \x1b]0;title\x07 [red]two\nlines")
    assert "chunk 1: \\x1b]0;title\\x07 [red]two\nlines" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\x1b]0" not in out.getvalue()


# -- Figures --------------------------------------------------------------


def test_the_time_left_is_unknown_until_every_slot_has_done_a_chunk_after_its_first() -> None:
    pace = Pace(10_000, slots=3, now=0)
    for end in (60, 61, 62):  # the model's load, and a chunk each
        pace.advance((end - 59) * 100, end)
        assert pace.left(end) is None
    for end in (70, 71):
        pace.advance((end - 66) * 100, end)
        assert pace.left(end) is None
    pace.advance(600, 72)
    assert pace.recent_rate(72) == pytest.approx(30)  # 300 rows since second 62
    assert pace.left(72) == pytest.approx(9400 / 30)
    assert pace.rate(72) == pytest.approx(600 / 72)


def test_with_few_chunks_the_time_left_is_known_after_a_fifth_of_the_rows() -> None:
    pace = Pace(1000, slots=8, now=0)
    pace.advance(199, 10)
    assert pace.left(10) is None
    pace.advance(250, 10)
    assert pace.left(10) == pytest.approx(30)
    assert pace.recent_rate(10) is None


def test_the_time_left_grows_while_nothing_happens() -> None:
    pace = Pace(10_000, slots=1, now=0)
    for end in range(1, 5):
        pace.advance(100 * end, end)
    before = pace.left(4)
    assert before == pytest.approx(96)
    assert (pace.left(40) or 0) > 5 * before


def test_lately_forgets_what_was_long_ago() -> None:
    pace = Pace(100_000, slots=2, now=0)
    for end in range(1, 101):  # slow
        pace.advance(end, end)
    for end in range(101, 161):  # fast
        pace.advance(100 + 50 * (end - 100), end)
    assert pace.recent_rate(160) == pytest.approx(50)
    assert pace.rate(160) == pytest.approx(3100 / 160)


def test_before_the_first_chunk_nothing_is_claimed() -> None:
    pace = Pace(100, slots=1, now=5)
    assert (pace.rate(5), pace.rate(9), pace.left(9), pace.recent_rate(9)) == (0, 0, None, None)


def test_a_replica_is_a_process_however_many_engines_it_had() -> None:
    log = a_log()
    add(log, 20, process="host-1", batcher="dead")
    add(log, 40, process="host-1", batcher="anew")
    add(log, 40, 300, process="host-2", batcher="other")
    log.ended = 40
    figures = Figures.of(log)
    assert [(each.name, each.rows) for each in figures.replicas] == [("host-2", 300), ("host-1", 200)]
    assert figures.replicas[1].rows_per_s == pytest.approx(200 / 29)  # from second 11
    assert figures.replicas[0].shares.utilization == pytest.approx(6.3 / 10)
    assert figures.replicas[1].shares.utilization == pytest.approx(2 * 6.3 / 30)  # ten seconds without an engine
    assert (figures.queued, figures.running) == (60, 14)  # of two living engines, not of three
    assert figures.tokens == 5000
    assert figures.shares == log.time_shares()


def test_a_utilisation_in_doubt_is_one_at_most_in_a_line_and_in_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    log = a_log()
    add(log, 20)
    log.stalls.append(("host-1", Stall(18.5, 7, "parse (mine.py)")))  # of which 2.7 s are the device's free ones
    log.ended = 20
    figures = Figures.of(log)
    assert texts.line(figures, Pace(100, 1, 0), 20, is_over=True).endswith("device busy at most 63%")
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", "100")
    moment = Moment(figures, Pace(100, 1, 0), 20, None, is_over=False)
    Console(file=out).print(frame(moment, 100))
    assert out.getvalue().count("busy at most 63%") == 2  # of all devices, and of its replica


def test_failed_chunks_and_dead_engines_are_counted() -> None:
    log = a_log()
    log.chunks.append(ChunkEntry(0, 100, 0, 0, 0, error="EngineDead"))
    log.died = ["a", "b"]
    figures = Figures.of(log)
    assert (figures.chunks_failed, figures.engine_deaths, figures.done) == (1, 2, 0)


async def test_the_queues_of_this_process_are_those_of_its_batchers() -> None:
    open_gate, on_device = asyncio.Event(), asyncio.Event()

    async def work(batch: list[int]) -> list[int]:
        on_device.set()
        await open_gate.wait()
        return batch

    assert queues_here() is None
    async with fb.DynamicBatcher[int, int](work, max_batch_size=2, target_batch_cost=2, batch_timeout_s=0.0) as batcher:
        futures = [await batcher.submit(each, estimated_cost=1) for each in range(5)]
        await on_device.wait()
        assert queues_here() == (3, 2)
        open_gate.set()
        await asyncio.gather(*futures)
    assert queues_here() is None


def test_what_took_the_other_time_is_named_by_size() -> None:
    log = a_log()
    add(log, 20)
    log.ended, log.outcome = 30, "done"  # ten seconds of tail after ten of a chunk
    assert idle(Figures.of(log).shares) == "tail 50%, starved 14%, loading 5.0%"


def test_logging_goes_where_it_went_before_a_view_that_is_not_live(caplog: pytest.LogCaptureFixture) -> None:
    with RunView(a_log(), "plain", io.StringIO()):
        logging.getLogger("x").warning("hello")
    assert "hello" in caplog.text


def test_a_frame_is_written_at_once_with_what_is_printed_above_it() -> None:
    """A terminal that is given a frame in pieces may show a piece: it would flicker."""
    writes: list[str] = []

    class Recording(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    log = a_log()
    with RunView(log, "live", Recording()) as view:
        add(log, 5)
        view.refresh()
        view.say("said meanwhile")
    frames = [text for text in writes if "\x1b[1A" in text]
    assert len(frames) >= 2  # what was said, and the end
    assert all("rows " in text and "failures" in text for text in frames)
    assert sum("said meanwhile" in text for text in frames) == 1


@pytest.mark.parametrize("mode", ["auto", "plain", "live"])
def test_a_process_without_a_standard_output_shows_nothing(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with RunView(a_log(), mode) as view:
        view.say("somebody reads this")
        view.refresh()
