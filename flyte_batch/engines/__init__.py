"""Engines: what turns records into results. Importing this loads none of them, nor the libraries they stand on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flyte_batch.engines.base import ContinuousEngine, Engine

if TYPE_CHECKING:
    from flyte_batch.engines.choice import EngineChoice, choose_engine, start_engine
    from flyte_batch.engines.ctranslate2 import CTranslate2Engine
    from flyte_batch.engines.fake import FakeContinuousEngine, FakeEngine
    from flyte_batch.engines.options import check_engine_options
    from flyte_batch.engines.vllm import VLLMEngine

__all__ = [
    "CTranslate2Engine",
    "ContinuousEngine",
    "Engine",
    "EngineChoice",
    "FakeContinuousEngine",
    "FakeEngine",
    "VLLMEngine",
    "check_engine_options",
    "choose_engine",
    "start_engine",
]

_HOMES = {
    "CTranslate2Engine": "ctranslate2",
    "FakeContinuousEngine": "fake",
    "FakeEngine": "fake",
    "VLLMEngine": "vllm",
    "EngineChoice": "choice",
    "check_engine_options": "options",
    "choose_engine": "choice",
    "start_engine": "choice",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
