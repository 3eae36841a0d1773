"""Batch inference for Flyte 2: point it at a dataset and a model; it fills every device and loses no row.

Importing this package is cheap: it loads no engine, no pyarrow, no torch and no flyte. Each public name loads its
module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flyte_batch.batching import BatchStats as BatchStats
    from flyte_batch.batching import ContinuousBatcher as ContinuousBatcher
    from flyte_batch.batching import DynamicBatcher as DynamicBatcher
    from flyte_batch.batching import EngineBatcher as EngineBatcher
    from flyte_batch.batching import TokenBatcher as TokenBatcher
    from flyte_batch.data.chunks import Chunk as Chunk
    from flyte_batch.data.chunks import ChunkReport as ChunkReport
    from flyte_batch.data.output import read_output as read_output
    from flyte_batch.device_calls import device_at_work as device_at_work
    from flyte_batch.device_calls import device_worked as device_worked
    from flyte_batch.driver import RunSummary as RunSummary
    from flyte_batch.driver import run as run
    from flyte_batch.engines.base import ContinuousEngine as ContinuousEngine
    from flyte_batch.engines.base import Engine as Engine
    from flyte_batch.engines.ctranslate2 import CTranslate2Engine as CTranslate2Engine
    from flyte_batch.engines.fake import FakeContinuousEngine as FakeContinuousEngine
    from flyte_batch.engines.fake import FakeEngine as FakeEngine
    from flyte_batch.engines.vllm import VLLMEngine as VLLMEngine
    from flyte_batch.environments import check_environment as check_environment
    from flyte_batch.environments import driver_environment as driver_environment
    from flyte_batch.environments import replica_environment as replica_environment
    from flyte_batch.environments import require_shared as require_shared
    from flyte_batch.environments import runs_here as runs_here
    from flyte_batch.environments import slots as slots
    from flyte_batch.errors import BadImage as BadImage
    from flyte_batch.errors import BadInput as BadInput
    from flyte_batch.errors import BadRecord as BadRecord
    from flyte_batch.errors import BadResponse as BadResponse
    from flyte_batch.errors import BatcherDied as BatcherDied
    from flyte_batch.errors import BatcherNotRunning as BatcherNotRunning
    from flyte_batch.errors import ChunkFailed as ChunkFailed
    from flyte_batch.errors import DeadlineExceeded as DeadlineExceeded
    from flyte_batch.errors import EngineDead as EngineDead
    from flyte_batch.errors import EngineOutOfMemory as EngineOutOfMemory
    from flyte_batch.errors import FlyteBatchError as FlyteBatchError
    from flyte_batch.errors import MissingValue as MissingValue
    from flyte_batch.errors import PromptTooLong as PromptTooLong
    from flyte_batch.errors import QueueFull as QueueFull
    from flyte_batch.errors import TooManyFailures as TooManyFailures
    from flyte_batch.model_store import PrefetchedModel as PrefetchedModel
    from flyte_batch.model_store import prefetch as prefetch
    from flyte_batch.pipeline import Failure as Failure
    from flyte_batch.pipeline import Pipeline as Pipeline
    from flyte_batch.prompts import ChatColumn as ChatColumn
    from flyte_batch.prompts import PromptTemplate as PromptTemplate
    from flyte_batch.records import Chat as Chat
    from flyte_batch.records import Completion as Completion
    from flyte_batch.records import CostEstimator as CostEstimator
    from flyte_batch.records import Prompt as Prompt
    from flyte_batch.records import SamplingParameters as SamplingParameters
    from flyte_batch.records import StructuredOutput as StructuredOutput
    from flyte_batch.records import TokenEstimator as TokenEstimator
    from flyte_batch.singletons import singleton as singleton
    from flyte_batch.warming import waking_replicas as waking_replicas
    from flyte_batch.warming import warm_up as warm_up
    from flyte_batch.worker import infer as infer

_HOMES = {
    "batching": ("BatchStats", "ContinuousBatcher", "DynamicBatcher", "EngineBatcher", "TokenBatcher"),
    "data.chunks": ("Chunk", "ChunkReport"),
    "data.output": ("read_output",),
    "device_calls": ("device_at_work", "device_worked"),
    "driver": ("RunSummary", "run"),
    "engines.base": ("ContinuousEngine", "Engine"),
    "engines.ctranslate2": ("CTranslate2Engine",),
    "engines.fake": ("FakeContinuousEngine", "FakeEngine"),
    "engines.vllm": ("VLLMEngine",),
    "environments": (
        "check_environment", "driver_environment", "replica_environment", "require_shared", "runs_here", "slots",
    ),
    "errors": (
        "BadImage", "BadInput", "BadRecord", "BadResponse", "BatcherDied", "BatcherNotRunning", "ChunkFailed",
        "DeadlineExceeded", "EngineDead", "EngineOutOfMemory", "FlyteBatchError", "MissingValue", "PromptTooLong",
        "QueueFull", "TooManyFailures",
    ),
    "model_store": ("PrefetchedModel", "prefetch"),
    "pipeline": ("Failure", "Pipeline"),
    "prompts": ("ChatColumn", "PromptTemplate"),
    "records": (
        "Chat", "Completion", "CostEstimator", "Prompt", "SamplingParameters", "StructuredOutput", "TokenEstimator",
    ),
    "singletons": ("singleton",),
    "warming": ("waking_replicas", "warm_up"),
    "worker": ("infer",),
}  # fmt: skip
_MODULE_OF = {name: f"flyte_batch.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flyte_batch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
