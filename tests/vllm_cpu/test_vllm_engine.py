"""What `VLLMEngine` promises, on the real vLLM with the demo model."""

from __future__ import annotations

import asyncio
import io
import json
import time
from array import array
from dataclasses import replace

import pytest

from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines import ContinuousEngine, VLLMEngine, contract
from flyte_batch.engines.tokenising import PromptTokeniser, TokenisedPrompt
from flyte_batch.engines.vllm import VLLMRecord
from flyte_batch.errors import BadImage, BadRecord, BadResponse, EngineDead, MissingValue, PromptTooLong
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters, StructuredOutput
from tests.vllm_cpu.starting import Start, Variant

PROMPTS = [Prompt("Ben has 3 cups."), Prompt("12 + 7 ="), Prompt("Mia picks 73 stamps on Monday and 7 on Tuesday.")]
QUESTIONS = [problem.question for problem in generate(40, 5)]
CLOSING = [check for check in contract.CHECKS + contract.CONTINUOUS_CHECKS if "close" in contract.name(check)]


def unfinished(engine: VLLMEngine) -> int:
    """Requests that vLLM holds on this side."""
    return int(engine._engine.get_num_unfinished_requests())


async def handed_over(engine: VLLMEngine, count: int) -> None:
    """Wait until vLLM holds so many requests; it tells nobody when it does."""
    while unfinished(engine) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def core_holds_records(engine: VLLMEngine) -> bool:
    """Whether the core still keeps memory for some record: it says so when asked to forget its cached prefixes."""
    return not await engine._engine.reset_prefix_cache()


class TestContract:
    def test_is_a_continuous_engine(self, engine: VLLMEngine) -> None:
        assert isinstance(engine, ContinuousEngine)
        assert (engine.context, engine.slots) == (512, 128)
        assert engine.capacity_tokens == 524_288  # the gibibyte that is the default on a CPU

    @pytest.mark.parametrize(
        "check", [c for c in contract.CHECKS + contract.CONTINUOUS_CHECKS if c not in CLOSING], ids=contract.name
    )
    async def test_keeps_it(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, check: contract.Check) -> None:
        async def shared() -> VLLMEngine:
            return engine

        async def stay_open() -> None:
            pass

        monkeypatch.setattr(engine, "aclose", stay_open)
        await check(shared, PROMPTS)

    @pytest.mark.parametrize("check", CLOSING, ids=contract.name)
    async def test_keeps_it_when_closed(self, start: Start, check: contract.Check) -> None:
        await check(start, PROMPTS)


class TestAnswers:
    async def test_the_demo_model_is_right(self, engine: VLLMEngine) -> None:
        problems = list(generate(200, 11))
        results = await engine.infer([engine.prepare(Prompt(problem.question)) for problem in problems])
        right = [
            isinstance(r, Completion) and is_right(r.text, p.answer) for r, p in zip(results, problems, strict=True)
        ]
        assert sum(right) >= 198

    async def test_counts_tokens_without_the_end(self, engine: VLLMEngine) -> None:
        tokenizer = engine._started.tokeniser.tokenizer
        (result,) = await engine.infer([engine.prepare(Prompt(QUESTIONS[0]))])
        assert isinstance(result, Completion)
        assert result.finish_reason == "stop"
        assert result.response_tokens == len(tokenizer.encode(result.text, add_special_tokens=False).ids)
        assert result.prompt_tokens == len(engine.prompt_ids(engine.prepare(Prompt(QUESTIONS[0]))))

    async def test_a_response_is_cut_at_max_tokens(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(max_tokens=3))
        (result,) = await engine.infer([engine.prepare(Prompt(QUESTIONS[0]))])
        assert isinstance(result, Completion)
        assert (result.finish_reason, result.response_tokens) == ("length", 3)

    async def test_a_response_is_cut_where_the_context_ends(self, engine: VLLMEngine, variant: Variant) -> None:
        endless = variant(SamplingParameters(max_tokens=500, ignore_eos=True))
        record = endless.prepare(Prompt(QUESTIONS[0]))
        completion = await endless.generate(record)
        assert completion.prompt_tokens + completion.response_tokens == engine.context
        assert completion.finish_reason == "length"

    async def test_a_conversation_reads_like_its_prompt(self, engine: VLLMEngine) -> None:
        chat = Chat([{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}])
        first, second = await engine.infer([engine.prepare(chat), engine.prepare(Prompt(QUESTIONS[0]))])
        assert first == second


