"""Prompts reach the model as transformers would render them; what cannot be rendered or tokenised fails alone."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flyte_batch.demo import model_path
from flyte_batch.engines.tokenising import ChatTemplate, ModelFolder, PromptTokeniser
from flyte_batch.errors import BadInput, BadRecord
from flyte_batch.records import Prompt

CHATML = (
    "{%- for m in messages -%}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' -}}\n"
    "{%- endfor -%}\n{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% set content = system + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% endfor %}"
)


def render(source: str, text: str = "Hi", system: str | None = None, **special: str) -> str:
    return ChatTemplate(source, special).render(Prompt(text, system))


class TestATemplate:
    def test_gets_the_messages_and_is_asked_for_an_answer(self) -> None:
        assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert render(CHATML, system="Be brief.").startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        )

    def test_gets_the_special_tokens(self) -> None:
        bos = {"bos_token": "<s>"}
        assert render(LLAMA_2, **bos) == "<s>[INST] Hi [/INST]"
        assert render(LLAMA_2, system="S", **bos) == "<s>[INST] <<SYS>>\nS\n<</SYS>>Hi [/INST]"

    def test_loses_its_own_line_breaks_as_in_transformers(self) -> None:
        assert (
            render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n")
            == "Hi\n"
        )

    def test_may_leave_a_loop(self) -> None:
        assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"

    def test_may_mark_what_is_generated(self) -> None:
        assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"

    def test_may_write_json_without_html_escapes(self) -> None:
        assert render("{{ messages[0] | tojson }}", "é<'&") == '{"role": "user", "content": "é<\'&"}'
        assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'

    def test_may_ask_for_the_date(self) -> None:
        assert render("{{ strftime_now('%Y') }}") == str(datetime.now().astimezone().year)

    def test_may_ask_whether_there_are_tools(self) -> None:
        assert render("{% if tools is not none %}tools{% else %}none{% endif %}") == "none"

    def test_that_refuses_a_prompt_makes_it_a_bad_record_with_its_words(self) -> None:
        refusing = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok"
        )
        assert render(refusing) == "ok"
        with pytest.raises(BadRecord, match="System role not supported"):
            render(refusing, system="S")

    @pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"])
    def test_that_breaks_out_or_breaks_down_fails_the_record_only(self, source: str) -> None:
        with pytest.raises(BadRecord):
            render(source)

    def test_that_is_no_template_is_bad_input(self) -> None:
        with pytest.raises(BadInput, match="chat=False"):
            ChatTemplate("{% if %}", {})

    def test_is_not_evaluated_in_a_prompt(self) -> None:
        assert "{{ 7 * 7 }}" in render(CHATML, "{{ 7 * 7 }}{% raw %}")


class TestAModelFolder:
    def write(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content))

    def test_gives_template_context_and_end_token(self, model: Path) -> None:
        folder = ModelFolder.read(model)
        assert folder.template is not None
        assert folder.template.render(Prompt("Hi")) == "<|user|>Hi<|assistant|>"
        assert folder.context == 2048
        assert folder.end_ids == (folder.tokenizer.token_to_id("<|endoftext|>"),)

    def test_may_hold_its_template_in_the_configuration_alone_or_among_others(self, own_model: Path) -> None:
        (own_model / "chat_template.jinja").unlink()
        assert ModelFolder.read(own_model).template is None
        self.write(own_model, "tokenizer_config.json", {"chat_template": "A"})
        template = ModelFolder.read(own_model).template
        assert template is not None
        assert template.source == "A"
        several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
        self.write(own_model, "tokenizer_config.json", {"chat_template": several})
        template = ModelFolder.read(own_model).template
        assert template is not None
        assert template.source == "D"

    def test_may_write_its_special_tokens_as_objects(self, own_model: Path) -> None:
        (own_model / "chat_template.jinja").write_text("{{ bos_token }}|")
        self.write(own_model, "tokenizer_config.json", {"bos_token": {"content": "<s>", "lstrip": False}})
        template = ModelFolder.read(own_model).template
        assert template is not None
        assert template.render(Prompt("Hi")) == "<s>|"

    def test_takes_the_shorter_of_two_contexts(self, own_model: Path) -> None:
        self.write(own_model, "config.json", {"max_position_embeddings": 512})
        assert ModelFolder.read(own_model).context == 512

    def test_ends_a_turn_with_the_token_its_template_writes(self, own_model: Path) -> None:
        tokenizer = Tokenizer.from_file(str(own_model / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.save(str(own_model / "tokenizer.json"))
        (own_model / "chat_template.jinja").write_text(CHATML)
        folder = ModelFolder.read(own_model)
        assert folder.tokenizer.token_to_id("<|im_end|>") in folder.end_ids

    def test_takes_every_end_token_that_generation_config_names(self, own_model: Path) -> None:
        self.write(own_model, "generation_config.json", {"eos_token_id": [0, 5, 10**9]})
        assert ModelFolder.read(own_model).end_ids == (0, 5)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
    def test_with_a_broken_file_names_it(self, own_model: Path, name: str) -> None:
        (own_model / name).write_text("{broken")
        with pytest.raises(BadInput, match=name):
            ModelFolder.read(own_model)

    def test_without_a_tokenizer_says_where_to_get_it(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"no tokenizer\.json: copy it"):
            ModelFolder.read(tmp_path)


@pytest.fixture(scope="module")
def tokeniser() -> PromptTokeniser:
    folder = ModelFolder.read(model_path())
    return PromptTokeniser(folder.tokenizer, folder.template, context=100, max_tokens=30)


class TestTokenising:
    def test_writes_special_tokens_once(self, tokeniser: PromptTokeniser) -> None:
        ids = list(tokeniser.prepare(Prompt("Hi")).ids)
        assert ids[0] == tokeniser.tokenizer.token_to_id("<|user|>")
        assert ids[-1] == tokeniser.tokenizer.token_to_id("<|assistant|>")

    def test_without_a_template_feeds_the_plain_text_after_the_system_text(self, tokeniser: PromptTokeniser) -> None:
        plain = PromptTokeniser(tokeniser.tokenizer, None, 100, 30)
        assert plain.tokenizer.decode(list(plain.prepare(Prompt("Hi", "Sys")).ids)) == "Sys\n\nHi"
        assert plain.tokenizer.decode(list(plain.prepare(Prompt("Hi")).ids)) == "Hi"

    @pytest.mark.parametrize(
        ("prompt", "why"),
        [
            (Prompt(""), "empty"),
            (Prompt(" \n\t"), "empty"),
            (Prompt(cast(str, None)), "missing"),
            (Prompt(cast(str, 3)), "type int"),
            (Prompt("Hi", system=cast(str, 3)), "system text is of type int"),
            (Prompt("a\ud800b"), "character 1 is half of a surrogate pair"),
            (Prompt("Hi", system="\udfff"), "surrogate"),
            (Prompt("cups " * 400), r"tokens, the model's context holds 100"),
        ],
    )
    def test_says_what_is_wrong_with_a_prompt(self, tokeniser: PromptTokeniser, prompt: Prompt, why: str) -> None:
        with pytest.raises(BadRecord, match=why):
            tokeniser.prepare(prompt)

    @given(text=st.text(max_size=60), system=st.none() | st.text(max_size=20))
    def test_any_text_is_a_prompt_within_the_context_or_a_bad_record(
        self, tokeniser: PromptTokeniser, text: str, system: str | None
    ) -> None:
        try:
            prompt = tokeniser.prepare(Prompt(text, system))
        except BadRecord:
            return
        assert 1 <= len(prompt.ids) < 100
        assert 1 <= prompt.limit <= 30
        assert prompt.estimate_cost() <= 100
