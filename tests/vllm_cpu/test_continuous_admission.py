"""`ContinuousBatcher` in front of the real vLLM: what runs side by side, and what a cancelled record leaves behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines.vllm import VLLMRecord
from tests.vllm_cpu.starting import Variant

LONG = fb.SamplingParameters(max_tokens=400, ignore_eos=True)


class Meter:
    """Steps of the engine and tokens that it generated between two moments, by vLLM's own metrics."""

    def __init__(self) -> None:
        self._steps, self._tokens = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        from prometheus_client import REGISTRY

        values: dict[str, float] = defaultdict(float)  # of all engines that there were; the others rest
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                values[sample.name] += sample.value
        return values["vllm:iteration_tokens_total_count"], values["vllm:generation_tokens_total"]

    def since(self) -> tuple[float, float]:
        """Steps, and records running in a step on average: each gets a token a step."""
        steps, tokens = self._read()
        return steps - self._steps, (tokens - self._tokens) / (steps - self._steps)


def heavy_tailed(engine: fb.VLLMEngine, count: int) -> list[VLLMRecord]:
    rng = random.Random(3)
    records = [engine.prepare(fb.Prompt(problem.question)) for problem in generate(count, 41)]
    limits = [300 if i % 16 == 5 else rng.randint(4, 16) for i in range(count)]
    return [replace(r, prompt=replace(r.prompt, limit=limit)) for r, limit in zip(records, limits, strict=True)]


async def served(batcher: Any, records: list[Any], **options: Any) -> list[Any]:
    """A map's results; the batcher is stopped, the engine goes on."""
    await batcher.start()
    try:
        return list(await batcher.map(records, **options))
    finally:
        await batcher.stop()


async def test_on_a_heavy_tail_more_records_run_side_by_side_than_in_static_batches_and_fewer_steps_do(
    variant: Variant,
) -> None:
    engine = variant(LONG)
    records = heavy_tailed(engine, 128)
    meter = Meter()
    static = await served(fb.EngineBatcher(engine, max_batch_size=32, target_batch_tokens=10**9), records)
    static_steps, static_running = meter.since()
    meter = Meter()
    batcher = fb.ContinuousBatcher(engine, max_in_flight=32)
    # As for real prompts: their limits are alike and say nothing of their responses.
    continuous = await served(batcher, records, estimated_cost=[500] * len(records))
    steps, running = meter.since()
    assert [r.response_tokens for r in continuous] == [r.response_tokens for r in static]
    # 3.5 times, where the process that admits has a core of its own.
    assert static_steps > 1.5 * steps
    assert running > 1.5 * static_running
    assert batcher.stats.avg_in_flight > 1.5 * static_running


async def test_many_callers_get_their_own_right_answers(engine: fb.VLLMEngine) -> None:
    problems = list(generate(120, 43))
    batcher = fb.ContinuousBatcher(engine)
    await batcher.start()

    async def caller(part: list[Any]) -> int:
        records = [engine.prepare(fb.Prompt(problem.question)) for problem in part]
        if len(part) % 2:
            answers = await batcher.map(records)
        else:
            answers = [await (await batcher.submit(record)) for record in records]
        return sum(is_right(answer.text, problem.answer) for answer, problem in zip(answers, part, strict=True))

    sizes = [1, 2, 5, 8, 13, 40, 51]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    right = sum(
        await asyncio.gather(
            *(caller(problems[start : start + size]) for start, size in zip(starts, sizes, strict=True))
        )
    )
    await batcher.stop()
    assert right >= 118
    stats = batcher.stats
    assert (stats.total_completed, stats.total_failed, stats.running) == (120, 0, 0)
    assert stats.utilization > 0.9
    # It learnt what the answers take: a tenth of what they may take.
    assert batcher.expected_response_tokens(30, 256) < 60


async def test_a_poison_record_fails_alone_among_its_neighbours(engine: fb.VLLMEngine) -> None:
    problems = list(generate(20, 47))
    records = [engine.prepare(fb.Prompt(problem.question)) for problem in problems]
    poison = replace(records[7], prompt=replace(records[7].prompt, ids=type(records[7].prompt.ids)("I", [10**6] * 8)))
    results = await served(fb.ContinuousBatcher(engine), [*records, poison], return_exceptions=True)
    assert isinstance(results.pop(), fb.BadRecord)
    assert sum(is_right(result.text, p.answer) for result, p in zip(results, problems, strict=True)) >= 19


async def test_cancelled_records_leave_nothing_unfinished_in_vllm(variant: Variant) -> None:
    engine = variant(LONG)
    records = heavy_tailed(engine, 64)
    batcher = fb.ContinuousBatcher(engine)
    await batcher.start()
    kept = await batcher.submit(replace(records[0], prompt=replace(records[0].prompt, limit=200)))
    call = asyncio.create_task(batcher.map(records))
    late = await batcher.submit(replace(records[5], prompt=replace(records[5].prompt, limit=400)), timeout_s=0.05)
    while engine._engine.output_processor.get_num_unfinished_requests() < 32:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    call.cancel()
    (outcome,) = await asyncio.gather(late, return_exceptions=True)
    assert isinstance(outcome, fb.DeadlineExceeded)
    assert (await kept).response_tokens == 200
    assert engine._engine.output_processor.get_num_unfinished_requests() == 0
    await batcher.stop()
    stats = batcher.stats
    assert (stats.running, stats.queued) == (0, 0)
    assert stats.total_submitted == stats.total_completed + stats.total_abandoned


@pytest.mark.parametrize("kind", [fb.ContinuousBatcher, fb.EngineBatcher])
async def test_vllms_core_is_not_busy_because_the_event_loop_stands_still(variant: Variant, kind: Any) -> None:
    engine = variant(LONG)
    records = [replace(r, prompt=replace(r.prompt, limit=30)) for r in heavy_tailed(engine, 8)]
    free = kind(engine)
    await served(free, records)
    undisturbed_s = free.stats.busy_time_s
    held_s = 1 + 4 * undisturbed_s
    batcher = kind(engine)
    call = asyncio.create_task(served(batcher, records))
    while engine._engine.output_processor.get_num_unfinished_requests() < len(records):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    time.sleep(held_s)  # noqa: ASYNC251 - what is tested
    await call
    assert batcher.is_told
    assert batcher.stats.busy_time_s < held_s / 2
    assert batcher.stats.late_time_s > held_s / 4