class TestBadRecords:
    @pytest.mark.parametrize(
        ("prompt", "kind", "why"),
        [
            (Prompt("word " * 2000), PromptTooLong, "context holds 512"),
            (Prompt("   "), MissingValue, "empty"),
            (Prompt("What is this?", images=(b"\x89PNG",)), BadRecord, "takes texts only: use a vision model"),
            (Chat([]), MissingValue, "conversation is empty"),
        ],
    )
    def test_prepare_says_what_is_wrong(
        self, engine: VLLMEngine, prompt: Prompt | Chat, kind: type[BadRecord], why: str
    ) -> None:
        with pytest.raises(kind, match=why):
            engine.prepare(prompt)

    @pytest.mark.parametrize(
        ("ids", "kind", "why"),
        [
            ([5] * 600, PromptTooLong, "longer than the maximum model length"),
            ([5] * 512, PromptTooLong, "longer than the maximum model length"),
            ([5, 99_999], BadRecord, "99999"),
            ([], BadRecord, "cannot be empty"),
        ],
    )
    async def test_what_vllm_refuses_fails_alone(
        self, engine: VLLMEngine, ids: list[int], kind: type[BadRecord], why: str
    ) -> None:
        good = [engine.prepare(Prompt(question)) for question in QUESTIONS[:3]]
        expected = await engine.infer(good)
        poison = VLLMRecord(TokenisedPrompt(array("I", ids), 10))
        results = await engine.infer([good[0], poison, *good[1:]])
        assert [results[0], *results[2:]] == expected
        assert type(results[1]) is kind
        assert why in str(results[1])
        assert "\n" not in str(results[1])
        assert unfinished(engine) == 0

    async def test_one_that_is_too_long_is_known_where_vllm_checks_the_tokens_first(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(structured=StructuredOutput(choice=("yes", "no"))))
        with pytest.raises(PromptTooLong, match="maximum context length is 512"):
            await engine.generate(VLLMRecord(TokenisedPrompt(array("I", [5] * 600), 10)))


class TestCancellation:
    async def test_leaves_nothing_behind(self, engine: VLLMEngine, variant: Variant) -> None:
        endless = variant(SamplingParameters(max_tokens=450, ignore_eos=True))
        records = [endless.prepare(Prompt(question)) for question in QUESTIONS]
        running = [asyncio.ensure_future(endless.generate(record)) for record in records]
        await handed_over(engine, len(records))
        for call in running[::2]:
            call.cancel()
        await asyncio.wait(running[::2])
        assert all(call.cancelled() for call in running[::2])
        assert unfinished(engine) == len(running[1::2])
        results = await asyncio.gather(*running[1::2])
        assert all(result.finish_reason == "length" for result in results)
        await self.nothing_is_computed(engine)

    @pytest.mark.parametrize("steps", range(12))
    async def test_at_any_step_of_handing_over(self, engine: VLLMEngine, variant: Variant, steps: int) -> None:
        endless = variant(SamplingParameters(max_tokens=450, ignore_eos=True))
        call = asyncio.ensure_future(endless.generate(endless.prepare(Prompt(QUESTIONS[0]))))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert unfinished(engine) == 0
        await self.nothing_is_computed(engine)

    async def test_of_a_whole_batch(self, engine: VLLMEngine, variant: Variant) -> None:
        endless = variant(SamplingParameters(max_tokens=450, ignore_eos=True))
        call = asyncio.ensure_future(endless.infer([endless.prepare(Prompt(question)) for question in QUESTIONS]))
        await handed_over(engine, 1)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert unfinished(engine) == 0
        await self.nothing_is_computed(engine)

    @staticmethod
    async def nothing_is_computed(engine: VLLMEngine) -> None:
        """The core drops what was aborted at its next step; an endless record would take much longer."""
        started = time.monotonic()
        while await core_holds_records(engine):
            assert time.monotonic() - started < 5, "the core goes on with what was cancelled"
            await asyncio.sleep(0.01)


