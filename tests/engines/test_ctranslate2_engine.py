"""CTranslate2 behind the engine's contract: limits, stop texts, failures, closing. Right answers come elsewhere."""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ctranslate2  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.cores import available_cores
from flyte_batch.engines import ctranslate2 as module
from flyte_batch.engines.ctranslate2 import CTranslate2Engine
from flyte_batch.engines.tokenising import TokenisedPrompt
from flyte_batch.errors import BadInput, BadRecord, EngineDead, EngineError, EngineOutOfMemory, PromptTooLong
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters, StructuredOutput

QUESTIONS = [f"Ben has {n} cups and gives {n // 2} of them to a friend. How many cups are left?" for n in range(2, 42)]


@asynccontextmanager
async def started(
    model: Path, sampling: SamplingParameters | None = None, **options: Any
) -> AsyncIterator[CTranslate2Engine]:
    async with await CTranslate2Engine.start(
        model, sampling=sampling or SamplingParameters(max_tokens=12), **options
    ) as engine:
        yield engine


async def ask(engine: CTranslate2Engine, *texts: str) -> list[Completion]:
    results = await engine.infer([engine.prepare(Prompt(text)) for text in texts])
    assert all(isinstance(result, Completion) for result in results)
    return [result for result in results if isinstance(result, Completion)]


