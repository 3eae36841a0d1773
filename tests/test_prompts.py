from __future__ import annotations

import json
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.prompts import prompt_columns, prompt_function


def test_a_template_is_filled_from_the_rows_columns() -> None:
    template = fb.PromptTemplate("Q: {question} ({price:.2f}) {{kept}}", system="be brief")
    prompt = template({"question": "why?", "price": 2, "other": "x"})
    assert prompt == fb.Prompt("Q: why? (2.00) {kept}", "be brief")
    assert template.columns == ("question", "price")


def test_a_field_is_a_columns_name_and_never_an_expression() -> None:
    template = fb.PromptTemplate("{a.b} {c[0]}")
    assert template.columns == ("a.b", "c[0]")
    assert template({"a.b": 1, "c[0]": 2}).text == "1 2"
    assert fb.PromptTemplate("{x}")({"x": "{x.__class__}"}).text == "{x.__class__}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no field", "names no column"),
        ("{question", "not well formed"),
        ("{}", "a field is empty"),
        ("{question!r}", "conversion"),
        ("{price:{width}}", "holds fields"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_fault(text: str, fault: str) -> None:
    with pytest.raises(fb.BadInput, match=fault):
        fb.PromptTemplate(text)


def test_a_null_value_is_missing_and_an_unformattable_one_a_bad_record_and_both_name_the_column() -> None:
    with pytest.raises(fb.MissingValue, match="column 'question' is null"):
        fb.PromptTemplate("{question}")({"question": None})
    with pytest.raises(fb.BadRecord, match="column 'price' cannot be formatted") as raised:
        fb.PromptTemplate("{price:.2f}")({"price": "much"})
    assert raised.type is fb.BadRecord


def test_a_column_can_be_asked_as_it_is() -> None:
    template = fb.PromptTemplate.for_column("my question")
    assert template({"my question": "1 {2} 3"}).text == "1 {2} 3"
    with pytest.raises(fb.BadInput, match="cannot stand in a template"):
        fb.PromptTemplate.for_column("a{b")


def test_only_a_template_knows_which_columns_it_reads() -> None:
    assert prompt_columns("{a} {b} {a}") == ("a", "b")
    assert prompt_columns(lambda row: str(row["a"])) is None
    assert prompt_function("{a}")({"a": 1}) == fb.Prompt("1")


TURNS = [{"role": "user", "content": "1 + 1?", "name": None}]
PICTURE = {"bytes": b"png", "path": "cat.png"}


@pytest.mark.parametrize("value", [TURNS, json.dumps(TURNS)])
def test_a_conversation_comes_from_a_list_or_from_json(value: Any) -> None:
    assert fb.ChatColumn("messages")({"messages": value}) == fb.Chat(TURNS)


def test_a_system_message_is_put_before_conversations_that_have_none() -> None:
    column = fb.ChatColumn("messages", system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert column({"messages": TURNS}).messages == [system, *TURNS]
    own = [{"role": "system", "content": "be long"}, *TURNS]
    assert column({"messages": own}).messages == own


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        (None, fb.MissingValue, "column 'messages' is null"),
        ("why?", fb.BadRecord, "a text that is no JSON .*use a template"),
        ("[" * 100_000, fb.BadRecord, "no JSON"),
        ('{"role": "user"}', fb.BadRecord, "holds a dict, not a list"),
        (7, fb.BadRecord, "holds a int, not a list"),
    ],
)
def test_a_column_without_a_conversation_is_a_bad_record(value: Any, kind: type[fb.BadRecord], why: str) -> None:
    with pytest.raises(fb.BadRecord, match=why) as raised:
        fb.ChatColumn("messages")({"messages": value})
    assert raised.type is kind


def test_what_is_no_message_is_left_to_the_engine_which_names_it() -> None:
    chat = fb.ChatColumn("messages", system="be brief")({"messages": ["why?"]})
    with pytest.raises(fb.BadRecord, match=r"messages\[1\] is of type str"):
        fb.FakeEngine().prepare(chat)


@pytest.mark.parametrize(
    ("value", "images"),
    [
        (b"png", (b"png",)),
        ("cat.png", ("cat.png",)),
        (PICTURE, (b"png",)),
        ({"bytes": None, "path": "cat.png"}, ("cat.png",)),
        ([b"png", PICTURE], (b"png", b"png")),
        ([], ()),
    ],
)
def test_a_template_may_show_the_rows_pictures(value: Any, images: tuple[bytes | str, ...]) -> None:
    template = fb.PromptTemplate("What is it?", image_column="photo")
    assert template.columns == ("photo",)
    assert template({"photo": value}) == fb.Prompt("What is it?", None, images)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, fb.MissingValue),
        (b"", fb.MissingValue),
        ({"bytes": None, "path": None}, fb.MissingValue),
        (["cat.png", None], fb.MissingValue),
        (7, fb.BadImage),
        (["cat.png", ["dog.png"]], fb.BadImage),
        ({"bytes": None, "path": 7}, fb.BadImage),
    ],
)
def test_a_row_whose_picture_is_missing_or_is_none_fails_and_names_the_column(
    value: Any, kind: type[fb.BadRecord]
) -> None:
    with pytest.raises(kind, match="column 'photo'"):
        fb.PromptTemplate("{question}", image_column="photo")({"question": "What is it?", "photo": value})


def marked(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "text": None, "index": 0}, *parts]}


def test_a_conversations_marks_are_filled_with_the_rows_pictures_in_order() -> None:
    column = fb.ChatColumn("messages", image_column="photos")
    messages = [marked("This?", {"type": "image", "url": "own.png"}), *TURNS, marked()]
    chat = column({"messages": messages, "photos": [b"1", b"2"]})
    assert column.columns == ("messages", "photos")
    assert chat.messages[0]["content"][0] == {"type": "image", "image": b"1"}
    assert chat.messages[0]["content"][1:] == ["This?", {"type": "image", "url": "own.png"}]
    assert chat.messages[1] == TURNS[0]
    assert chat.messages[2]["content"] == [{"type": "image", "image": b"2"}]
    assert messages[2] == marked()  # the row's own are as they were


@pytest.mark.parametrize(
    ("photos", "kind", "why"),
    [
        (None, fb.MissingValue, "column 'photos' is null"),
        ([b"1"], fb.MissingValue, "fewer images"),
        ([b"1", b"2", b"3"], fb.BadRecord, "3 images, more than"),
    ],
)
def test_pictures_that_do_not_go_with_the_marks_are_a_bad_record(
    photos: list[bytes] | None, kind: type[fb.BadRecord], why: str
) -> None:
    with pytest.raises(fb.BadRecord, match=why) as raised:
        fb.ChatColumn("messages", image_column="photos")({"messages": [marked(), marked()], "photos": photos})
    assert raised.type is kind


def test_the_columns_of_a_conversation_are_known_before_anything_starts() -> None:
    assert prompt_columns(fb.ChatColumn("messages")) == ("messages",)
