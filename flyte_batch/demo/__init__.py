"""A model of two megabytes and its problems: every part of a run can be tried without a GPU, a download or an account.

``python -m flyte_batch.demo problems --count 1000 --seed 1 --output problems.jsonl`` writes problems the model never
saw in training; the model ``demo`` answers nearly all of them, and every answer can be checked:
``python -m flyte_batch.demo score OUTPUT``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flyte_batch.errors import BadInput


def model_path(format: Literal["ctranslate2", "hf"] = "ctranslate2") -> Path:
    """Folder of the packaged model: ``ctranslate2`` for the CPU engine, ``hf`` (safetensors) for vLLM and transformers.

    Raises:
        BadInput: there is no such format, or this installation came without the model.
    """
    if format not in ("ctranslate2", "hf"):
        raise BadInput(f"the demo model has the formats ctranslate2 and hf, not {format!r}")
    folder = Path(__file__).parent / "model" / format
    if not folder.is_dir():
        raise BadInput(f"this installation has no demo model ({folder} is missing): install flyte-batch again")
    return folder
