"""What every engine must do, as checks that an engine's author calls from tests of any framework.

    @pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
    async def test_my_engine_keeps_the_contract(check):
        await check(start_my_engine, [Prompt("a"), Prompt("b c")])

A check takes a function that starts a fresh engine and at least two different valid prompts, closes what it
started, and raises `AssertionError` with what is wrong. It needs an engine that answers the same prompt in the same
way twice: start a language model with ``temperature=0``. `CHECKS` are for every engine, `CONTINUOUS_CHECKS` for those
that follow `ContinuousEngine`; `check_engine` runs the ones that apply.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast

from flyte_batch.engines.base import ContinuousEngine, Engine
from flyte_batch.errors import BadRecord, EngineDead
from flyte_batch.records import Chat, Completion, Prompt

Start = Callable[[], Awaitable[Engine[Any, Any]]]
Check = Callable[[Start, Sequence[Prompt]], Awaitable[None]]

# The longest a loop may stand still. Generous: it has to hold on a busy machine, and a blocking engine stalls for the
# whole of its call.
LONGEST_STALL_S = 0.25
# When a call that should be answered counts as hanging.
LONGEST_WAIT_S = 30.0


async def check_follows_the_protocol(start: Start, prompts: Sequence[Prompt]) -> None:
    """``prepare``, ``estimate_cost``, ``infer`` and ``aclose`` are there, and a cost is a positive number."""
    async with _started(start) as engine:
        _expect(isinstance(engine, Engine), f"{type(engine).__name__} lacks a method of the Engine protocol")
        for prompt in prompts:
            cost = engine.estimate_cost(engine.prepare(prompt))
            _expect(isinstance(cost, int) and cost > 0, f"estimate_cost gave {cost!r}; it must be an int of at least 1")


async def check_keeps_length_and_order(start: Start, prompts: Sequence[Prompt]) -> None:
    """A batch's results are those of its records alone, in the batch's order; equal records get equal results."""
    async with _started(start) as engine:
        records = [engine.prepare(prompt) for prompt in prompts]
        alone = [(await engine.infer([record]))[0] for record in records]
        failed = [result for result in alone if isinstance(result, Exception)]
        _expect(not failed, f"a valid prompt failed: {failed[:1]}")
        order = [*range(len(records))] * 2  # neither a palindrome nor sorted: both would hide a fault
        together = await engine.infer([records[i] for i in order])
        _expect(len(together) == len(order), f"{len(order)} records gave {len(together)} results")
        wrong = [at for at, i in enumerate(order) if together[at] != alone[i]]
        _expect(not wrong, f"in a batch of {len(order)}, the results at {wrong} differ from those of the record alone")


async def check_answers_an_empty_batch(start: Start, prompts: Sequence[Prompt]) -> None:
    """No records, no results, no error."""
    async with _started(start) as engine:
        results = await engine.infer([])
        _expect(len(results) == 0, f"an empty batch gave {len(results)} results")


async def check_rejects_bad_prompts_alone(start: Start, prompts: Sequence[Prompt]) -> None:
    """``prepare`` raises `BadRecord` for what is no text or empty, and the engine goes on."""
    async with _started(start) as engine:
        for bad in ("", None, 7, b"bytes", float("nan")):
            try:
                engine.prepare(Prompt(cast(str, bad)))
            except BadRecord as error:
                _expect(bool(str(error)), f"BadRecord for {bad!r} says nothing")
            except Exception as error:
                raise AssertionError(f"prepare raised {type(error).__name__} for {bad!r}, not BadRecord") from error
            else:
                raise AssertionError(f"prepare took {bad!r} as a prompt")
        results = await engine.infer([engine.prepare(prompt) for prompt in prompts])
        _expect(len(results) == len(prompts), "after rejected prompts, the engine lost results")


async def check_takes_any_text(start: Start, prompts: Sequence[Prompt]) -> None:
    """Odd Unicode is a prompt or a `BadRecord`, never another error, and costs its neighbours nothing."""
    async with _started(start) as engine:
        records = [engine.prepare(prompts[0])]
        for odd in (
            "\x00",
            "\ud800",
            "a\udfff",
            "\U0001f600\u200d",
            "\u202eabc",
            "\ufeff.",
            "e\u0301" * 20,
            "{{ x }}",
            "<|x|>",
        ):
            try:
                records.append(engine.prepare(Prompt(odd)))
            except BadRecord:
                continue
            except Exception as error:
                raise AssertionError(f"prepare raised {type(error).__name__} for {odd!r}, not BadRecord") from error
        results = await engine.infer(records)
        _expect(len(results) == len(records), f"{len(records)} records gave {len(results)} results")
        _expect(not isinstance(results[0], Exception), f"an odd text failed its neighbour: {results[0]!r}")


async def check_takes_conversations(start: Start, prompts: Sequence[Prompt]) -> None:
    """A `Chat` of the same messages is the same prompt, or a `BadRecord` where the model has no chat template."""
    async with _started(start) as engine:
        for prompt in prompts:
            system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
            try:
                chat = engine.prepare(Chat([*system, {"role": "user", "content": prompt.text}]))
            except BadRecord:
                continue
            results = await engine.infer([engine.prepare(prompt), chat])
            _expect(results[0] == results[1], f"a prompt and a chat of the same messages gave {list(results)}")


async def check_prepares_on_threads(start: Start, prompts: Sequence[Prompt]) -> None:
    """Eight threads that prepare at once get what one gets."""
    async with _started(start) as engine:
        expected = [engine.estimate_cost(engine.prepare(prompt)) for prompt in prompts]

        def prepare_all() -> list[int]:
            return [engine.estimate_cost(engine.prepare(prompt)) for prompt in prompts for _ in range(20)]

        with ThreadPoolExecutor(8) as pool:
            futures = [asyncio.wrap_future(pool.submit(prepare_all)) for _ in range(8)]
            for costs in await asyncio.gather(*futures):
                _expect(costs == [cost for cost in expected for _ in range(20)], "threads prepared different records")


async def check_leaves_the_loop_free(start: Start, prompts: Sequence[Prompt]) -> None:
    """While a batch runs, the event loop goes on: nobody waits longer than `LONGEST_STALL_S`.

    One of three batches that holds to it will do: a busy machine holds up the loop, too, but an engine does each time.
    """
    async with _started(start) as engine:
        records = [engine.prepare(prompt) for prompt in prompts]
        least = math.inf
        for _ in range(3):
            work = asyncio.ensure_future(engine.infer(records * (256 // len(records))))
            longest, last = 0.0, time.perf_counter()
            while not work.done():
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            await work
            least = min(least, longest)
            if least <= LONGEST_STALL_S:
                break
        _expect(least <= LONGEST_STALL_S, f"infer held the event loop for {least:.2f} s: run the model on a thread")


async def check_takes_calls_at_once(start: Start, prompts: Sequence[Prompt]) -> None:
    """Concurrent calls each get their own results."""
    async with _started(start) as engine:
        records = [engine.prepare(prompt) for prompt in prompts]
        expected = [(await engine.infer([record]))[0] for record in records]
        calls = [engine.infer([record]) for record in records for _ in range(4)]
        results = [results[0] for results in await asyncio.gather(*calls)]
        _expect(
            results == [result for result in expected for _ in range(4)], "concurrent calls got each other's results"
        )


async def check_survives_cancellation(start: Start, prompts: Sequence[Prompt]) -> None:
    """A cancelled call ends as cancelled, and the next one is answered as if nothing had been."""
    async with _started(start) as engine:
        records = [engine.prepare(prompt) for prompt in prompts]
        expected = list(await engine.infer(records))
        call = asyncio.ensure_future(engine.infer(records * 8))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        _expect(call.cancelled(), "a cancelled infer did not end as cancelled")
        _expect(list(await engine.infer(records)) == expected, "after a cancelled call the results differ")


async def check_closes_twice_and_stays_closed(start: Start, prompts: Sequence[Prompt]) -> None:
    """Closing again, or twice at once, is fine; inferring afterwards raises `EngineDead`."""
    async with _started(start) as engine:
        record = engine.prepare(prompts[0])
        await asyncio.gather(engine.aclose(), engine.aclose())
        await engine.aclose()
        try:
            await engine.infer([record])
        except EngineDead:
            return
        except Exception as error:
            raise AssertionError(
                f"inferring after aclose raised {type(error).__name__} ({error}), not EngineDead"
            ) from error
        raise AssertionError("inferring after aclose gave an answer; it must raise EngineDead")


async def check_finishes_what_runs_when_closed(start: Start, prompts: Sequence[Prompt]) -> None:
    """A call that runs while the engine is closed gets its results or `EngineDead`; it never hangs."""
    async with _started(start) as engine:
        records = [engine.prepare(prompt) for prompt in prompts]
        call = asyncio.ensure_future(engine.infer(records * 4))
        await asyncio.sleep(0)
        await engine.aclose()
        done, _ = await asyncio.wait([call], timeout=LONGEST_WAIT_S)
        _expect(bool(done), "a call that ran when the engine was closed hangs")
        error = call.exception()
        if error is None:
            _expect(len(call.result()) == 4 * len(records), "closing cut a running call's results short")
        else:
            _expect(isinstance(error, EngineDead), f"closing failed a running call with {error!r}, not EngineDead")


CHECKS: tuple[Check, ...] = (
    check_follows_the_protocol,
    check_keeps_length_and_order,
    check_answers_an_empty_batch,
    check_rejects_bad_prompts_alone,
    check_takes_any_text,
    check_takes_conversations,
    check_prepares_on_threads,
    check_leaves_the_loop_free,
    check_takes_calls_at_once,
    check_survives_cancellation,
    check_closes_twice_and_stays_closed,
    check_finishes_what_runs_when_closed,
)


async def check_knows_its_measure(start: Start, prompts: Sequence[Prompt]) -> None:
    """``slots`` and ``capacity_tokens`` are positive, and a prompt's ids are its own and no more than its cost."""
    async with _started(start) as started:
        engine = _continuous(started)
        for attribute in ("slots", "capacity_tokens"):
            value = getattr(engine, attribute)
            _expect(isinstance(value, int) and value > 0, f"{attribute} is {value!r}; it must be an int of at least 1")
        for prompt in prompts:
            record = engine.prepare(prompt)
            ids = list(engine.prompt_ids(record))
            _expect(bool(ids), "prompt_ids gave none for a valid prompt")
            _expect(ids == list(engine.prompt_ids(engine.prepare(prompt))), "prompt_ids differ for equal prompts")
            cost = engine.estimate_cost(record)
            _expect(len(ids) <= cost, f"prompt_ids gave {len(ids)} tokens, more than the cost of {cost}")


