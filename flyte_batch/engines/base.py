"""The engine protocol: what turns records into results, and nothing else.

An engine owns a model and a device. It does not queue, batch or retry; a batcher in front of it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from flyte_batch.records import Prompt

RecordT = TypeVar("RecordT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


@runtime_checkable
class Engine(Protocol[RecordT, ResultT_co]):
    """What a batcher, a worker and a pipeline need of an engine. ``RecordT`` is whatever `prepare` makes of a prompt.

    An engine is created by an async constructor (``await SomeEngine.start(...)``) so that loading a model does not
    block the event loop, and is closed by whoever created it.
    """

    def prepare(self, prompt: Prompt) -> RecordT:
        """Render and tokenise one prompt. Pure CPU work, called on threads, several at once.

        Raises:
            BadRecord: the prompt can never be inferred (empty, too long for the context, not a text).
        """
        ...

    def estimate_cost(self, record: RecordT) -> int:
        """What the record takes of the device: its prompt tokens plus the tokens it may generate."""
        ...

    async def infer(self, batch: Sequence[RecordT]) -> Sequence[ResultT_co | Exception]:
        """One result a record, in the batch's order; an exception in a record's place fails that record only.

        The event loop is never blocked: device work runs on a thread or in another process.

        Raises:
            EngineDead: the engine will never answer again.
            EngineOutOfMemory: the batch was too large; a smaller one may fit.
        """
        ...

    async def aclose(self) -> None:
        """Free the model and the device. Closing twice is fine; inferring afterwards raises `EngineDead`."""
        ...
