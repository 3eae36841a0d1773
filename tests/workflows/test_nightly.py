"""The scheduled job: the same run, its paths dated by the trigger's time."""

from __future__ import annotations

from pathlib import Path

import flyte

import flyte_batch as fb
from tests.helpers import flyte_run, questions
from workflows import nightly


def test_a_night_reads_and_writes_the_paths_of_its_day(tmp_path: Path) -> None:
    questions(tmp_path / "2026-01-31.jsonl", 4)
    run = flyte_run(
        "nightly.py", "--trigger_time", "2026-02-01", "--source", str(tmp_path / "{day}.jsonl"),
        "--output", str(tmp_path / "out-{day}"), "--max_failure_rate", "1.0", "--engine", "fake",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert fb.read_output(str(tmp_path / "out-2026-01-31")).num_rows == 4


def test_the_schedule_is_a_cron_that_passes_the_triggers_time() -> None:
    (trigger,) = nightly.main.triggers
    assert isinstance(trigger.automation, flyte.Cron)
    assert trigger.automation.expression == "0 2 * * *"
    assert trigger.inputs == {"trigger_time": flyte.TriggerTime}