async def check_generates_what_it_infers(start: Start, prompts: Sequence[Prompt]) -> None:
    """``generate``, alone and beside others, gives what ``infer`` gives."""
    async with _started(start) as started:
        engine = _continuous(started)
        records = [engine.prepare(prompt) for prompt in prompts]
        expected = list(await engine.infer(records))
        alone = [await engine.generate(record) for record in records]
        _expect(all(isinstance(result, Completion) for result in alone), f"generate gave no Completion: {alone}")
        _expect(alone == expected, f"generate gave {alone}, infer gave {expected}")
        together = await asyncio.gather(*(engine.generate(record) for record in records * 4))
        _expect(together == expected * 4, "beside others, generate gave another result than alone")


async def check_forgets_cancelled_records(start: Start, prompts: Sequence[Prompt]) -> None:
    """A cancelled ``generate`` ends as cancelled, leaves its neighbours alone, and gives its slot back."""
    async with _started(start) as started:
        engine = _continuous(started)
        first, *others = [engine.prepare(prompt) for prompt in prompts]
        expected = [await engine.generate(record) for record in others]
        # More than there are slots: if one of them were kept, there would be no room for what comes after.
        doomed = [asyncio.ensure_future(engine.generate(first)) for _ in range(engine.slots + 1)]
        neighbours = [asyncio.ensure_future(engine.generate(record)) for record in others]
        await asyncio.sleep(0)
        for call in doomed:
            call.cancel()
        done, pending = await asyncio.wait([*doomed, *neighbours], timeout=LONGEST_WAIT_S)
        for call in pending:
            call.cancel()
        _expect(done.issuperset(doomed), "a cancelled generate hangs")
        _expect(all(call.cancelled() for call in doomed), "a cancelled generate did not end as cancelled")
        _expect(not pending, "a record beside cancelled ones hangs: their slots were not given back")
        results = [call.exception() or call.result() for call in neighbours]
        _expect(results == expected, f"beside cancelled records, others gave {results}, not {expected}")


