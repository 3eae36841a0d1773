"""An engine with a batcher in front of it, as one thing with one life."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, TypeVar

from flyte_batch.batching.base import Batcher
from flyte_batch.batching.batcher import TokenBatcher
from flyte_batch.engines.base import Engine

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")
EngineT = TypeVar("EngineT", bound=Engine[Any, Any])


class EngineOwner(Batcher[RecordT, ResultT], Generic[RecordT, ResultT, EngineT]):
    """A batcher that owns the engine it feeds. What a `singleton` for a worker returns.

    Leaving ``async with``, or `aclose`, stops the batcher and closes the engine.

    Attributes:
        engine: the engine, started by whoever made the batcher.
    """

    engine: EngineT

    @property
    def engine_name(self) -> str:
        return type(self.engine).__name__

    def _own(self, engine: EngineT) -> None:
        self.engine = engine

    async def aclose(self) -> None:
        """Answer what is queued, then close the engine. Cancelled, it stops waiting and leaves the engine at work."""
        await self.stop()
        await self.engine.aclose()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class EngineBatcher(EngineOwner[RecordT, ResultT, Engine[RecordT, ResultT]], TokenBatcher[RecordT, ResultT]):
    """A `TokenBatcher` that feeds an engine, costs records as the engine does and isolates bad rows.

    For engines that take a batch at a time. Those with continuous batching are kept full by a `ContinuousBatcher`.

    Args:
        engine: a started engine; the batcher closes it.
        options: `TokenBatcher`'s parameters; ``isolate_failures`` is on unless given, and ``turn_size`` is 64, so that
            the chunks of a replica end one after the other: while one is written and the next is read, the others keep
            the device busy.
    """

    def __init__(self, engine: Engine[RecordT, ResultT], **options: Any) -> None:
        options.setdefault("isolate_failures", True)
        options.setdefault("turn_size", 64)
        super().__init__(inference_fn=engine.infer, token_estimator=engine.estimate_cost, **options)
        self._own(engine)
