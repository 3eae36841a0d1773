"""The demo model's files, and copies of them that may be spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flyte_batch.demo import model_path


@pytest.fixture
def model() -> Path:
    return model_path("ctranslate2")


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model, tmp_path / "model"))
