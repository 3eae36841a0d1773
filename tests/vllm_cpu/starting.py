"""Starting vLLM in tests: what all of them want, and the type of the fixture that closes what it started."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from flyte_batch.demo import model_path
from flyte_batch.engines import VLLMEngine
from flyte_batch.records import SamplingParameters

MODEL = model_path("hf")
# Compiling takes longer than all tests together; the executor in the core's own process spares one of three imports.
FAST = {"enforce_eager": True, "distributed_executor_backend": "uni"}


async def start_demo(model: str | Path = MODEL, **options: Any) -> VLLMEngine:
    """The demo model with what all tests want; ``engine_args`` are added to that."""
    arguments = FAST | dict(options.pop("engine_args", {}))
    return await VLLMEngine.start(model, **({"max_model_len": 512} | options), engine_args=arguments)


class Start(Protocol):
    """The fixture ``start``."""

    async def __call__(self, model: str | Path = MODEL, **options: Any) -> VLLMEngine: ...


class Variant(Protocol):
    """The fixture ``variant``."""

    def __call__(self, sampling: SamplingParameters, **sampling_args: Any) -> VLLMEngine: ...
