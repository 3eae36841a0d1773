"""The engines that ship keep the contract, and the contract notices those that do not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from flyte_batch.demo import model_path
from flyte_batch.engines import CTranslate2Engine, FakeContinuousEngine, FakeEngine, contract
from flyte_batch.engines.fake import FakeRecord
from flyte_batch.errors import BadRecord
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters

PROMPTS = [Prompt("Ben has 3 cups."), Prompt("12 + 7 ="), Prompt("Mia picks 73 stamps on Monday and 7 on Tuesday.")]


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_fake_engine_keeps_the_contract(check: contract.Check) -> None:
    await check(FakeEngine.start, PROMPTS)


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_ctranslate2_engine_keeps_the_contract(check: contract.Check) -> None:
    async def start() -> CTranslate2Engine:
        return await CTranslate2Engine.start(model_path(), sampling=SamplingParameters(max_tokens=8))

    await check(start, PROMPTS)


@pytest.mark.parametrize("check", contract.CHECKS + contract.CONTINUOUS_CHECKS, ids=contract.name)
async def test_the_fake_continuous_engine_keeps_the_contract(check: contract.Check) -> None:
    await check(FakeContinuousEngine.start, PROMPTS)


async def test_all_checks_run_in_one_call() -> None:
    await contract.check_engine(FakeEngine.start, PROMPTS)
    await contract.check_engine(FakeContinuousEngine.start, PROMPTS)


async def test_the_checks_of_continuous_engines_run_for_them_only() -> None:
    with pytest.raises(AssertionError, match="prompt_ids gave none"):
        await contract.check_engine(Wordless.start, PROMPTS)
    with pytest.raises(AssertionError, match="FakeEngine lacks a part of the ContinuousEngine protocol"):
        await contract.check_knows_its_measure(FakeEngine.start, PROMPTS)


async def test_a_model_without_a_chat_template_keeps_the_contract() -> None:
    await contract.check_takes_conversations(Templateless.start, PROMPTS)


class Reversing(FakeEngine):
    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        return (await super().infer(batch))[::-1]


class Losing(FakeEngine):
    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        return (await super().infer(batch))[:5]


class Blocking(FakeEngine):
    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        time.sleep(contract.LONGEST_STALL_S * 1.2)  # noqa: ASYNC251  that is the fault
        return await super().infer(batch)


class Immortal(FakeEngine):
    async def aclose(self) -> None:
        pass


class ClosingOnce(FakeEngine):
    async def aclose(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Greedy(FakeEngine):
    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        assert isinstance(prompt, Prompt)
        return FakeRecord(prompt.text, ("a",), 1)


class Fragile(FakeEngine):
    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        assert isinstance(prompt, Prompt)
        prompt.text.encode()
        return super().prepare(prompt)


class Deaf(FakeEngine):
    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        try:
            return await super().infer(batch)
        except asyncio.CancelledError:
            return []


class Free(FakeEngine):
    def estimate_cost(self, record: FakeRecord) -> int:
        return 0


class Forgetful(FakeEngine):
    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        return super().prepare(Prompt("what?") if isinstance(prompt, Chat) else prompt)


class Templateless(FakeEngine):
    def prepare(self, prompt: Prompt | Chat) -> FakeRecord:
        if isinstance(prompt, Chat):
            raise BadRecord("no chat template")
        return super().prepare(prompt)


class Slotless(FakeContinuousEngine):
    def __init__(self) -> None:
        super().__init__(slots=0)


class Wordless(FakeContinuousEngine):
    def prompt_ids(self, record: FakeRecord) -> Sequence[str]:
        return []


class Numbering(FakeContinuousEngine):
    def prompt_ids(self, record: FakeRecord) -> Sequence[str]:
        return [str(id(record))]


class Counting(FakeContinuousEngine):
    def prompt_ids(self, record: FakeRecord) -> Sequence[str]:
        return record.words * 1000


class Bare(FakeContinuousEngine):
    async def generate(self, record: FakeRecord) -> Completion:
        return (await super().generate(record)).text  # type: ignore[return-value]


class Whispering(FakeContinuousEngine):
    """Generates otherwise than it infers."""

    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        return [Completion("psst", "stop", 1, 1) for _ in batch]


class Mingling(FakeContinuousEngine):
    """Answers with what another call asked."""

    async def infer(self, batch: Sequence[FakeRecord]) -> list[Completion | Exception]:
        return [await super(Mingling, self).generate(record) for record in batch]

    async def generate(self, record: FakeRecord) -> Completion:
        self._last = record
        await asyncio.sleep(0)
        return await super().generate(self._last)


class Hoarding(FakeContinuousEngine):
    """Keeps the slot of a record that was cancelled."""

    async def generate(self, record: FakeRecord) -> Completion:
        self._slots = getattr(self, "_slots", None) or asyncio.Semaphore(self.slots)
        await self._slots.acquire()
        result = await super().generate(record)
        self._slots.release()
        return result


class Uncancellable(FakeContinuousEngine):
    async def generate(self, record: FakeRecord) -> Completion:
        try:
            return await super().generate(record)
        except asyncio.CancelledError:
            return Completion("", "stop", 1, 0)


class Panicking(FakeContinuousEngine):
    """Fails the neighbours of a cancelled record."""

    async def generate(self, record: FakeRecord) -> Completion:
        try:
            return await super().generate(record)
        except asyncio.CancelledError:
            self._fail_all("panicked")
            raise


class Undying(FakeContinuousEngine):
    async def aclose(self) -> None:
        pass


class Hanging(FakeContinuousEngine):
    """Forgets what runs when it is closed."""

    async def aclose(self) -> None:
        self._waiting.clear()
        self._running.clear()
        await super().aclose()


class Rude(FakeContinuousEngine):
    async def generate(self, record: FakeRecord) -> Completion:
        result = await super().generate(record) if not self.closed else None
        if result is None:
            raise KeyError(record.text)
        return result


@pytest.mark.parametrize(
    ("broken", "check", "why"),
    [
        (Slotless, contract.check_knows_its_measure, "slots is 0"),
        (Wordless, contract.check_knows_its_measure, "prompt_ids gave none"),
        (Numbering, contract.check_knows_its_measure, "prompt_ids differ for equal prompts"),
        (Counting, contract.check_knows_its_measure, "more than the cost"),
        (Bare, contract.check_generates_what_it_infers, "no Completion"),
        (Whispering, contract.check_generates_what_it_infers, "infer gave .*psst"),
        (Mingling, contract.check_generates_what_it_infers, "beside others"),
        (Hoarding, contract.check_forgets_cancelled_records, "slots were not given back"),
        (Uncancellable, contract.check_forgets_cancelled_records, "did not end as cancelled"),
        (Panicking, contract.check_forgets_cancelled_records, "others gave .*panicked"),
        (Undying, contract.check_generates_nothing_when_closed, "must raise EngineDead"),
        (Hanging, contract.check_generates_nothing_when_closed, "hangs"),
        (Rude, contract.check_generates_nothing_when_closed, "must raise EngineDead"),
        (Forgetful, contract.check_takes_conversations, "what"),
        (Reversing, contract.check_keeps_length_and_order, "differ"),
        (Losing, contract.check_keeps_length_and_order, "6 records gave 5"),
        (Blocking, contract.check_leaves_the_loop_free, "held the event loop"),
        (Immortal, contract.check_closes_twice_and_stays_closed, "must raise EngineDead"),
        (Greedy, contract.check_rejects_bad_prompts_alone, "took ''"),
        (Fragile, contract.check_takes_any_text, "UnicodeEncodeError"),
        (Deaf, contract.check_survives_cancellation, "did not end as cancelled"),
        (Free, contract.check_follows_the_protocol, "estimate_cost gave 0"),
    ],
)
async def test_the_contract_notices_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, broken: type[FakeEngine], check: contract.Check, why: str
) -> None:
    async def start() -> FakeEngine:
        return broken()

    monkeypatch.setattr(contract, "LONGEST_WAIT_S", 0.2)
    with pytest.raises(AssertionError, match=why):
        await check(start, PROMPTS)


async def test_an_engine_that_closes_only_once_is_noticed() -> None:
    async def start() -> FakeEngine:
        return ClosingOnce()

    with pytest.raises(RuntimeError, match="closed already"):
        await contract.check_closes_twice_and_stays_closed(start, PROMPTS)
