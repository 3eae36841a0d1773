"""The live view on a real pseudo-terminal, as a terminal emulator shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import FLYTE, ROOT, questions

pyte = pytest.importorskip("pyte")

ENVIRONMENT = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}

PROGRAM = """
import logging, os, sys
early = logging.StreamHandler()  # holds the terminal before the view does
logging.getLogger("early").addHandler(early)
from rich.console import Console
from flyte_batch.monitoring.details import ChunkDetails, EngineLife, Sample
from flyte_batch.progress import RunView
from flyte_batch.report.run_log import ChunkEntry, Plan, RunLog
clock = [1000.0]
log = RunLog("out", "source", {}, Plan(1000, 10, 100, 0, 0, 2, 1, 256, 100.0), started=clock[0])

def chunk(process, causes):
    clock[0] += 10
    at, index = clock[0], len(log.chunks)
    meter = lambda at: Sample(at, at * 0.7, at * 0.3, 0, 0, 0, 0, 0, 3000, 7)
    life = EngineLife(process, "Engine", at - 10, at - 9, at, (meter(at - 9), meter(at)), 100, 1000)
    details = ChunkDetails(process, (life,), causes=causes)
    entry = ChunkEntry(index, 100, sum(causes.values()), 400, 600, process, at - 10, at)
    log.add_chunk(entry, details)
    view.refresh()

view = RunView(log, clock=lambda: clock[0])
with view:
    print("ready")
    for command in open(sys.argv[1]):
        exec(command)
