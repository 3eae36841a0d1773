"""``flyte batch dashboards`` writes what is committed under docs/monitoring, and takes thresholds."""

from __future__ import annotations

import subprocess
from dataclasses import fields
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from flyte_batch.cli.dashboards import command
from flyte_batch.monitoring.alerts import Thresholds
from tests.helpers import ENVIRONMENT, FLYTE, ROOT


def dashboards(*options: str) -> Result:
    return CliRunner().invoke(command, options)


def test_what_is_committed_is_what_it_writes(tmp_path: Path) -> None:
    run = subprocess.run(
        [FLYTE, "batch", "dashboards", "--output", str(tmp_path / "new" / "folder")],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written = {file.name: file.read_text() for file in (tmp_path / "new" / "folder").iterdir()}
    assert set(written) == {"dashboard.json", "alerts.yml", "metrics.md"}
    assert [Path(line).name for line in run.stdout.split()] == ["dashboard.json", "alerts.yml", "metrics.md"]
    hint = "run: .venv/bin/flyte batch dashboards --output docs/monitoring"
    for name, text in written.items():
        assert (ROOT / "docs/monitoring" / name).read_text() == text, hint


def test_thresholds_are_options(tmp_path: Path) -> None:
    run = dashboards("--output", str(tmp_path), "--error_rate", "0.123", "--engine_deaths", "7")
    assert run.exit_code == 0, run.output
    expressions = {
        rule["alert"]: rule["expr"]
        for rule in yaml.safe_load((tmp_path / "alerts.yml").read_text())["groups"][0]["rules"]
    }
    assert "> 0.123" in expressions["FlyteBatchErrorRate"]
    assert ">= 7" in expressions["FlyteBatchEngineRestarts"]


def test_every_threshold_is_in_the_help() -> None:
    text = dashboards("--help").output
    for each in fields(Thresholds):
        assert f"--{each.name}" in text


def test_a_threshold_that_makes_no_sense_is_a_usage_error_and_writes_nothing(tmp_path: Path) -> None:
    run = dashboards("--output", str(tmp_path / "new"), "--starved", "50")
    assert run.exit_code == 2
    assert "starved must be a share between 0 and 1" in run.output
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = dashboards("--output", str(tmp_path / "file" / "folder"))
    assert run.exit_code == 1
    assert str(tmp_path / "file" / "folder") in run.output