def reference(model: Path, prompt: str, max_tokens: int, **options: Any) -> list[int]:
    """What CTranslate2 itself makes of one prompt."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(f"<|user|>{prompt}<|assistant|>").tokens
    generator = ctranslate2.Generator(str(model), compute_type="float32", intra_threads=1)
    (result,) = generator.generate_batch([tokens], max_length=max_tokens, include_prompt_in_result=False, **options)
    return list(result.sequences_ids[0])


class TestAnswers:
    async def test_are_what_the_library_makes_of_each_prompt_alone(self, model: Path) -> None:
        async with started(model, inter_threads=2, sub_batch=8) as engine:
            results = await ask(engine, *QUESTIONS)
            for question, result in list(zip(QUESTIONS, results, strict=True))[::13]:
                ids = reference(model, question, 12)
                assert result.text == engine._tokeniser.tokenizer.decode(ids)
                assert result.response_tokens == len(ids)
                assert result.prompt_tokens == len(engine.prepare(Prompt(question)).ids)

    async def test_do_not_depend_on_how_a_batch_is_split(self, model: Path) -> None:
        async with started(model) as engine:
            expected = await ask(engine, *QUESTIONS)
            for sub_batch, span in ((1, 0), (3, 1), (7, 100), (64, 100)):
                engine._plan = replace(engine._plan, sub_batch=sub_batch, span=span)
                assert await ask(engine, *QUESTIONS) == expected

    async def test_that_reach_max_tokens_end_for_length(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=3)) as engine:
            (result,) = await ask(engine, QUESTIONS[0])
            assert (result.finish_reason, result.response_tokens) == ("length", 3)

    async def test_end_at_the_end_token_which_is_neither_text_nor_counted(self, own_model: Path) -> None:
        ids = reference(own_model, QUESTIONS[0], 8)
        end = next(at for at in range(1, 8) if ids[at] not in ids[:at])
        (own_model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[end]]}))
        async with started(own_model, SamplingParameters(max_tokens=8)) as engine:
            (result,) = await ask(engine, QUESTIONS[0])
            assert (result.finish_reason, result.response_tokens) == ("stop", end)
            assert result.text == engine._tokeniser.tokenizer.decode(ids[:end])

    async def test_with_a_seed_are_the_same_again_and_another_seed_gives_others(self, model: Path) -> None:
        async def sampled(seed: int) -> list[Completion]:
            async with started(
                model, SamplingParameters(max_tokens=12, temperature=1.5, top_k=50, seed=seed)
            ) as engine:
                return await ask(engine, *QUESTIONS)

        assert await sampled(1) == await sampled(1)
        assert await sampled(1) != await sampled(2)

    async def test_with_a_seed_do_not_depend_on_other_engines_of_the_process(self, model: Path) -> None:
        one, two = (SamplingParameters(max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 2))
        async with started(model, one) as engine:
            alone = await ask(engine, *QUESTIONS)
        async with started(model, one) as engine, started(model, two) as other:
            await ask(other, *QUESTIONS)
            assert await ask(engine, *QUESTIONS) == alone

    async def test_without_a_seed_differ_even_after_an_engine_with_one(self, model: Path) -> None:
        results = []
        for _ in range(2):
            async with started(model, SamplingParameters(temperature=50.0, seed=1)):
                pass
            async with started(model, SamplingParameters(max_tokens=12, temperature=50.0), inter_threads=1) as engine:
                results.append(await ask(engine, *QUESTIONS))
        assert results[0] != results[1]

    async def test_with_more_top_k_than_the_vocabulary_sample_from_all_of_it(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=2, temperature=1.0, top_k=10**6, top_p=0.9)) as engine:
            assert len(await ask(engine, "a", "b")) == 2


class TestStopTexts:
    @pytest.mark.parametrize("cut", [(1, 4), (2, 5), (0, 2), (3, 9)])
    async def test_end_a_response_early_and_are_left_out(self, model: Path, cut: tuple[int, int]) -> None:
        async with started(model) as engine:
            (whole,) = await ask(engine, QUESTIONS[3])
        stop = whole.text[slice(*cut)]
        async with started(model, SamplingParameters(max_tokens=12, stop=(stop, "never said"))) as engine:
            (result,) = await ask(engine, QUESTIONS[3])
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.finish_reason == "stop"
        assert result.response_tokens <= whole.response_tokens

    async def test_that_were_said_save_the_tokens_after_them(self, model: Path) -> None:
        sampling = SamplingParameters(max_tokens=200)
        async with started(model, sampling) as engine:
            (whole,) = await ask(engine, QUESTIONS[3])
        async with started(model, replace(sampling, stop=(whole.text[:2],))) as engine:
            (result,) = await ask(engine, QUESTIONS[3])
        assert result.text == ""
        assert result.response_tokens <= 2

    async def test_that_are_never_said_change_nothing(self, model: Path) -> None:
        async with started(model) as engine:
            expected = await ask(engine, *QUESTIONS)
        for stop in ("\u2603", "never said", " " * 9, "e\n\n\n"):
            async with started(model, SamplingParameters(max_tokens=12, stop=(stop,))) as engine:
                assert await ask(engine, *QUESTIONS) == expected

    async def test_that_are_a_special_token_end_at_its_id(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=4, stop=("<|user|>",))) as engine:
            user = engine._tokeniser.tokenizer.token_to_id("<|user|>")
            assert user in engine._plan.arguments["end_token"]
            assert engine._plan.stop == ()  # no call into Python for every token


class TestSamplingParameters:
    async def test_min_tokens_holds_the_models_end_back(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=64)) as engine:
            free = await ask(engine, *QUESTIONS)
        async with started(model, SamplingParameters(max_tokens=64, min_tokens=30)) as engine:
            held = await ask(engine, *QUESTIONS)
            assert [(await ask(engine, question))[0] for question in QUESTIONS[:3]] == held[:3]
        assert min(result.response_tokens for result in free) < 30
        assert all(result.response_tokens >= 30 for result in held)

    async def test_min_tokens_gives_way_to_the_context(self, model: Path) -> None:
        sampling = SamplingParameters(max_tokens=30, min_tokens=30)
        async with started(model, sampling) as engine:
            context = len(engine.prepare(Prompt("cups")).ids) + 2
        async with started(model, sampling, max_model_len=context) as engine:
            (result,) = await ask(engine, "cups")
            assert (result.response_tokens, result.finish_reason) == (2, "length")

    async def test_ignore_eos_goes_on_to_max_tokens(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=50, ignore_eos=True)) as engine:
            results = await ask(engine, *QUESTIONS[:3])
        assert {(result.response_tokens, result.finish_reason) for result in results} == {(50, "length")}

    @pytest.mark.parametrize("ignore_eos", [False, True])
    async def test_stop_token_ids_end_a_response_and_are_left_out(self, model: Path, ignore_eos: bool) -> None:
        ids = reference(model, QUESTIONS[0], 8)
        end = next(at for at in range(1, 8) if ids[at] not in ids[:at])
        sampling = SamplingParameters(max_tokens=8, stop_token_ids=(ids[end],), ignore_eos=ignore_eos)
        async with started(model, sampling) as engine:
            (result,) = await ask(engine, QUESTIONS[0])
            assert (result.finish_reason, result.response_tokens) == ("stop", end)
            assert result.text == engine._tokeniser.tokenizer.decode(ids[:end])

    async def test_bad_words_are_not_said(self, model: Path) -> None:
        async with started(model, SamplingParameters(max_tokens=20)) as engine:
            assert any("cups" in result.text for result in await ask(engine, *QUESTIONS))
        async with started(model, SamplingParameters(max_tokens=20, bad_words=("cups", " left"))) as engine:
            results = await ask(engine, *QUESTIONS)
            assert not any("cups" in result.text for result in results)
            assert [(await ask(engine, question))[0] for question in QUESTIONS[:5]] == results[:5]

    async def test_a_repetition_penalty_does_not_let_neighbours_change_a_response(self, model: Path) -> None:
        texts = [question + " Please." * (at % 4) for at, question in enumerate(QUESTIONS)]
        async with started(model, SamplingParameters(max_tokens=20, repetition_penalty=2.0)) as engine:
            assert await ask(engine, *texts) == [(await ask(engine, text))[0] for text in texts]
        async with started(model, SamplingParameters(max_tokens=20)) as engine:
            free = await ask(engine, *texts)
        async with started(model, SamplingParameters(max_tokens=20, repetition_penalty=2.0)) as engine:
            assert await ask(engine, *texts) != free

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"min_p": 0.1, "temperature": 1.0}, r"has no min_p \(got 0.1\): leave it out, or use vLLM"),
            ({"presence_penalty": 1.0}, "has no presence_penalty"),
            ({"frequency_penalty": -1.0}, "has no frequency_penalty"),
            ({"structured": StructuredOutput(choice=("yes", "no"))}, "has no structured"),
            ({"stop_token_ids": (10**6,)}, "stop_token_ids has 1000000, the model's tokens are 0 to 623"),
            ({"stop": ("x",), "min_tokens": 2}, "leave one of stop and min_tokens out"),
        ],
    )
    async def test_that_it_has_not_are_refused_before_a_record_is_inferred(
        self, model: Path, options: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(BadInput, match=why):
            await CTranslate2Engine.start(model, sampling=SamplingParameters(**options))


class TestPrompts:
    async def test_may_be_conversations(self, model: Path) -> None:
        async with started(model) as engine:
            chat = engine.prepare(Chat([{"role": "user", "content": QUESTIONS[0]}]))
            assert await engine.infer([chat]) == await ask(engine, QUESTIONS[0])

    async def test_with_pictures_are_bad_records(self, model: Path) -> None:
        async with started(model) as engine:
            with pytest.raises(BadRecord, match="CTranslate2 takes texts only"):
                engine.prepare(Prompt("What is it?", images=(b"png",)))


class TestTheContext:
    async def test_comes_from_the_models_files(self, model: Path) -> None:
        async with started(model) as engine:
            assert engine.context == 2048

    async def test_rejects_a_prompt_that_leaves_no_room_naming_both_numbers(self, model: Path) -> None:
        async with started(model, max_model_len=30) as engine:
            with pytest.raises(PromptTooLong, match=r"\d+ tokens.*holds 30"):
                engine.prepare(Prompt("cups " * 40))

    async def test_limits_the_response_of_a_long_prompt_and_of_no_other(self, model: Path) -> None:
        texts = ["cups", *("cups" + " 1" * n for n in range(9, 14))]
        async with started(model) as engine:
            context = len(engine.prepare(Prompt(texts[-1])).ids) + 1
        async with started(model, SamplingParameters(max_tokens=10), max_model_len=context) as engine:
            prompts = [engine.prepare(Prompt(text)) for text in texts]
            limits = [prompt.limit for prompt in prompts]
            assert limits[0] == 10
            assert len(set(limits)) > 3
            assert all(engine.estimate_cost(prompt) <= context for prompt in prompts)
            together = await ask(engine, *texts)
            assert together == [(await ask(engine, text))[0] for text in texts]
            assert all(result.response_tokens <= limit for result, limit in zip(together, limits, strict=True))

    async def test_has_to_be_given_where_the_model_names_none(self, own_model: Path) -> None:
        path = own_model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 1e30}))
        with pytest.raises(BadInput, match="pass max_model_len"):
            await CTranslate2Engine.start(own_model)
        async with started(own_model, max_model_len=64) as engine:
            assert engine.context == 64

    async def test_cannot_be_made_longer_than_the_models(self, model: Path) -> None:
        with pytest.raises(BadInput, match=r"max_model_len is 4096.*2048"):
            await CTranslate2Engine.start(model, max_model_len=4096)


class TestStarting:
    async def test_without_a_model_says_what_was_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"no model\.bin"):
            await CTranslate2Engine.start(tmp_path)

    async def test_with_a_cut_off_model_is_an_engine_error(self, own_model: Path) -> None:
        weights = own_model / "model.bin"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(EngineError, match="cannot load"):
            await CTranslate2Engine.start(own_model)

    async def test_without_a_gpu_says_so(self, model: Path) -> None:
        if ctranslate2.get_cuda_device_count():
            pytest.skip("there is a GPU")
        with pytest.raises(BadInput, match="sees no GPU"):
            await CTranslate2Engine.start(model, device="cuda")

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"compute_type": "float16"}, "float16"),
            ({"compute_type": "int3"}, "int3"),
            ({"device": "tpu"}, "tpu"),
            ({"inter_threads": 0}, "inter_threads must be at least 1"),
            ({"sub_batch": 0}, "sub_batch must be at least 1"),
            ({"max_model_len": 1}, "at least 2"),
        ],
    )
    async def test_with_an_impossible_option_names_it(self, model: Path, options: dict[str, Any], why: str) -> None:
        with pytest.raises(BadInput, match=why):
            await CTranslate2Engine.start(model, **options)

    async def test_insisting_on_a_chat_template_that_is_not_there_fails(self, own_model: Path) -> None:
        (own_model / "chat_template.jinja").unlink()
        with pytest.raises(BadInput, match="no chat template"):
            await CTranslate2Engine.start(own_model, chat=True)

    async def test_a_seed_with_several_workers_is_refused(self, model: Path) -> None:
        sampling = SamplingParameters(temperature=1.0, seed=1)
        with pytest.raises(BadInput, match="inter_threads=1"):
            await CTranslate2Engine.start(model, sampling=sampling, inter_threads=2)

    @pytest.mark.parametrize(
        ("files", "cores"),
        [
            ({"cpu.max": "150000 100000"}, 2),
            ({"cpu.max": "50000 100000"}, 1),
            ({"cpu.max": "max 100000"}, 64),
            ({"cpu.max": "nonsense"}, 64),
            ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
            ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
            ({}, 64),
        ],
    )
    def test_counts_the_cores_a_container_may_use(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
    ) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        assert available_cores(tmp_path) == cores


class Stand:
    """A generator in the real one's place, for what a real one does only when a device breaks."""

    def __init__(self, generate: Callable[[int], Any]) -> None:
        self.calls = 0
        self._generate = generate

    def generate_batch(self, prompts: list[list[str]], **_: Any) -> list[Any]:
        self.calls += 1
        return [self._generate(self.calls) for _ in prompts]

    def unload_model(self) -> None:
        pass


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "becomes"),
        [
            (RuntimeError("CUDA failed with error out of memory"), EngineOutOfMemory),
            (MemoryError("std::bad_alloc"), EngineOutOfMemory),
            (RuntimeError("CUDA failed with error an illegal memory access was encountered"), EngineDead),
            (RuntimeError("No position encodings are defined for positions >= 4"), EngineError),
            (ValueError("unknown token"), EngineError),
        ],
    )
    async def test_of_the_library_become_ours(self, model: Path, error: Exception, becomes: type[EngineError]) -> None:
        def fail(_: int) -> None:
            raise error

        async with started(model) as engine:
            real, engine._generator = engine._generator, Stand(fail)
            with pytest.raises(EngineError) as caught:
                await ask(engine, "a", "b")
            assert type(caught.value) is becomes
            assert caught.value.__cause__ is error
            if becomes is EngineDead:
                with pytest.raises(EngineDead):
                    await ask(engine, "a")
            else:
                engine._generator = real
                assert len(await ask(engine, "a")) == 1

    async def test_of_a_record_the_model_does_not_know_leave_the_engine_working(self, model: Path) -> None:
        async with started(model) as engine:
            with pytest.raises(EngineError):
                await engine.infer([TokenisedPrompt(array("I", []), 4)])
            assert len(await ask(engine, "a")) == 1


