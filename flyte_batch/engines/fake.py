"""An engine without a model: for tests of whatever stands in front of one, yours included.

It follows the same contract as the real ones (`flyte_batch.engines.contract` says so), is deterministic, and can be
told to be slow, to run out of memory, to reject prompts or to die.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from flyte_batch.engines.checks import require_no_images
from flyte_batch.engines.messages import messages_of
from flyte_batch.errors import BadRecord, EngineDead, EngineOutOfMemory
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters


@dataclass(frozen=True, slots=True)
class FakeRecord:
    """What `FakeEngine.prepare` makes of a prompt: the text, and its number of tokens (words)."""

    text: str
    tokens: int
    limit: int

    def estimate_cost(self) -> int:
        """Tokens of the prompt plus tokens it may generate."""
        return self.tokens + self.limit


class FakeEngine:
    """Answers with a function instead of a model. A token is a word (what `str.split` finds).

    Args:
        answer: from a prompt's text to its response; by default ``echo: `` and the text. It may be async, and what it
            raises fails that record only.
        sampling: ``max_tokens`` and ``stop`` apply to the responses as they do in a real engine.
        seconds_per_batch: simulated device time of a call.
        seconds_per_token: simulated device time of each token of a call, prompts and responses.
        sleep: how device time passes; give a fake clock's own to let it pass without waiting.
        context: most tokens of prompt and response together; `prepare` rejects longer prompts.
        fail_on: texts of prompts that fail, alone, with `BadRecord` in their place in the batch.
        poison: texts of prompts that fail the *whole* batch they are in with `RuntimeError`: what a real engine's
            bug does, for tests of isolation.
        largest_batch: a batch of more records raises `EngineOutOfMemory`.
        largest_cost: a batch of a higher cost, summed over its records, raises `EngineOutOfMemory`.
        dies_after: the engine dies (`EngineDead`) at the call after this many.

    Attributes:
        batches: the texts of every batch it was given, failed ones included, in order.
        running: calls that are on the device now.
        closed: whether `aclose` was called.
    """

    def __init__(
        self,
        answer: Callable[[str], str | Awaitable[str]] | None = None,
        *,
        sampling: SamplingParameters | None = None,
        seconds_per_batch: float = 0.0,
        seconds_per_token: float = 0.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        context: int = 4096,
        fail_on: Collection[str] = (),
        poison: Collection[str] = (),
        largest_batch: int | None = None,
        largest_cost: int | None = None,
        dies_after: int | None = None,
    ) -> None:
        self._answer = answer or _echo
        self._sampling = sampling or SamplingParameters()
        self._seconds_per_batch = seconds_per_batch
        self._seconds_per_token = seconds_per_token
        self._sleep = sleep
        self.context = context
        self._fail_on = frozenset(fail_on)
        self._poison = frozenset(poison)
        self._largest_batch = largest_batch
        self._largest_cost = largest_cost
        self._dies_after = dies_after
        self._dead = False
        self.batches: list[list[str]] = []
        self.running = 0
        self.closed = False

    @classmethod
    async def start(
        cls,
        answer: Callable[[str], str | Awaitable[str]] | None = None,
        *,
        sampling: SamplingParameters | None = None,
        context: int = 4096,
    ) -> FakeEngine:
        """As the real engines' ``start``; the constructor takes everything else."""
        return cls(answer, sampling=sampling, context=context)

    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        """Count the words of all messages; the text of the last one is what is answered.

        Raises:
            BadRecord: no text or an empty one, or images (`require_no_images`), or as many words as the context or
                more.
        """
        require_no_images(prompt, "the fake engine")
        texts = [message["content"] for message in messages_of(prompt)]
        words = [word for text in texts for word in text.split()]
        if len(words) >= self.context:
            raise BadRecord(
                f"the prompt has {len(words)} tokens, the model's context holds {self.context} with the response: "
                "shorten it, or leave out rows like it"
            )
        return FakeRecord(texts[-1], len(words), min(self._sampling.max_tokens, self.context - len(words)))

    def estimate_cost(self, record: FakeRecord) -> int:
        """Tokens of the prompt plus tokens it may generate."""
        return record.estimate_cost()

    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        """Answer every record after the simulated device time; one result a record, in order.

        Raises:
            EngineDead: it was closed, or ``dies_after`` calls are over.
            EngineOutOfMemory: more than ``largest_batch`` records, or than ``largest_cost``.
            RuntimeError: the batch holds a text of ``poison``.
        """
        if self.closed or self._dead:
            raise EngineDead(f"the fake engine {'was closed' if self.closed else 'died'}: start a new one")
        self.batches.append([record.text for record in batch])
        if self._dies_after is not None and len(self.batches) > self._dies_after:
            self._dead = True
            raise EngineDead(f"the fake engine died, as told, after {self._dies_after} batches")
        self._check_memory(batch)
        self.running += 1
        try:
            results = [await self._result(record) for record in batch]
            tokens = sum(record.tokens for record in batch)
            tokens += sum(result.response_tokens for result in results if isinstance(result, Completion))
            # Always a step of the loop: a real engine never answers within the caller's own step.
            await self._sleep(self._seconds_per_batch + self._seconds_per_token * tokens)
        finally:
            self.running -= 1
        poisoned = [record.text for record in batch if record.text in self._poison]
        if poisoned:
            raise RuntimeError(f"the fake engine failed, as told, on {poisoned[0]!r}")
        return results

    def _check_memory(self, batch: Sequence[FakeRecord]) -> None:
        cost = sum(record.estimate_cost() for record in batch)
        if self._largest_batch is not None and len(batch) > self._largest_batch:
            raise EngineOutOfMemory(f"{len(batch)} records do not fit, {self._largest_batch} do")
        if self._largest_cost is not None and cost > self._largest_cost:
            raise EngineOutOfMemory(f"a cost of {cost} does not fit, {self._largest_cost} does")

    async def _result(self, record: FakeRecord) -> Completion | Exception:
        if record.text in self._fail_on:
            return BadRecord(f"the fake engine rejects {record.text!r}, as told")
        try:
            answer = self._answer(record.text)
            text = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            return error
        ends = [at for at in (text.find(stop) for stop in self._sampling.stop) if at >= 0]
        text = text[: min(ends)] if ends else text
        words = text.split()
        if len(words) <= record.limit:
            return Completion(text, "stop", record.tokens, len(words))
        return Completion(" ".join(words[: record.limit]), "length", record.tokens, record.limit)

    async def aclose(self) -> None:
        """Nothing to free; inferring afterwards raises `EngineDead`."""
        self.closed = True

    async def __aenter__(self) -> FakeEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _echo(text: str) -> str:
    return f"echo: {text}"
