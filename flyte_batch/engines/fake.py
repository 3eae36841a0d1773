"""Engines without a model: for tests of whatever stands in front of one, yours included.

They follow the same contract as the real ones (`flyte_batch.engines.contract` says so), are deterministic, and can be
told to be slow, to run out of memory, to reject prompts or to die. `FakeEngine` computes batch by batch,
`FakeContinuousEngine` record by record, side by side.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

from flyte_batch.engines.checks import require_no_images, require_text
from flyte_batch.engines.messages import messages_of
from flyte_batch.errors import BadRecord, EngineDead, EngineOutOfMemory, PromptTooLong
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters


@dataclass(frozen=True, slots=True)
class FakeRecord:
    """What `FakeEngine.prepare` makes of a prompt: the text that is answered, and all tokens (words)."""

    text: str
    words: tuple[str, ...]
    limit: int

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.words)

    def estimate_cost(self) -> int:
        """Tokens of the prompt plus tokens it may generate."""
        return self.tokens + self.limit


class FakeEngine:
    """Answers with a function instead of a model. A token is a word (what `str.split` finds) or an image.

    Args:
        answer: from a prompt's text to its response; by default ``echo: `` and the text. It may be async, and what it
            raises fails that record only.
        sampling: ``max_tokens`` and ``stop`` apply to the responses as they do in a real engine; what else it says,
            and a prompt's seed, has no effect.
        seconds_per_batch: simulated device time of a call.
        seconds_per_token: simulated device time of each token of a call, prompts and responses.
        sleep: how device time passes; give a fake clock's own to let it pass without waiting.
        context: most tokens of prompt and response together; `prepare` rejects longer prompts.
        takes_images: stand for a vision model; without it, prompts with images are rejected.
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
        takes_images: bool = False,
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
        self._takes_images = takes_images
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
    ) -> Self:
        """As the real engines' ``start``; the constructor takes everything else."""
        return cls(answer, sampling=sampling, context=context)

    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        """Count the words of all messages; the text of the last one is what is answered.

        Raises:
            PromptTooLong: as many words as the context or more.
            BadRecord: as `require_text`, or images that it was not told to take.
        """
        if self._takes_images:
            require_text(prompt)
        else:
            require_no_images(prompt, "the fake engine")
        contents = [message["content"] for message in messages_of(prompt)]
        words = tuple(word for content in contents for word in _words(content))
        if len(words) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(words)} tokens, the model's context holds {self.context} with the response: "
                "shorten it, or leave out rows like it"
            )
        return FakeRecord(_text(contents[-1]), words, min(self._sampling.max_tokens, self.context - len(words)))

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
        self._require_alive()
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

    def _require_alive(self) -> None:
        if self.closed or self._dead:
            raise EngineDead(f"the fake engine {'was closed' if self.closed else 'died'}: start a new one")

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class FakeContinuousEngine(FakeEngine):
    """Computes records side by side, step by step, as vLLM does: each running record gets one token (word) a step.

    A step takes the running records and, in the order in which they came, waiting ones, as long as there are slots and
    the tokens of their prompts and responses fit. A record that would never fit runs alone.

    Args:
        answer: as for `FakeEngine`; an async one is awaited before its record waits for a slot.
        slots: most records in a step.
        capacity_tokens: most tokens, of prompts and whole responses, of the records in a step.
        sampling: as for `FakeEngine`.
        seconds_per_step: simulated device time of a step.
        sleep: how device time passes; give a fake clock's own, or a gate, to step the engine from a test.
        context: as for `FakeEngine`.
        takes_images: as for `FakeEngine`.
        fail_on: texts of prompts that fail, alone, with `BadRecord`.
        endless: texts of prompts whose response has no end: they run until they are cancelled.
        largest_flight: a record that comes while so many are running or waiting raises `EngineOutOfMemory`.
        dies_after: the engine dies (`EngineDead` for all that run or wait, and all that come) when it has finished so
            many records.

    Attributes:
        steps: steps that were begun.
        record_steps: running records, summed over the steps; divided by ``steps`` it is the mean occupancy.
        running: records in the current step.
        most_running: the most that were ever in one step.
        started: the texts of the records that got a slot, in that order.
        finished: records that got their whole response.
        aborted: records that were cancelled before that.
        batches: the texts of each call of `infer`.
    """

    def __init__(
        self,
        answer: Callable[[str], str | Awaitable[str]] | None = None,
        *,
        slots: int = 8,
        capacity_tokens: int = 65536,
        sampling: SamplingParameters | None = None,
        seconds_per_step: float = 0.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        context: int = 4096,
        takes_images: bool = False,
        fail_on: Collection[str] = (),
        endless: Collection[str] = (),
        largest_flight: int | None = None,
        dies_after: int | None = None,
    ) -> None:
        super().__init__(
            answer, sampling=sampling, sleep=sleep, context=context, takes_images=takes_images, fail_on=fail_on
        )
        self.slots = slots
        self.capacity_tokens = capacity_tokens
        self._seconds_per_step = seconds_per_step
        self._endless = frozenset(endless)
        self._largest_flight = largest_flight
        self._dies_after = dies_after
        self._waiting: deque[_Generation] = deque()
        self._running: list[_Generation] = []
        self._stepping: asyncio.Task[None] | None = None
        self.steps = 0
        self.record_steps = 0
        self.most_running = 0
        self.started: list[str] = []
        self.finished = 0
        self.aborted = 0

    def prompt_ids(self, record: FakeRecord) -> Sequence[str]:
        """The words of the prompt."""
        return record.words

    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        """All of `generate`, at the same time.

        Raises:
            EngineDead: as `generate`, for any of the records.
            EngineOutOfMemory: as `generate`, for any of the records.
        """
        self._require_alive()
        self.batches.append([record.text for record in batch])
        results = await asyncio.gather(*map(self.generate, batch), return_exceptions=True)
        for result in results:
            if isinstance(result, EngineDead | EngineOutOfMemory):
                raise result
        return cast(list[Completion | Exception], results)

    async def generate(self, record: FakeRecord) -> Completion:
        """Wait for a slot, then for a step a token. Cancelling the call frees the slot at once.

        Raises:
            EngineDead: it was closed, or ``dies_after`` records are finished.
            EngineOutOfMemory: ``largest_flight`` records are running or waiting.
            BadRecord: the text is in ``fail_on``.
            Exception: whatever ``answer`` raised.
        """
        self._die_if_told()
        self._require_alive()
        if self._largest_flight is not None and len(self._waiting) + len(self._running) >= self._largest_flight:
            raise EngineOutOfMemory(f"{self._largest_flight} records fit at once, this is one more")
        result = await self._result(record)
        if isinstance(result, Exception):
            raise result
        self._require_alive()  # an async answer may have taken its time
        endless = record.text in self._endless
        tokens = record.estimate_cost() if endless else record.tokens + result.response_tokens
        generation = _Generation(record.text, tokens, None if endless else max(1, result.response_tokens))
        self._waiting.append(generation)
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_while_there_is_work())
        try:
            await generation.over.wait()
        finally:
            if not generation.over.is_set():
                self.aborted += 1
                self._remove(generation)
        if generation.failure:
            raise EngineDead(generation.failure)
        return result

    async def _step_while_there_is_work(self) -> None:
        try:
            while self._waiting or self._running:
                self._fill_slots()
                self.steps += 1
                self.record_steps += self.running
                await self._sleep(self._seconds_per_step)
                for generation in self._running:
                    if generation.left is not None:
                        generation.left -= 1
                for generation in [each for each in self._running if each.left == 0]:
                    if not self._dead:
                        self._remove(generation)
                        generation.over.set()
                        self.finished += 1
                        self._die_if_told()
        finally:  # with records left only if it was closed, or `sleep` failed
            self._stepping = None
            self._fail_all("was closed" if self.closed else "cannot step")

    def _fill_slots(self) -> None:
        tokens = sum(generation.tokens for generation in self._running)
        while self._waiting and len(self._running) < self.slots:
            tokens += self._waiting[0].tokens
            if self._running and tokens > self.capacity_tokens:
                break
            self._running.append(self._waiting.popleft())
            self.started.append(self._running[-1].text)
        self.running = len(self._running)
        self.most_running = max(self.most_running, self.running)

    def _remove(self, generation: _Generation) -> None:
        (self._running if generation in self._running else self._waiting).remove(generation)
        self.running = len(self._running)

    def _die_if_told(self) -> None:
        if self._dies_after is not None and self.finished >= self._dies_after:
            self._dead = True
            self._fail_all(f"died, as told, after {self._dies_after} records")

    def _fail_all(self, why: str) -> None:
        for generation in [*self._running, *self._waiting]:
            self._remove(generation)
            generation.failure = f"the fake engine {why}: start a new one"
            generation.over.set()

    async def aclose(self) -> None:
        """Fail what runs or waits with `EngineDead`; so does inferring afterwards."""
        await super().aclose()
        self._fail_all("was closed")
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])


@dataclass(eq=False, slots=True)
class _Generation:
    """A record that waits or runs.

    Attributes:
        text: of its prompt.
        tokens: what it takes of the capacity.
        left: steps that it still needs; None has no end.
        over: set when it is finished or has failed.
        failure: why the engine gave it up.
    """

    text: str
    tokens: int
    left: int | None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""


def _words(content: str | list[dict[str, Any]]) -> list[str]:
    """The tokens of a message's content: words, and ``<image>`` for a picture."""
    if isinstance(content, str):
        return content.split()
    return [word for part in content for word in part.get("text", "<image>").split()]


def _text(content: str | list[dict[str, Any]]) -> str:
    """A content without its pictures."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def _echo(text: str) -> str:
    return f"echo: {text}"
