"""`flyte batch load` and `flyte run --local workflows/load.py main` as a user types them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import flyte_batch as fb
from flyte_batch.cli import batch
from flyte_batch.cli.load import command
from flyte_batch.load.report import TABLE_HEADER, read_report
from tests.helpers import ENVIRONMENT, FLYTE, ROOT, flyte_run, write_jsonl

pyte = pytest.importorskip("pyte")


def batch_load(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``flyte batch load ...``."""
    return subprocess.run(
        [FLYTE, "batch", "load", *options],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def words(text: str) -> str:
    """What was said, however it was cut into lines."""
    return " ".join(text.split())


def inside(*options: str) -> Result:
    """The same in this process."""
    return CliRunner().invoke(batch, ["load", *options], env={"COLUMNS": "100"})


SHORT = ("--seconds", "1", "--warm_up_s", "0.3")
LENIENT = ("--p50_ms", "5000", "--p99_ms", "9000")
"""No test is to depend on how fast a machine is that others use too."""


def test_the_demo_model_is_loaded_at_a_rate_and_the_report_is_written(tmp_path: Path) -> None:
    output = tmp_path / "new" / "load.json"
    run = batch_load("--rate", "20", "--output", str(output), *SHORT, *LENIENT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^ +20 +[\d.]+ +[\d.]+ +0% +100%$", run.stdout, re.MULTILINE)
    assert "is kept at 20 requests/s." in words(run.stdout)
    report = read_report(str(output))
    assert (report.test.choice.engine, report.test.choice.model) == ("ctranslate2", "demo")
    assert "ctranslate2" in report.versions
    (step,) = report.limit.steps
    assert step.ok == step.requests > 5
    assert step.latencies.p50_ms is not None
    assert step.latencies.p50_ms > 0


def test_a_level_that_is_not_kept_at_the_rate_is_exit_code_1_and_says_why(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    run = batch_load("--rate", "20", "--p50_ms", "0.01", "--output", str(output), *SHORT)
    assert run.returncode == 1
    assert "is not kept at 20 requests/s: p50 " in words(run.stdout)
    assert re.search(r"^ +20 +[\d.]+\* ", run.stdout, re.MULTILINE)
    assert not read_report(str(output)).is_kept  # evidence of that, too


def test_interrupted_it_ends_at_once_in_a_word() -> None:
    process = subprocess.Popen(
        [FLYTE, "batch", "load", "--engine", "fake", *SHORT],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background has it ignored
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("       8 "):  # the first step is over
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    *begun, last = filter(None, rest.splitlines())
    assert last.rstrip("!.") == "Aborted"
    assert begun in ([], ["16 requests/s for 1.3 s ..."])


def written(terminal: int) -> Iterator[bytes]:
    """What comes from a terminal until nobody has it open any more."""
    with contextlib.suppress(OSError):  # which is how Linux says that
        while some := os.read(terminal, 4096):
            yield some


def test_what_it_waits_for_is_said_while_it_waits() -> None:
    """Lines where they are kept, beside the table; in a terminal a view, which goes when the load is over."""
    run = batch_load("--engine", "fake", "--rate", "20", *SHORT, *LENIENT)
    assert run.stderr.splitlines() == ["20 requests/s for 1.3 s ..."]
    assert "..." not in run.stdout.partition("\n")[2]
    terminal, shell = os.openpty()
    with subprocess.Popen(
        [FLYTE, "batch", "load", "--engine", "fake", "--rate", "20", *SHORT, *LENIENT],
        cwd=ROOT, env={**ENVIRONMENT, "TERM": "xterm"}, stdout=shell, stderr=shell,
    ) as process:  # fmt: skip
        os.close(shell)
        shown = b"".join(written(terminal)).decode()
        assert process.wait(60) == 0
    os.close(terminal)
    screen = pyte.Screen(100, 24)
    pyte.Stream(screen).feed(shown)
    assert "20 requests/s, warming up" in shown
    assert re.search(r"\d+ requests, \d+ under way, 0 failed", shown)
    lines = [line.rstrip() for line in screen.display]
    assert lines[0] == "fake, demo: loading ..."
    assert lines[1] == TABLE_HEADER
    assert re.match(" +20 .* 100%$", lines[2])
    assert lines[3].startswith("The level ")
    assert not screen.cursor.hidden


def test_what_it_waits_for_is_not_said_when_told_so() -> None:
    run = batch_load("--engine", "fake", "--rate", "20", *SHORT, *LENIENT, FLYTE_BATCH_PROGRESS="off")
    assert run.returncode == 0
    assert run.stderr == ""
    wrong = batch_load("--engine", "fake", "--rate", "20", *SHORT, *LENIENT, FLYTE_BATCH_PROGRESS="loud")
    assert wrong.returncode == 1
    assert "FLYTE_BATCH_PROGRESS is 'loud': choose one of auto, live, plain, off" in words(wrong.stderr)


class Slow(fb.FakeEngine):
    """Takes 40 ms a batch, whatever is in it."""

    def __init__(self, answer: Any = None, **options: Any) -> None:
        super().__init__(answer, seconds_per_batch=0.04, **options)


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyte_batch.engines.fake.FakeEngine", Slow)


@pytest.mark.usefixtures("slow_engine")
def test_without_a_rate_the_highest_is_searched_and_each_step_shown() -> None:
    """Two prompts in 40 ms are 50 a second."""
    batching = ("--max_batch_size", "2", "--max_queue_size", "32", "--start_rate", "16", "--precision", "0.5")
    run = inside("--engine", "fake", *batching, *SHORT, *LENIENT)
    assert run.exit_code == 0, run.output
    rows = re.findall(r"^ +([\d.,]+) +[\d.]+ +[\d.]+ +0% +[\d.]+%\*?$", run.output, re.MULTILINE)
    assert rows[0] == "16"
    found = re.search(r"is kept up to ([\d.]+) requests/s, not at ([\d.]+): availability", words(run.output))
    assert found, run.output
    assert float(found[1]) < float(found[2]) <= 1.5 * float(found[1])
    assert {found[1], found[2]} <= set(rows)
    assert "QueueFull" in run.output


@pytest.mark.usefixtures("slow_engine")
def test_the_output_fits_a_narrow_terminal() -> None:
    run = CliRunner().invoke(
        batch, ["load", "--engine", "fake", "--rate", "30", *SHORT, *LENIENT], env={"COLUMNS": "44"}
    )
    assert run.exit_code == 0, run.output
    assert max(map(len, run.output.splitlines())) <= 44


def test_prompts_come_from_a_file_by_a_template_or_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    class Noting(fb.FakeEngine):
        def prepare(self, prompt: Any) -> Any:
            asked.add(prompt.text)
            return super().prepare(prompt)

    monkeypatch.setattr("flyte_batch.engines.fake.FakeEngine", Noting)
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": i} for i in range(3)])
    common = ("--engine", "fake", "--rate", "20", *SHORT, *LENIENT)
    assert inside("--source", source, "--prompt_template", "say {id}", *common).exit_code == 0
    assert asked == {"say 0", "say 1", "say 2"}
    asked.clear()
    assert inside("--prompt", "only this", *common).exit_code == 0
    assert asked == {"only this"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ctranslate"], r"unknown engine 'ctranslate'.*did you mean ctranslate2"),
        (["--engine", "ctranslate2", "--model", "/nowhere"], r"no folder.*/nowhere|/nowhere"),
        (["--source", "/nowhere.jsonl"], r"/nowhere\.jsonl"),
        (["--rate", "0"], r"rate must be finite and above 0"),
        (["--p99_ms", "1"], r"p99_ms \(1\) is below p50_ms"),
        (["--max_queue_size", "0"], r"max_queue_size must be 1 or more"),
        (["--output", "/proc/nope/x.json"], r"/proc/nope"),
        (["--engine_options", "int8"], r"--engine_options is no JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(options: list[str], message: str) -> None:
    run = inside("--engine", "fake", *SHORT, *options)
    assert run.exit_code == 1
    assert re.search(f"^Error: .*{message}", run.output, re.MULTILINE), run.output
    assert "Traceback" not in run.output


def test_an_engine_that_does_not_start_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(fb.FakeEngine):
        @classmethod
        async def start(cls, *_: Any, **__: Any) -> Any:
            raise fb.EngineDead("the device is gone")

    monkeypatch.setattr("flyte_batch.engines.fake.FakeEngine", Broken)
    run = inside("--engine", "fake", "--rate", "5", *SHORT)
    assert run.exit_code == 1
    assert "Error: the device is gone" in run.output


@pytest.mark.parametrize("rate", [("--rate", "5"), ()])
def test_an_engine_that_does_not_answer_is_one_line_and_exit_code_1(
    rate: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(fb.FakeEngine):
        async def infer(self, batch: Any) -> Any:
            await asyncio.sleep(0.6)
            return await super().infer(batch)

    monkeypatch.setattr("flyte_batch.engines.fake.FakeEngine", Stuck)
    run = inside("--engine", "fake", "--timeout_s", "0.3", "--p50_ms", "100", "--p99_ms", "200", *rate, *SHORT)
    assert run.exit_code == 1
    assert "Error: a request alone was not answered in 0.3 s" in run.output


def test_an_engine_that_dies_is_loaded_anew_and_the_load_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lives: list[fb.FakeEngine] = []

    class Mortal(fb.FakeEngine):
        def __init__(self, answer: Any = None, **options: Any) -> None:
            super().__init__(answer, **options)
            self.records_left = math.inf if lives else 40
            lives.append(self)

        async def infer(self, batch: Any) -> Any:
            self.records_left -= len(batch)
            if self.records_left < 0:
                raise fb.EngineDead("worn out")
            return await super().infer(batch)

    monkeypatch.setattr("flyte_batch.engines.fake.FakeEngine", Mortal)
    run = inside("--engine", "fake", "--rate", "50", *SHORT, *LENIENT)
    assert run.exit_code == 1
    assert re.search(r"is not kept at 50 requests/s: availability \d", words(run.output))
    assert re.search(r"unavailable: \d+ (BatcherDied|EngineDead)", words(run.output))
    assert len(lives) == 2
    assert [life.closed for life in lives] == [True, True]


def test_the_workflow_loads_a_replica_and_returns_what_the_command_would_write(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    run = flyte_run(
        "load.py", "--rate", "20", "--output", str(output),
        "--seconds", "1", "--warm_up_s", "0.3", "--p50_ms", "5000", "--p99_ms", "9000",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "20 requests/s for 1.3 s ...\n20 requests/s, " in run.stdout
    assert "is kept at 20 requests/s." in run.stdout
    assert "LoadReport(" in run.stdout
    report = read_report(str(output))
    assert report.limit.highest_kept_per_s == 20
    assert report.test.choice.model == "demo"
    assert json.loads(output.read_text())["limit"]["steps"][0]["errors"] == {}


def test_the_workflow_refuses_what_cannot_work_in_one_line(tmp_path: Path) -> None:
    run = flyte_run("load.py", "--source", str(tmp_path / "nope.jsonl"), "--engine", "fake", "--rate", "5")
    assert run.returncode != 0
    assert "nope.jsonl" in run.stdout


def test_both_ways_take_the_same_options() -> None:
    from workflows import load as workflow

    defaults = command.make_context("load", []).params
    defaults |= {"rate": defaults.pop("rate_per_s"), "start_rate": defaults.pop("start_per_s")}
    assert defaults == {name: default for name, (_, default) in workflow.main.interface.inputs.items()}