class TestSampling:
    async def test_a_seeded_row_is_sampled_alike_whatever_its_neighbours(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(max_tokens=40, temperature=2.0, seed=7))
        records = [engine.prepare(Prompt(question, seed=row)) for row, question in enumerate(QUESTIONS)]
        together = await engine.infer(records)
        assert [await engine.generate(record) for record in records[:8]] == together[:8]
        assert (await engine.infer(records[::-1]))[::-1] == together

    async def test_rows_and_engines_with_other_seeds_differ(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(max_tokens=40, temperature=2.0, seed=7))
        other = variant(SamplingParameters(max_tokens=40, temperature=2.0, seed=8))
        rows = [Prompt(QUESTIONS[0], seed=row) for row in range(8)]
        results = await engine.infer([engine.prepare(row) for row in rows])
        assert len({str(result) for result in results}) > 2
        assert results != await other.infer([other.prepare(row) for row in rows])

    async def test_a_prompt_without_a_seed_takes_the_engines(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(max_tokens=40, temperature=2.0, seed=7))
        record = engine.prepare(Prompt(QUESTIONS[0]))
        assert await engine.generate(record) == await engine.generate(record)

    async def test_a_stop_text_ends_the_response_and_is_left_out(self, engine: VLLMEngine, variant: Variant) -> None:
        stopping = variant(SamplingParameters(stop=("####",)))
        whole = await engine.generate(engine.prepare(Prompt(QUESTIONS[0])))
        part = await stopping.generate(stopping.prepare(Prompt(QUESTIONS[0])))
        assert part.text == whole.text.partition("####")[0]
        assert part.finish_reason == "stop"

    async def test_a_special_token_as_a_stop_text_ends_the_response(self, engine: VLLMEngine, variant: Variant) -> None:
        added = engine._started.tokeniser.tokenizer.get_added_tokens_decoder()
        special = next(token.content for i, token in sorted(added.items()) if token.special)
        stopping = variant(SamplingParameters(stop=(special,)))
        assert stopping._started.sampling.stop == []
        assert stopping._started.sampling.stop_token_ids == [min(added)]
        whole = await engine.generate(engine.prepare(Prompt(QUESTIONS[0])))
        assert await stopping.generate(stopping.prepare(Prompt(QUESTIONS[0]))) == whole

    async def test_a_stop_token_ends_the_response_uncounted(self, engine: VLLMEngine, variant: Variant) -> None:
        record = engine.prepare(Prompt(QUESTIONS[0]))
        whole = await engine.generate(record)
        (newline,) = engine._started.tokeniser.tokenizer.encode("\n", add_special_tokens=False).ids
        part = await variant(SamplingParameters(stop_token_ids=(newline,))).generate(record)
        assert part.text == whole.text.partition("\n")[0]
        lines = engine._started.tokeniser.tokenizer.encode(part.text, add_special_tokens=False).ids
        assert part.response_tokens == len(lines)

    async def test_every_parameter_reaches_vllm(self, variant: Variant) -> None:
        sampling = SamplingParameters(
            max_tokens=50, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, stop=("END",), stop_token_ids=(3,),
            min_tokens=2, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3,
            bad_words=("apples",), seed=4,
        )  # fmt: skip
        engine = variant(sampling, logit_bias={5: -1.0}, include_stop_str_in_output=True)
        parameters = engine._parameters(engine.prepare(Prompt("Hi", seed=9)))
        names = {
            "max_tokens", "temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "repetition_penalty",
            "presence_penalty", "frequency_penalty",
        }  # fmt: skip
        assert {name: getattr(parameters, name) for name in names} == {name: getattr(sampling, name) for name in names}
        assert (parameters.stop, parameters.stop_token_ids, parameters.bad_words) == (["END"], [3], ["apples"])
        assert (parameters.logit_bias, parameters.include_stop_str_in_output) == ({5: -1.0}, True)
        assert parameters.seed not in (None, 4, 9)
        completion = await engine.generate(engine.prepare(Prompt("Hi", seed=9)))
        assert completion.finish_reason in ("stop", "length")

    async def test_bad_words_are_not_said(self, engine: VLLMEngine, variant: Variant) -> None:
        question = Prompt("Anna has 12 apples and gives 5 of them to a friend. How many apples are left?")
        assert "=" in (await engine.generate(engine.prepare(question))).text
        silent = variant(SamplingParameters(bad_words=("=",)))
        assert "=" not in (await silent.generate(silent.prepare(question))).text


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["cups", "pens"]}},
        "required": ["answer", "unit"],
        "additionalProperties": False,
    }
)