async def check_generates_nothing_when_closed(start: Start, prompts: Sequence[Prompt]) -> None:
    """What runs when the engine is closed gets its result or `EngineDead`; what comes later gets `EngineDead`."""
    async with _started(start) as started:
        engine = _continuous(started)
        record = engine.prepare(prompts[0])
        running = [asyncio.ensure_future(engine.generate(record)) for _ in range(4)]
        await asyncio.sleep(0)
        await engine.aclose()
        later = asyncio.ensure_future(engine.generate(record))
        _, pending = await asyncio.wait([*running, later], timeout=LONGEST_WAIT_S)
        for call in pending:
            call.cancel()
        _expect(not pending, "a generate that ran when the engine was closed, or came later, hangs")
        errors = [error for error in (call.exception() for call in running) if error is not None]
        wrong = [error for error in errors if not isinstance(error, EngineDead)]
        _expect(not wrong, f"closing failed a running generate with {wrong[:1]}, not EngineDead")
        _expect(isinstance(later.exception(), EngineDead), "generate after aclose must raise EngineDead")


CONTINUOUS_CHECKS: tuple[Check, ...] = (
    check_knows_its_measure,
    check_generates_what_it_infers,
    check_forgets_cancelled_records,
    check_generates_nothing_when_closed,
)


def name(check: Check) -> str:
    """A check's name for a test's id: ``keeps_length_and_order``."""
    return getattr(check, "__name__", repr(check)).removeprefix("check_")


async def check_engine(start: Start, prompts: Sequence[Prompt]) -> None:
    """All `CHECKS`, and `CONTINUOUS_CHECKS` for a `ContinuousEngine`, one after the other, each on a fresh engine.

    Raises:
        AssertionError: the first that fails, and why.
    """
    async with _started(start) as engine:
        continuous = isinstance(engine, ContinuousEngine)
    for check in CHECKS + CONTINUOUS_CHECKS * continuous:
        await check(start, prompts)


def _continuous(engine: Engine[Any, Any]) -> ContinuousEngine[Any]:
    if not isinstance(engine, ContinuousEngine):
        raise AssertionError(f"{type(engine).__name__} lacks a part of the ContinuousEngine protocol")
    return engine


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:  # not `assert`: it has to work under python -O
        raise AssertionError(otherwise)


@asynccontextmanager
async def _started(start: Start) -> AsyncIterator[Engine[Any, Any]]:
    engine = await start()
    try:
        yield engine
    finally:
        await engine.aclose()
