"""The engines that ship keep the contract, and the contract notices those that do not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from flyte_batch.demo import model_path
from flyte_batch.engines import CTranslate2Engine, FakeEngine, contract
from flyte_batch.engines.fake import FakeRecord
from flyte_batch.records import Completion, Prompt, SamplingParameters

PROMPTS = [Prompt("Ben has 3 cups."), Prompt("12 + 7 ="), Prompt("Mia picks 73 stamps on Monday and 7 on Tuesday.")]


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_fake_engine_keeps_the_contract(check: contract.Check) -> None:
    await check(FakeEngine.start, PROMPTS)


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_ctranslate2_engine_keeps_the_contract(check: contract.Check) -> None:
    async def start() -> CTranslate2Engine:
        return await CTranslate2Engine.start(model_path(), sampling=SamplingParameters(max_tokens=8))

    await check(start, PROMPTS)


async def test_all_checks_run_in_one_call() -> None:
    await contract.check_engine(FakeEngine.start, PROMPTS)


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
    def prepare(self, prompt: Prompt) -> FakeRecord:
        return FakeRecord(prompt.text, 1, 1)


class Fragile(FakeEngine):
    def prepare(self, prompt: Prompt) -> FakeRecord:
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


@pytest.mark.parametrize(
    ("broken", "check", "why"),
    [
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
async def test_the_contract_notices_a_broken_engine(broken: type[FakeEngine], check: contract.Check, why: str) -> None:
    async def start() -> FakeEngine:
        return broken()

    with pytest.raises(AssertionError, match=why):
        await check(start, PROMPTS)


async def test_an_engine_that_closes_only_once_is_noticed() -> None:
    async def start() -> FakeEngine:
        return ClosingOnce()

    with pytest.raises(RuntimeError, match="closed already"):
        await contract.check_closes_twice_and_stays_closed(start, PROMPTS)
