"""Real vLLM, on a CPU: one engine for the whole run, and ways to start or derive more.

Run by ``make test-vllm``, in an environment of its own. A start takes 20 to 40 seconds of two cores, so tests share:

- ``engine``: the demo model, greedy, at most 256 tokens; nobody closes it.
- ``variant(sampling)``: an engine that answers with the same processes and other sampling parameters; costs nothing.
- ``start(...)``: a fresh engine, closed at the end of the test; for tests that close, kill or configure one.

The folder is not called vllm: next to it, ``import vllm`` would find these tests.

Tests and fixtures run on one event loop, the session's, because an engine belongs to the loop it was started on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flyte_batch import singletons
from flyte_batch.engines import VLLMEngine
from flyte_batch.engines.structured import ResponseCheck
from flyte_batch.engines.tokenising import ModelFolder, PromptTokeniser
from flyte_batch.engines.vllm_options import VLLMOptions
from flyte_batch.engines.vllm_start import Launch, sampling_template, verify
from flyte_batch.records import SamplingParameters
from tests.vllm_cpu.starting import MODEL, Start, Variant, start_demo

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if _HERE in item.path.parents]
    missing = importlib.util.find_spec("vllm") is None
    for item in ours:
        if missing:
            item.add_marker(pytest.mark.skip(reason="vllm is not installed here: make test-vllm"))
        item.add_marker(pytest.mark.timeout(400))
        if pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _close_singletons() -> AsyncIterator[None]:
    yield
    await singletons.close_all()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[VLLMEngine]:
    shared = await start_demo(
        engine_args={
            "distributed_executor_backend": "mp",  # workers in processes of their own, as on several GPUs
            # A small model that has to write JSON likes to write spaces and line breaks between its parts for ever.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
    )
    yield shared
    await shared.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def start() -> AsyncIterator[Start]:
    """`start_demo`, with everything it started closed after the test."""
    started: list[VLLMEngine] = []

    async def one(model: str | Path = MODEL, **options: Any) -> VLLMEngine:
        started.append(await start_demo(model, **options))
        return started[-1]

    yield one
    for each in started:
        await each.aclose()


@pytest.fixture
def variant(engine: VLLMEngine) -> Iterator[Variant]:
    """From sampling parameters to an engine that shares the session engine's processes; do not close it."""
    made: list[VLLMEngine] = []

    def make(sampling: SamplingParameters, **sampling_args: Any) -> VLLMEngine:
        launch = Launch(str(MODEL), VLLMOptions(sampling_args=sampling_args), sampling, "auto", None)
        files = ModelFolder.read(MODEL)
        template = sampling_template(launch, files)
        verify(template, engine._engine.vllm_config)
        tokeniser = PromptTokeniser(files.tokenizer, files.template, engine.context, sampling.max_tokens)
        check = ResponseCheck(sampling.structured) if sampling.structured is not None else None
        made.append(VLLMEngine(launch, replace(engine._started, sampling=template, tokeniser=tokeniser), check))
        return made[-1]

    yield make
    for each in made:
        each._closed = True
        each._launch.clean()