view.say("after")
"""


class Terminal:
    """A program on a pseudo-terminal, and what its user sees."""

    def __init__(
        self, command: list[str], columns: int = 80, lines: int = 24, folder: Path = ROOT, **environment: str
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self.bytes = b""
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background may have it ignored
            self._resize_file(0, columns, lines)
            os.chdir(folder)
            os.execve(command[0], command, ENVIRONMENT | environment)  # noqa: S606
        self._status: int | None = None

    @staticmethod
    def _resize_file(file: int, columns: int, lines: int) -> None:
        fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._resize_file(self._file, columns, lines)

    def type(self, keys: bytes) -> None:
        os.write(self._file, keys)

    @property
    def text(self) -> str:
        """Everything that was shown, scrolled out or not."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def read_until(self, seen: Callable[[], bool], what: str = "", timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not seen():
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{what or 'it'} never came; the screen:\n{self.text}")

    def wait_for(self, text: str) -> None:
        self.read_until(lambda: text in self.text, repr(text))

    def end(self, timeout_s: float = 60) -> int:
        """The rest of its output, then its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            pass
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
            os.close(self._file)
        return self._status

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._file], [], [], max(0.0, timeout_s))
        if not ready:
            return False
        try:
            data = os.read(self._file, 65536)
        except OSError:  # Linux' way to say that the other end is closed
            return False
        self.bytes += data
        self._stream.feed(data)
        return bool(data)

    def close(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._file)


class Run(Terminal):
    """A run that does what it is told, line by line."""

    def __init__(self, folder: Path, columns: int = 80, lines: int = 24, **environment: str) -> None:
        (folder / "program.py").write_text(PROGRAM)
        os.mkfifo(folder / "commands")
        command = [sys.executable, str(folder / "program.py"), str(folder / "commands")]
        super().__init__(command, columns, lines, **environment)
        self._commands = (folder / "commands").open("w", buffering=1)
        self.wait_for("ready")

    def do(self, *commands: str) -> None:
        for command in commands:
            self._commands.write(command + "\n")

    def end(self, timeout_s: float = 60) -> int:
        self._commands.close()
        return super().end(timeout_s)


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start_run(columns: int = 80, lines: int = 24, **environment: str) -> Run:
        runs.append(Run(tmp_path, columns, lines, **environment))
        return runs[-1]

    yield start_run
    for run in runs:
        run.close()


def test_it_shows_what_is_known_of_the_run(start: Start) -> None:
    run = start()
    run.wait_for("0/1,000 rows (0%)")
    run.wait_for("speed     no chunk has ended yet")
    run.wait_for("time left not known yet")
    run.wait_for("0 failed")
    assert "queue" not in run.text  # nobody has told of any
    run.do("chunk('host-1', {'BadRecord': 2})", "chunk('host-2', {})", "chunk('host-1', {})", "chunk('host-2', {})")
    for text in (
        "400/1,000 rows (40%)",
        "speed     10 rows/s (lately 10), 100 tokens/s",
        "time      0:00:40, about 1 min left",
        "devices   busy ",
        "queue     6,000 waiting, 14 on the devices",
        "failures  2 failed (BadRecord 2)",
        "Engine host-1",
        "Engine host-2",
    ):
        run.wait_for(text)
    assert run.screen.cursor.hidden


def test_it_says_which_rows_are_of_earlier_runs(start: Start) -> None:
    run = start()
    run.do("import dataclasses", "view.__exit__(None, None, None)")
    run.do("log.rows, log.plan = 500, dataclasses.replace(log.plan, rows_reused=500, chunks_reused=5)")
    run.do("view = RunView(log, clock=lambda: clock[0]).__enter__()")
    run.wait_for("500/1,000 rows (50%), all by earlier runs")
    run.do("chunk('host-1', {})")
    run.wait_for("600/1,000 rows (60%), 500 by earlier runs\nspeed     10 rows/s")
    run.do("view.__exit__(None, None, None)")


def test_it_leaves_a_summary_and_a_terminal_as_it_was(start: Start) -> None:
    run = start()
    run.do(*["chunk('host-1', {})"] * 10, "log.outcome = 'done'")
    assert run.end() == 0
    lines = [line for line in run.text.splitlines() if line]
    assert lines[0] == "ready"
    assert lines[1].endswith("1,000/1,000 rows (100%)")
    assert "time      0:01:40, done" in lines
    assert lines[-1] == "after"
    assert not any("queue" in line for line in lines)
    assert sum("1,000/1,000" in line for line in lines) == 1  # no frame of before is left over
    assert not run.screen.cursor.hidden


def test_what_others_print_goes_above_it_whole(start: Start) -> None:
    run = start()
    run.wait_for("0/1,000 rows")
    run.do(
        "print('by print')",
        "sys.stderr.write('on standard error\\n')",
        "__import__('click').echo('by click')",
        "logging.getLogger('early').warning('of an early handler')",
        "Console(stderr=True).print('[bold]of another rich console[/bold]')",
        "logging.lastResort.handle(logging.makeLogRecord({'msg': 'of the last resort'}))",
        "view.say('said [red]as it is')",
        "chunk('host-1', {})",
    )
    run.wait_for("100/1,000 rows")
    assert run.end() == 0
    lines = [line for line in run.text.splitlines() if line]
    assert lines[:8] == [
        "ready", "by print", "on standard error", "by click", "of an early handler", "of another rich console",
        "of the last resort", "said [red]as it is",
    ]  # fmt: skip
    assert lines[8].startswith("rows ")
    assert sum(line.startswith("rows ") for line in lines) == 1


def test_it_goes_on_while_others_print_without_a_pause(start: Start, tmp_path: Path) -> None:
    run, enough = start(), tmp_path / "enough"
    run.do("chunk('host-1', {})", f"while not os.path.exists({str(enough)!r}): print('line')")
    run.wait_for("100/1,000 rows")
    enough.touch()
    assert run.end() == 0


def test_afterwards_everything_is_written_to_the_terminal_itself_again(start: Start) -> None:
    run = start()
    run.do("view.__exit__(None, None, None)", "print(type(sys.stdout).__name__, type(sys.stderr).__name__)")
    run.do("print(early.stream is sys.stderr)")
    assert run.end() == 0
    assert "TextIOWrapper TextIOWrapper\nTrue" in run.text


def test_who_kept_the_stream_of_the_view_still_writes_to_the_terminal(start: Start) -> None:
    run = start()
    run.do("kept = sys.stdout", "view.__exit__(None, None, None)", "print('late', file=kept)")
    assert run.end() == 0
    assert "\nlate\n" in run.text


def test_a_redirected_standard_error_stays_where_it_was_directed(start: Start, tmp_path: Path) -> None:
    run = start()
    run.do("view.__exit__(None, None, None)", f"sys.stderr = open({str(tmp_path / 'log')!r}, 'w')")
    run.do("view = RunView(log, clock=lambda: clock[0]).__enter__()", "print('to a file', file=sys.stderr, flush=True)")
    run.do("print('to the terminal')", "view.__exit__(None, None, None)")
    assert run.end() == 0
    assert (tmp_path / "log").read_text() == "to a file\n"
    assert "to the terminal" in run.text
    assert "to a file" not in run.text


@pytest.mark.parametrize("columns", [60, 200])
def test_it_fits_narrow_and_wide_terminals(start: Start, columns: int) -> None:
    run = start(columns)
    run.do(*[f"chunk('a-rather-long-name-of-a-pod-in-some-cluster-7f9c-{i}', {{'BadRecord': 1}})" for i in range(6)])
    run.wait_for("600/1,000 rows (60%)")
    run.wait_for("and 2 more")
    assert run.end() == 0
    frame = run.text.split("ready\n")[1].splitlines()
    labels = [line.split()[0] for line in frame if line and " rows/s  busy " not in line]
    assert labels == ["rows", "speed", "time", "devices", "failures", "replicas", "and", "after"]  # no line is broken
    replicas = [line for line in frame if " rows/s  busy " in line]
    assert [line[-6:] for line in replicas] == ["7f9c-0", "7f9c-1", "7f9c-2", "7f9c-3"]
    assert max(map(len, frame)) <= min(columns, 100)


@pytest.mark.parametrize("columns", [20, 25, 30, 35, 39, 40, 45, 55, 100])
def test_no_number_is_cut_however_few_columns_there_are(start: Start, columns: int) -> None:
    run = start(columns, lines=60)
    run.do(
        "import dataclasses",
        "log.plan = dataclasses.replace(log.plan, rows=987_654_321, rows_reused=1_234_567)",
        "log.rows = 123_456_589",
        "chunk('host-1', {'BadRecord': 23_456_789, 'MissingValue': 1_111_111, 'A': 777, 'B': 2})",
        "log.engines['host-1'].rows = 71_234_000",
        "log.died.append('host-1')",
        "log.chunks.append(dataclasses.replace(log.chunks[0], error='EngineDead'))",
        "chunk('host-2', {})",
    )
    figures = [
        "123,456,789", "987,654,321", "12%", "1,234,567", "6,111,111", "100", "0:00:20", "0", "63%", "27%", "10%",
        "6,000", "14", "24,568,679", "23,456,789", "1,111,111", "777", "1", "1", "1", "7,914,889", "63%", "1", "11.1",
        "63%", "2",
    ]  # fmt: skip

    def shown() -> list[str]:
        return re.findall(r"\d+(?:[,.:]\d+)*%?", run.text.split("ready")[1])

    run.read_until(lambda: shown() == figures, f"{figures}, in place of {shown()}")


def test_a_low_terminal_shows_the_first_lines(start: Start) -> None:
    run = start(lines=5)
    run.do(*[f"chunk('host-{i}', {{}})" for i in range(6)])
    run.read_until(lambda: "600/1,000 rows (60%)" in run.screen.display[0], "the first line at the top")
    assert run.screen.display[1].startswith("speed")


def test_it_follows_the_size_of_the_terminal(start: Start) -> None:
    run = start(columns=120)
    run.do("chunk('host-1', {})")
    run.wait_for("100/1,000 rows")
    run.resize(60, 24)
    run.do("chunk('host-1', {})")
    run.wait_for("200/1,000 rows (20%)")
    run.do("log.outcome = 'done'")
    assert run.end() == 0
    assert run.text.rstrip().splitlines()[-1] == "after"
    assert any(line.startswith("rows") and line.endswith("200/1,000 rows (20%)") for line in run.text.splitlines())


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_can_be_turned_off(start: Start, environment: dict[str, str], coloured: bool) -> None:
    run = start(**environment)
    run.do("chunk('host-1', {'BadRecord': 1})")
    run.wait_for("1 failed")
    assert (re.search(rb"\x1b\[[0-9;]*3[0-9]", run.bytes) is not None) is coloured


def test_a_terminal_without_unicode_gets_none(start: Start) -> None:
    run = start(PYTHONIOENCODING="ascii")
    run.do("chunk('host-1', {'BadRecord': 1})")
    run.wait_for("100/1,000")
    assert run.end() == 0
    assert run.bytes.isascii()
    assert "----" in run.text


@pytest.mark.parametrize(
    "environment",
    [{"CI": "true"}, {"TERM": "dumb"}, {"FLYTE_BATCH_PROGRESS": "plain"}],
    ids=lambda each: next(iter(each)),
)
def test_where_a_live_view_makes_no_sense_there_are_lines(start: Start, environment: dict[str, str]) -> None:
    run = start(columns=120, **environment)
    run.do("print('rich.live' in sys.modules)", "chunk('host-1', {})")
    assert run.end() == 0
    lines = run.text.split()
    assert lines[:2] == ["ready", "False"]
    line = "100/1,000 rows (10%), 10 rows/s, {}, 0 failed, 100 tokens/s, device busy 63%"
    assert f"{line.format('time left not known yet')}\n{line.format('stopped')}\nafter" in run.text
    assert b"\x1b" not in run.bytes


def test_a_second_run_of_the_process_prints_lines_above_the_view(start: Start) -> None:
    run = start()
    run.do("first, view = view, RunView(log, clock=lambda: clock[0]).__enter__()", "chunk('host-1', {})")
    run.do("view.say('by the second')", "view.__exit__(None, None, None)", "view = first", "view.refresh()")
    run.wait_for("by the second")
    run.wait_for(" 100/1,000 rows (10%)")
    assert run.end() == 0
    assert "\n100/1,000 rows (10%), 10 rows/s, time left not known yet" in run.text
    assert sum(line.startswith("rows ") for line in run.text.splitlines()) == 1


def test_a_view_that_fails_is_one_warning_and_costs_no_run(start: Start) -> None:
    run = start()
    run.do("chunk('host-1', {'BadRecord': 1})")
    run.wait_for("1 failed")
    run.do("view._display._live._draw = None", "view._display._live._refresh()", "view._display._live._refresh()")
    run.do("print('still here')")
    run.wait_for("still here")
    assert run.end() == 0
    assert run.text.count("the view of the progress failed") == 1
    assert "100/1,000 rows" in run.text


def test_a_forked_process_writes_to_the_terminal_itself(start: Start, tmp_path: Path) -> None:
    run, told = start(), tmp_path / "told"
    run.do(
        "from pathlib import Path",
        "kinds = lambda: ' '.join(type(each).__name__ for each in (sys.stdout, sys.stderr, early.stream))",
        # In one line: both read from one pipe.
        f"child = os.fork() or (Path({str(told)!r}).write_text(kinds()), os._exit(0))",
        "os.waitpid(child, 0)",
        "print(kinds())",
    )
    run.wait_for("_AboveProxy _AboveProxy _AboveProxy")
    assert told.read_text() == "TextIOWrapper TextIOWrapper TextIOWrapper"
    assert run.end() == 0


def test_ctrl_c_gives_the_cursor_back_and_says_how_far_it_came(start: Start, tmp_path: Path) -> None:
    run, resting = start(), tmp_path / "resting"
    run.do("chunk('host-1', {})", f"open({str(resting)!r}, 'w').close(); __import__('time').sleep(60)")
    run.wait_for("100/1,000 rows")
    assert run.screen.cursor.hidden
    run.read_until(resting.exists, "that the program draws nothing itself")
    run.type(b"\x03")
    assert run.end() != 0
    assert not run.screen.cursor.hidden
    assert "time      0:00:10, stopped" in run.text
    assert run.text.index("stopped") < run.text.index("KeyboardInterrupt")


INTERRUPTED = """
import io, os, signal, sys
from flyte_batch.progress import RunView
from flyte_batch.report.run_log import Plan, RunLog