class Handle:
    """A result that is there once its gate opens."""

    def __init__(self, gate: threading.Event, started: threading.Event) -> None:
        self._gate, self._started = gate, started

    def result(self) -> Any:
        self._started.set()
        self._gate.wait(10)
        return type("Result", (), {"sequences_ids": [[5, 6]]})()


class TestCancelling:
    async def test_keeps_what_has_not_started_from_the_device(self, model: Path) -> None:
        gate, running = threading.Event(), threading.Event()
        async with started(model, inter_threads=1, sub_batch=1) as engine:
            engine._generator = stand = Stand(lambda _: Handle(gate, running))
            records = [engine.prepare(Prompt(question)) for question in QUESTIONS]
            call = asyncio.ensure_future(engine.infer(records))
            await asyncio.to_thread(running.wait, 10)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            gate.set()
        assert stand.calls < len(records)  # 40 sub-batches of one record

    async def test_close_waits_for_what_the_device_still_computes(self, model: Path) -> None:
        gate, running = threading.Event(), threading.Event()
        engine = await CTranslate2Engine.start(model)
        engine._generator = Stand(lambda _: Handle(gate, running))
        call = asyncio.ensure_future(engine.infer([engine.prepare(Prompt("a"))]))
        await asyncio.to_thread(running.wait, 10)
        closing = asyncio.ensure_future(engine.aclose())
        await asyncio.sleep(0.02)
        assert not closing.done()
        gate.set()
        await closing
        assert len(await call) == 1

    def test_an_engine_that_nobody_closed_warns(self, model: Path) -> None:
        engines = [asyncio.run(CTranslate2Engine.start(model))]
        with pytest.warns(ResourceWarning, match="was not closed"):
            engines.clear()

    async def test_close_from_another_loop_works(self, model: Path) -> None:
        engine = await CTranslate2Engine.start(model)
        await engine.aclose()
        await asyncio.to_thread(asyncio.run, engine.aclose())


@given(
    lengths=st.lists(st.integers(1, 400), max_size=80),
    sub_batch=st.integers(1, 40),
    span=st.integers(0, 200),
    workers=st.integers(1, 5),
)
def test_a_batch_is_split_into_groups_of_like_length_that_lose_nothing(
    lengths: list[int], sub_batch: int, span: int, workers: int
) -> None:
    plan = module._Plan({}, (), frozenset(), frozenset(), workers, sub_batch, span)
    groups = list(module._split(lengths, plan))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= sub_batch
        assert max(lengths[i] for i in group) - min(lengths[i] for i in group) <= span


def test_equal_prompts_are_shared_evenly_among_the_workers() -> None:
    plan = module._Plan({}, (), frozenset(), frozenset(), workers=2, sub_batch=32, span=32)
    assert [len(group) for group in module._split([10] * 40, plan)] == [20, 20]
    assert [len(group) for group in module._split([10] * 80, plan)] == [20, 20, 20, 20]


async def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model) as engine:
        monkeypatch.delattr(engine._tokeniser, "tokenizer")  # whoever tokenises it now fails differently
        with pytest.raises(PromptTooLong, match="5,000,021 characters, so more than 2048 tokens"):
            engine.prepare(Prompt("why? " * 1_000_000))