class TestStructuredOutput:
    async def test_choice(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(structured=StructuredOutput(choice=("yes", "no"))))
        results = await engine.infer([engine.prepare(prompt) for prompt in PROMPTS])
        assert {result.text for result in results if isinstance(result, Completion)} <= {"yes", "no"}
        assert not [result for result in results if isinstance(result, Exception)]

    async def test_regex(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(structured=StructuredOutput(regex=r"#### [0-9]{2}")))
        for result in await engine.infer([engine.prepare(Prompt(question)) for question in QUESTIONS[:10]]):
            assert isinstance(result, Completion)
            assert result.text[:5] == "#### "
            assert result.text[5:].isdigit()

    async def test_json(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(structured=StructuredOutput(json_schema=SCHEMA)))
        for result in await engine.infer([engine.prepare(Prompt(question)) for question in QUESTIONS[:10]]):
            assert isinstance(result, Completion)
            assert set(json.loads(result.text)) == {"answer", "unit"}

    async def test_grammar(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(structured=StructuredOutput(grammar='root ::= "left" | "right"')))
        assert (await engine.generate(engine.prepare(PROMPTS[0]))).text in ("left", "right")

    async def test_a_cut_one_is_a_bad_response_alone(self, variant: Variant) -> None:
        engine = variant(SamplingParameters(max_tokens=6, structured=StructuredOutput(json_schema=SCHEMA)))
        records = [engine.prepare(prompt) for prompt in PROMPTS]
        (cut,) = await engine.infer(records[:1])
        assert isinstance(cut, BadResponse)
        assert "cut after 6 tokens" in str(cut)
        assert "raise max_tokens" in str(cut)

    async def test_is_checked_after_decoding_too(self, engine: VLLMEngine, variant: Variant) -> None:
        # As a model does whose engine does not keep to the form.
        unbound = variant(SamplingParameters(structured=StructuredOutput(choice=("yes", "no"))))
        unbound._started = replace(unbound._started, sampling=engine._started.sampling)
        with pytest.raises(BadResponse, match="none of 'yes', 'no'"):
            await unbound.generate(unbound.prepare(Prompt(QUESTIONS[0])))


class TestPictures:
    """What is made of them. No vision model runs here: each needs torchvision, whose builds want a torch for GPUs."""

    @staticmethod
    def seeing(variant: Variant) -> VLLMEngine:
        engine = variant(SamplingParameters(max_tokens=8))
        tokeniser = PromptTokeniser(engine._started.tokeniser.tokenizer, None, engine.context, 8)
        engine._started = replace(engine._started, image_tokens=100, tokeniser=tokeniser)
        return engine

    async def test_go_to_vllm_decoded_and_in_order_beside_the_text(self, variant: Variant) -> None:
        engine = self.seeing(variant)
        record = engine.prepare(Prompt("What are these?", images=(picture("red"), picture("blue"))))
        prompt = engine._prompt(record)
        assert prompt["prompt"] == "What are these?"
        images = prompt["multi_modal_data"]["image"]
        assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
        plain = engine.prepare(Prompt("What are these?"))
        assert engine.estimate_cost(record) == engine.estimate_cost(plain) + 200
        assert list(engine.prompt_ids(record)) == list(engine.prompt_ids(plain))

    async def test_a_broken_one_fails_alone(self, variant: Variant) -> None:
        with pytest.raises(BadImage, match="image 2 cannot be decoded"):
            self.seeing(variant).prepare(Prompt("What are these?", images=(picture("red"), b"\x89PNG broken")))


def picture(color: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


async def test_the_loop_stays_free_while_many_records_are_handed_over(engine: VLLMEngine) -> None:
    records = [engine.prepare(Prompt(question)) for question in QUESTIONS] * 10
    work = asyncio.ensure_future(engine.infer(records))
    longest, last = 0.0, time.perf_counter()
    while not work.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert len(work.result()) == len(records)
    assert longest < 2  # 400 at once are handed over in one step of the loop; a batcher never does that


async def test_after_closing_nothing_is_answered(start: Start) -> None:
    engine = await start()
    record = engine.prepare(PROMPTS[0])
    processes = engine._launch.processes
    assert processes is not None
    assert processes.alive
    await engine.aclose()
    assert processes.alive == []
    assert engine.errored
    assert not engine._launch.folder.exists()
    with pytest.raises(EngineDead, match="was closed: start a new one"):
        await engine.generate(record)
