"""`flyte batch check workflows/...` as a user types it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ENVIRONMENT, FLYTE, ROOT


def batch_check(*options: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FLYTE, "batch", "check", *options],
        cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def checks(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert run.returncode in (0, 1), run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)["checks"]
    return found


NOT_IN_A_FILE = {"load_test.level", "cost_projection.bill"}
"""Missing until somebody shows them."""


@pytest.mark.parametrize(
    ("workflow", "left_to_users"),
    [
        ("generate", {"error_tracking.max_failure_rate", "monitoring.reachable"}),
        (
            "gsm8k",
            {"autoscaling.replicas", "error_tracking.max_failure_rate", "monitoring.backends", "monitoring.report"},
        ),
        ("nightly", {"error_tracking.notifications", "monitoring.reachable"}),
    ],
)
def test_of_the_shipped_workflows_no_more_is_missing_than_is_known(workflow: str, left_to_users: set[str]) -> None:
    run = batch_check(f"workflows/{workflow}.py", "--json", FLYTE_BATCH_MONITORING="logs")
    found = checks(run)
    assert run.returncode == 1
    assert {each["check"] for each in found if each["status"] == "missing"} == NOT_IN_A_FILE | left_to_users
    assert "could not tell" not in {each["status"] for each in found}
    fine = {each["check"] for each in found if each["status"] == "ok"}
    assert fine >= {"limits.retries", "limits.driver", "limits.resources", "deployment.images", "deployment.secrets"}


def test_nightly_is_looked_through_to_the_replicas_that_answer() -> None:
    found = checks(batch_check("workflows/nightly.py", "--json"))
    pools = {each["subject"] for each in found if each["check"] == "autoscaling.concurrency"}
    assert pools == {"generate-cpu", "generate-gpu"}
    assert {each["subject"] for each in found if each["check"] == "error_tracking.max_failure_rate"} == {"nightly.main"}
    triggers = {each["subject"] for each in found if each["check"] == "deployment.schedule"}
    assert triggers == {"nightly.main, trigger every-night"}


@pytest.mark.parametrize("workflow", ["load", "prefetch"])
def test_workflows_that_answer_no_rows_lack_nothing(workflow: str) -> None:
    run = batch_check(f"workflows/{workflow}.py", "--json")
    assert run.returncode == 0
    found = checks(run)
    assert {each["status"] for each in found} == {"ok", "not applicable"}
    areas = [each["check"].partition(".")[0] for each in found]
    assert areas == sorted(areas, key=areas.index)


def test_the_list_is_readable_and_without_colours_where_it_is_piped() -> None:
    run = batch_check("workflows/generate.py", COLUMNS="80", NO_COLOR="")
    assert run.returncode == 1
    assert "\x1b" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80
    lines = run.stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")][1:8] == [
        "autoscaling", "limits", "monitoring", "error tracking", "load test", "cost projection", "deployment",
    ]  # fmt: skip
    assert "  ok              replicas, generate-cpu: 1 to 2 replicas" in lines


def test_it_loads_files_as_flyte_run_does(tmp_path: Path) -> None:
    """Modules beside the file, and those below the folder from which the command is given."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "shared.py").write_text('NAME = "pool"\n')
    (tmp_path / "jobs" / "beside.py").write_text('IMAGE = "me/image:1"\n')
    (tmp_path / "jobs" / "job.py").write_text(
        "import flyte\nfrom shared import NAME\nfrom beside import IMAGE\n"
        "env = flyte.TaskEnvironment(NAME, image=IMAGE)\n@env.task\nasync def main(): ...\n"
    )
    found = checks(batch_check("jobs/job.py", "--json", folder=tmp_path))
    assert {each["subject"] for each in found if each["check"] == "deployment.images"} == {"pool"}


def test_a_file_that_can_t_be_loaded_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import flyte\nflyte.nothing_of_that_name\n")
    run = batch_check("broken.py", folder=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "broken.py can't be loaded: AttributeError" in run.stderr
    assert "Traceback" not in run.stderr
