"""What every test needs: no telemetry, no singleton left over from the test before."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from flyte_batch import singletons

os.environ["DO_NOT_TRACK"] = "1"  # flyte reads it at import


@pytest.fixture(autouse=True)
async def _close_singletons() -> AsyncIterator[None]:
    yield
    await singletons.close_all()
