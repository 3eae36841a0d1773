"""The torch profiler in vLLM's own processes: traces that can be read, and an engine that goes on afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines import VLLMEngine
from flyte_batch.errors import BadInput, EngineDead, EngineError
from flyte_batch.monitoring.kernels import kernel_table, profiled, profiler_options
from flyte_batch.records import Completion, Prompt
from tests.vllm_cpu.starting import Start


async def test_a_profile_says_where_the_time_went_and_the_engine_goes_on(start: Start, tmp_path: Path) -> None:
    engine = await start(engine_args=profiler_options(tmp_path / "vllm"))
    problems = list(generate(16, 7))
    records = [engine.prepare(Prompt(problem.question)) for problem in problems]

    async def answers() -> list[str]:
        results = await engine.infer(records)
        return [result.text for result in results if isinstance(result, Completion)]

    before = await answers()
    async with profiled(engine, tmp_path / "first") as first:
        during = await answers()
        with pytest.raises(EngineError, match="already active"):
            await engine.start_profile()
    after = await answers()
    assert before == during == after
    assert sum(is_right(text, problem.answer) for text, problem in zip(after, problems, strict=True)) >= 15

    (trace,) = first.traces
    assert trace.parent == tmp_path / "first"
    table = kernel_table(trace)
    assert table.source == "cpu"
    rows = {row.kernel_class: row for row in table.rows}
    assert {"matmul", "attention", "activation", "normalisation", "sampling", "memory copy"} <= set(rows)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert "aten::mm" in {kernel.name for kernel in rows["matmul"].biggest}
    # A silu for each of the four layers of each step, and a choice of tokens for each step.
    assert rows["activation"].calls == 4 * next(k.calls for k in rows["sampling"].biggest if "argmax" in k.name)

    async with profiled(engine, tmp_path / "second") as second:
        await engine.infer(records[:1])
    assert set(second.traces).isdisjoint(first.traces)
    assert kernel_table(*second.traces).seconds < table.seconds
    assert not list((tmp_path / "vllm").glob("*.json*"))


async def test_an_engine_that_dies_while_it_is_profiled_holds_nobody(start: Start, tmp_path: Path) -> None:
    engine = await start(engine_args=profiler_options(tmp_path / "vllm"))
    processes = engine._launch.processes
    assert processes is not None

    async def killed() -> None:
        async with profiled(engine, tmp_path / "profile"):
            for process in processes.alive:
                os.kill(process, signal.SIGKILL)

    with pytest.raises(EngineDead, match="died, or was killed"):
        await killed()
    await engine.aclose()
    with pytest.raises(EngineDead, match="was closed"):
        await engine.start_profile()


async def test_an_engine_without_a_profiler_is_refused_with_the_option(engine: VLLMEngine, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"start it with engine_args=profiler_options\(FOLDER\)"):
        async with profiled(engine, tmp_path):
            pass
