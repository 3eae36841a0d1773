"""What every test needs: no telemetry, no settings of its caller, no singleton left over from the test before."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import settings

from flyte_batch import singletons

os.environ["DO_NOT_TRACK"] = "1"  # flyte reads it at import

# What changes what is shown: no test is to depend on whether a person or CI runs it (before tests.helpers is imported).
for _name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONUNBUFFERED", "FLYTE_BATCH_PROGRESS"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm-256color"

# The same examples in every run of CI; other ones wherever people run the tests.
settings.register_profile("same_examples", derandomize=True, database=None)
if os.environ.get("FLYTE_BATCH_SAME_EXAMPLES") == "1":
    settings.load_profile("same_examples")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Where a command installed all that tests need (make test-monitoring), one that is skipped is a failure."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("FLYTE_BATCH_NO_SKIPS") == "1":
        terminalreporter.section("skipped tests are failures here (FLYTE_BATCH_NO_SKIPS=1)")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
async def _close_singletons() -> AsyncIterator[None]:
    yield
    await singletons.close_all()
