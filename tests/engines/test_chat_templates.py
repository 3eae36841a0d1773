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
from flyte_batch.engines.checks import require_no_images
from flyte_batch.engines.messages import images_of, messages_of
from flyte_batch.engines.tokenising import ChatTemplate, ModelFolder, PromptTokeniser
from flyte_batch.errors import BadImage, BadInput, BadRecord, MissingValue, PromptTooLong
from flyte_batch.records import Chat, Prompt

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

    def test_may_hold_its_template_in_a_json_file_of_its_own(self, own_model: Path) -> None:
        (own_model / "chat_template.jinja").unlink()
        (own_model / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
        template = ModelFolder.read(own_model).template
        assert template is not None
        assert template.source == CHATML

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
        ("prompt", "kind", "why"),
        [
            (Prompt(""), MissingValue, "empty"),
            (Prompt(" \n\t"), MissingValue, "empty"),
            (Prompt(cast(str, None)), MissingValue, "missing"),
            (cast(Prompt, None), MissingValue, "the prompt is missing"),
            (Prompt(cast(str, 3)), BadRecord, "type int"),
            (Prompt("Hi", system=cast(str, 3)), BadRecord, "system text is of type int"),
            (Prompt("a\ud800b"), BadRecord, "character 1 is half of a surrogate pair"),
            (Prompt("Hi", system="\udfff"), BadRecord, "surrogate"),
            (Prompt("cups " * 100), PromptTooLong, r"^the prompt has \d+ tokens, the model's context holds 100"),
            (Prompt("cups " * 4000), PromptTooLong, r"characters, so more than 100 tokens"),
        ],
    )
    def test_says_what_is_wrong_with_a_prompt(
        self, tokeniser: PromptTokeniser, prompt: Prompt, kind: type[BadRecord], why: str
    ) -> None:
        with pytest.raises(BadRecord, match=why) as raised:
            tokeniser.prepare(prompt)
        assert raised.type is kind

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

    def test_keeps_the_prompts_seed(self, tokeniser: PromptTokeniser) -> None:
        assert tokeniser.prepare(Prompt("Hi", seed=7)).seed == 7
        assert tokeniser.prepare(Chat([user("Hi")], seed=0)).seed == 0
        assert tokeniser.prepare(Prompt("Hi")).seed is None


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "image_url": None}  # as a struct column of a Parquet file gives it


PICTURE = "data:image/png;base64,AA=="


class TestAConversation:
    def test_reaches_the_template_turn_by_turn(self) -> None:
        turns = [user("1 + 1?"), {"role": "assistant", "content": "2"}, user("And 2 + 2?")]
        assert ChatTemplate(CHATML, {}).render(Chat(turns)) == (
            "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
            "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        )

    @pytest.mark.parametrize(
        ("prompt", "chat"),
        [
            (Prompt("Hi"), Chat([user("Hi")])),
            (Prompt("Hi", "Sys"), Chat([{"role": "system", "content": "Sys"}, user("Hi")])),
            (Prompt("Hi"), Chat([user([text_part("Hi")])])),
        ],
    )
    def test_of_one_question_is_the_same_as_a_prompt(
        self, tokeniser: PromptTokeniser, prompt: Prompt, chat: Chat
    ) -> None:
        assert tokeniser.render(prompt) == tokeniser.render(chat)
        assert tokeniser.prepare(prompt) == tokeniser.prepare(chat)

    def test_gets_the_parts_of_a_text_as_one_text(self) -> None:
        (message,) = messages_of(Chat([user([text_part("a"), "b", text_part("c")])]))
        assert message == user("a\nb\nc")

    def test_counts_a_null_field_as_none_and_hands_the_others_on(self) -> None:
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "name": None}
        first, second = messages_of(Chat([call, user("Hi", name="Ben", tool_calls=None)]))
        assert first == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
        assert second == user("Hi", name="Ben")

    def test_leaves_the_users_messages_as_they_are(self) -> None:
        message = user([text_part("a")], name=None)
        messages_of(Chat([message]))
        assert message == user([text_part("a")], name=None)

    def test_for_a_model_without_a_template_is_a_bad_record(self, tokeniser: PromptTokeniser) -> None:
        plain = PromptTokeniser(tokeniser.tokenizer, None, 100, 30)
        with pytest.raises(BadRecord, match="use a model that has a template"):
            plain.prepare(Chat([user("Hi")]))

    @pytest.mark.parametrize(
        ("messages", "kind", "why"),
        [
            ([], MissingValue, "conversation is empty"),
            (None, MissingValue, "missing"),
            ("Hi", BadRecord, "of type str, not a list"),
            (["Hi"], BadRecord, r"messages\[0\] is of type str"),
            ([user("Hi"), None], MissingValue, r"messages\[1\] is missing"),
            ([{"content": "Hi"}], BadRecord, r"messages\[0\] has no role.*missing"),
            ([{"role": "", "content": "Hi"}], BadRecord, r"messages\[0\] has no role.*empty"),
            ([{"role": 3, "content": "Hi"}], BadRecord, r"messages\[0\] has no role.*type int"),
            ([{"role": "\ud800", "content": "Hi"}], BadRecord, r"messages\[0\].role is no valid Unicode"),
            ([user("Hi"), user(None)], MissingValue, r"messages\[1\] has no content"),
            ([user(None, tool_calls=None)], MissingValue, r"messages\[0\] has no content"),
            ([user(7), user("Hi")], BadRecord, r"messages\[0\].content is of type int"),
            ([user(b"Hi")], BadRecord, r"messages\[0\].content is of type bytes"),
            ([user("a\ud800")], BadRecord, r"messages\[0\].content is no valid Unicode.*character 1"),
            ([user([text_part("\ud800")])], BadRecord, r"messages\[0\].content is no valid Unicode"),
            ([user("Hi"), user(" ")], MissingValue, r"messages\[1\], which the model is to answer, is empty"),
            ([user([])], MissingValue, r"messages\[0\], which the model is to answer, is empty"),
            ([user(["Hi", 3])], BadRecord, r"messages\[0\].content\[1\] is of type int"),
            ([user([{"type": "text", "text": None}])], MissingValue, r"content\[0\] is a text part without a text"),
            ([user([{"type": "text", "text": 3}])], BadRecord, r"content\[0\].text is of type int, not a text"),
            ([user([{"type": "video", "video": "a.mp4"}])], BadRecord, r"content\[0\] has the type 'video'"),
            ([user([{"type": "image_url", "image_url": None}])], MissingValue, r"content\[0\] is missing or empty"),
            (
                [user([{"type": "image", "image": b""}])],
                MissingValue,
                r"image of messages\[0\].content\[0\] is missing",
            ),
            ([user([{"type": "image", "image": 3}])], BadImage, r"image of messages\[0\].content\[0\] is of type int"),
        ],
    )
    def test_that_cannot_be_answered_is_refused_and_its_message_named(
        self, tokeniser: PromptTokeniser, messages: Any, kind: type[BadRecord], why: str
    ) -> None:
        with pytest.raises(BadRecord, match=why) as raised:
            tokeniser.prepare(Chat(messages))
        assert raised.type is kind

    def test_is_a_prompt_or_a_chat_and_nothing_else(self, tokeniser: PromptTokeniser) -> None:
        with pytest.raises(BadRecord, match="of type dict, not a text, a Prompt or a Chat"):
            tokeniser.prepare(cast(Prompt, {"role": "user"}))