class Interrupting(io.TextIOBase):
    encoding = "utf-8"
    moments = sys.argv[1:]

    def write(self, text):
        if self.moments and self.moments[0] in text:
            self.moments.pop()
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1_000_000):  # time to hear of it
                pass
        sys.__stdout__.write(text)
        sys.__stdout__.flush()

log = RunLog("out", "source", {}, Plan(1000, 10, 100, 0, 0, 2, 1, 256, 100.0), started=1000.0)
with RunView(log, "live", Interrupting(), clock=lambda: 1010.0) as view:
    view.say("a line above")
"""


@pytest.mark.parametrize("moment", ["a line above", "stopped"])
def test_ctrl_c_in_the_moment_of_drawing_breaks_nothing_off(tmp_path: Path, moment: str) -> None:
    (tmp_path / "program.py").write_text(INTERRUPTED)
    terminal = Terminal([sys.executable, str(tmp_path / "program.py"), moment])
    assert terminal.end() != 0
    lines = [line for line in terminal.text.splitlines() if line]
    assert lines[0] == "a line above"
    assert lines[1].endswith("0/1,000 rows (0%)")
    assert lines[3] == "time      0:00:10, stopped"
    assert lines[5].startswith("Traceback")
    assert lines[-1] == "KeyboardInterrupt"
    assert not terminal.screen.cursor.hidden


def test_ctrl_c_in_the_first_frame_gives_the_terminal_back(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INTERRUPTED)
    terminal = Terminal([sys.executable, str(tmp_path / "program.py"), "0/1,000 rows"])
    assert terminal.end() != 0
    lines = [line for line in terminal.text.splitlines() if line]
    assert lines[0].endswith("0/1,000 rows (0%)")
    assert "a line above" not in terminal.text
    assert lines[-1] == "KeyboardInterrupt"
    assert not terminal.screen.cursor.hidden


ABORTED = """
import io, sys, threading, time
from flyte_batch.progress import RunView
from flyte_batch.report.run_log import Plan, RunLog

