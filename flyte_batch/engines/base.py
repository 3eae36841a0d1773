"""The engine protocol: what turns records into results, and nothing else.

An engine owns a model and a device. It does not queue, batch or retry; a batcher in front of it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from flyte_batch.records import Chat, Completion, Prompt

RecordT = TypeVar("RecordT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


@runtime_checkable
class Engine(Protocol[RecordT, ResultT_co]):
    """What a batcher, a worker and a pipeline need of an engine. ``RecordT`` is whatever `prepare` makes of a prompt.

    An engine is created by an async constructor (``await SomeEngine.start(...)``) so that loading a model does not
    block the event loop, and is closed by whoever created it.
    """

    def prepare(self, prompt: Prompt | Chat) -> RecordT:
        """Render and tokenise one prompt. Pure CPU work, called on threads, several at once.

        Raises:
            BadRecord: the prompt can never be inferred. `MissingValue` where something is empty, `PromptTooLong` where
                the context has no room for it, `BadImage` for its pictures: failures are counted by class.
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


@runtime_checkable
class ContinuousEngine(Engine[RecordT, Completion], Protocol[RecordT]):
    """An engine that computes records side by side and takes a new one as soon as another is done: vLLM, SGLang, ...

    A `ContinuousBatcher` keeps it full. Its `infer` is a gathering of `generate`.

    Attributes:
        slots: most records that it computes at once (vLLM's ``max_num_seqs``).
        capacity_tokens: tokens of prompts and responses that its memory holds at once (the KV cache).
    """

    slots: int
    capacity_tokens: int

    def prompt_ids(self, record: RecordT) -> Sequence[Any]:
        """The tokens of the record's prompt: their number, and what its prefix is compared by."""
        ...

    async def generate(self, record: RecordT) -> Completion:
        """One record's result. Cancelling the call makes the engine forget the record at once.

        Raises:
            EngineDead: the engine will never answer again.
            EngineOutOfMemory: too many records at once; fewer may fit.
            Exception: this record failed; the others go on.
        """
        ...
