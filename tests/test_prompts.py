from __future__ import annotations

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


def test_a_null_or_unformattable_value_is_a_bad_record_that_names_the_column() -> None:
    with pytest.raises(fb.BadRecord, match="column 'question' is null"):
        fb.PromptTemplate("{question}")({"question": None})
    with pytest.raises(fb.BadRecord, match="column 'price' cannot be formatted"):
        fb.PromptTemplate("{price:.2f}")({"price": "much"})


def test_a_column_can_be_asked_as_it_is() -> None:
    template = fb.PromptTemplate.for_column("my question")
    assert template({"my question": "1 {2} 3"}).text == "1 {2} 3"
    with pytest.raises(fb.BadInput, match="cannot stand in a template"):
        fb.PromptTemplate.for_column("a{b")


def test_only_a_template_knows_which_columns_it_reads() -> None:
    assert prompt_columns("{a} {b} {a}") == ("a", "b")
    assert prompt_columns(lambda row: str(row["a"])) is None
    assert prompt_function("{a}")({"a": 1}) == fb.Prompt("1")
