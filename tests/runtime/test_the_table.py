"""``docs/reliability.md`` says what the tests that ran before this one saw. Runs last, for its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.runtime import reliability


def all_faults() -> set[str]:
    """Every test that is marked ``fault``, whichever of them this session was asked for."""
    listing = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "fault", str(Path(__file__).parent)]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in listed.stdout.splitlines() if line.startswith("tests/runtime/") and "::" in line}


def test_the_documents_table_is_what_this_run_saw(request: pytest.FixtureRequest) -> None:
    outcomes, skipped = request.config.stash[reliability.OUTCOMES], request.config.stash[reliability.SKIPPED]
    writes = os.environ.get("FLYTE_BATCH_WRITE_TABLE") == "1"
    lacking = all_faults() - outcomes.keys() - (set() if writes else skipped.keys())
    if lacking:
        (pytest.fail if writes else pytest.skip)(f"the table needs all faults; not passed in this run: {len(lacking)}")
    if writes:
        reliability.write(list(outcomes.values()))
    left = reliability.missing(list(outcomes.values()), tuple(skipped.values()))
    assert left == [], "run: make reliability"