class Meanwhile(io.TextIOBase):
    encoding = "utf-8"
    other = threading.Thread(target=lambda: print("Aborted.", file=sys.stderr))

    def write(self, text):
        if "stopped" in text:
            self.other.start()
            while self.other.is_alive() and view._display._live._drawer._jobs.empty():
                time.sleep(0.001)
        sys.__stdout__.write(text)
        sys.__stdout__.flush()

log = RunLog("out", "source", {}, Plan(1000, 10, 100, 0, 0, 2, 1, 256, 100.0), started=1000.0)
with RunView(log, "live", Meanwhile(), clock=lambda: 1010.0) as view:
    pass
Meanwhile.other.join()
"""


def test_what_others_write_while_the_last_frame_is_drawn_is_not_drawn_over(tmp_path: Path) -> None:
    """Flyte's local mode writes when Ctrl-C is typed, while the driver ends on another thread."""
    (tmp_path / "program.py").write_text(ABORTED)
    terminal = Terminal([sys.executable, str(tmp_path / "program.py")])
    assert terminal.end() == 0
    lines = [line.split()[0] for line in terminal.text.splitlines() if line]
    assert lines == ["rows", "speed", "time", "failures", "Aborted."]


def test_the_end_of_the_interpreter_gives_the_cursor_back(start: Start) -> None:
    """In Flyte's local mode a driver runs on a thread, which Ctrl-C does not reach."""
    run = start()
    run.do("view.__exit__(None, None, None)", "second = RunView(log).__enter__()", "print('second view')")
    run.wait_for("second view")
    run.read_until(lambda: run.screen.cursor.hidden, "a view without a cursor")
    run.do("raise SystemExit(3)")
    assert run.end() == 3
    assert not run.screen.cursor.hidden
    assert run.text.rstrip().splitlines()[-2].endswith(", stopped")


