"""``docs/reliability.md`` says what the tests that ran before this one saw. Runs last, for its name."""

from __future__ import annotations

import os

import pytest

from tests.runtime import reliability


def test_the_documents_table_is_what_this_run_saw(request: pytest.FixtureRequest) -> None:
    outcomes = request.config.stash[reliability.OUTCOMES]
    if len(outcomes) < request.config.stash[reliability.MARKED]:
        pytest.skip("not every fault was staged in this run")
    if os.environ.get("FLYTE_BATCH_WRITE_TABLE") == "1":
        reliability.write(outcomes)
    assert reliability.missing(outcomes) == [], "run: make reliability"