class TestPictures:
    def test_stand_before_the_text_of_a_prompt(self) -> None:
        prompt = Prompt("What is it?", images=(b"png", "cat.jpg"))
        (message,) = messages_of(prompt)
        assert message["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
        assert list(images_of(prompt)) == [b"png", "cat.jpg"]

    def test_stand_where_a_conversation_has_them(self) -> None:
        chat = Chat(
            [
                user([{"type": "image_url", "image_url": {"url": PICTURE, "detail": None}}, text_part("This?")]),
                {"role": "assistant", "content": "A cat."},
                user([text_part("And"), {"type": "image", "image": {"bytes": b"png", "path": None}}, text_part("?")]),
            ]
        )
        first, _, last = messages_of(chat)
        assert first["content"] == [{"type": "image"}, {"type": "text", "text": "This?"}]
        assert [part["type"] for part in last["content"]] == ["text", "image", "text"]
        assert list(images_of(chat)) == [PICTURE, b"png"]

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": "a.png"},
            {"type": "image", "image": "a.png"},
            {"type": "image", "url": "a.png", "image": None},
            {"type": "image", "path": "a.png"},
            {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        ],
    )
    def test_may_be_spelled_as_openai_transformers_or_datasets_do(self, part: dict[str, Any]) -> None:
        assert list(images_of(Chat([user([part])]))) == ["a.png"]

    def test_are_enough_to_ask(self) -> None:
        template = ChatTemplate("{% for part in messages[0].content %}<{{ part.type }}>{% endfor %}", {})
        assert template.render(Prompt("", images=(b"png",))) == "<image>"

    @pytest.mark.parametrize("prompt", [Prompt("Hi", images=(b"png",)), Chat([user([{"type": "image", "url": "a"}])])])
    def test_are_refused_by_engines_for_texts(self, prompt: Prompt | Chat) -> None:
        with pytest.raises(BadRecord, match="takes texts only"):
            require_no_images(prompt, "this one")
        require_no_images(Prompt("Hi"), "this one")

    @pytest.mark.parametrize(
        ("images", "kind", "why"),
        [
            (None, MissingValue, "Prompt.images is missing"),
            ((b"",), MissingValue, "image 1 is missing or empty"),
            ((b"png", None), MissingValue, "image 2 is missing or empty"),
            ("a.png", BadImage, "Prompt.images is of type str, not a tuple"),
            ((3,), BadImage, "image 1 is of type int"),
        ],
    )
    def test_that_are_missing_or_none_are_a_bad_record(
        self, tokeniser: PromptTokeniser, images: Any, kind: type[BadRecord], why: str
    ) -> None:
        with pytest.raises(kind, match=why):
            tokeniser.prepare(Prompt("Hi", images=images))