# -- Flyte's local mode ---------------------------------------------------


def flyte_run(source: str, output: Path, *options: str, **environment: str) -> Terminal:
    command = [FLYTE, "run", "--local", "workflows/generate.py", "main", "--source", source, "--output", str(output)]
    return Terminal([*command, "--engine", "fake", *options], columns=100, lines=40, **environment)


def test_a_flyte_run_on_a_terminal_has_a_live_view(tmp_path: Path) -> None:
    terminal = flyte_run(questions(tmp_path / "in.jsonl", 500), tmp_path / "out", "--chunk_size", "50")
    assert terminal.end() == 0
    lines = [line.rstrip() for line in terminal.text.splitlines() if line.strip()]
    rows = [line for line in lines if line.startswith("rows ")]
    assert len(rows) == 1
    assert rows[0].endswith("500/500 rows (100%)")
    assert any(line.startswith("time ") and line.endswith("done") for line in lines)
    assert any(line.startswith("500 rows, 0 failed; ") for line in lines)
    assert any("Completed Local Run" in line for line in lines)
    assert not terminal.screen.cursor.hidden


SLOW = """
import flyte_batch as fb

replicas = fb.replica_environment("slow", image="some/image:1")
driver = fb.driver_environment("driver", image="some/image:1", depends_on=[replicas])

@fb.singleton
async def solver():
    return fb.EngineBatcher(fb.FakeEngine(seconds_per_batch=600))

@replicas.task
async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")

@driver.task
async def main(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk, chunk_size=10)
"""


