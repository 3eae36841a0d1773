"""Forming batches out of the records of many concurrent callers."""

from flyte_batch.batching.base import Overflow
from flyte_batch.batching.batcher import DynamicBatcher, TokenBatcher
from flyte_batch.batching.continuous import ContinuousBatcher
from flyte_batch.batching.engine_batcher import EngineBatcher
from flyte_batch.batching.packing import BatchCost
from flyte_batch.batching.processing import ProcessFn
from flyte_batch.batching.stats import BatchStats

__all__ = [
    "BatchCost",
    "BatchStats",
    "ContinuousBatcher",
    "DynamicBatcher",
    "EngineBatcher",
    "Overflow",
    "ProcessFn",
    "TokenBatcher",
]