def test_ctrl_c_in_a_flyte_run_gives_the_cursor_back(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    source, output = questions(tmp_path / "in.jsonl", 40), str(tmp_path / "out")
    command = [FLYTE, "run", "--local", "slow.py", "main", "--source", source, "--output", output]
    terminal = Terminal(command, folder=tmp_path)
    terminal.wait_for(" on the devices")
    terminal.read_until(lambda: " 0 on the devices" not in terminal.text, "a record on the device")
    assert terminal.screen.cursor.hidden
    terminal.type(b"\x03")
    assert terminal.end() != 0
    assert not terminal.screen.cursor.hidden
    assert re.search(r"time +0:0\d:\d\d, (stopped|cancelled)", terminal.text)
    assert "Aborted." in terminal.text
    assert len(re.findall("^rows ", terminal.text, re.MULTILINE)) == 1


def test_ctrl_c_in_a_load_test_takes_its_view_away() -> None:
    terminal = Terminal([FLYTE, "batch", "load", "--engine", "fake", "--seconds", "60"], columns=100)
    terminal.wait_for(" under way, 0 failed")
    assert terminal.screen.cursor.hidden
    terminal.type(b"\x03")
    assert terminal.end() == 1
    assert not terminal.screen.cursor.hidden
    assert "under way" not in terminal.text
    assert terminal.text.rstrip().splitlines()[-1].startswith("Aborted")


def test_a_flyte_run_that_is_told_so_prints_nothing_of_its_progress(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 50)
    terminal = flyte_run(source, tmp_path / "out", FLYTE_BATCH_PROGRESS="off")
    assert terminal.end() == 0
    assert "50 rows" not in terminal.text
    assert "50/50" not in terminal.text
    assert "Completed Local Run" in terminal.text
