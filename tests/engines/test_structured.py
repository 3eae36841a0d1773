"""Responses of the form that was asked for are told from others, and forms that are none are refused."""

from __future__ import annotations

import importlib.util
import json

import pytest

from flyte_batch.engines.structured import ResponseCheck
from flyte_batch.errors import BadInput, BadResponse
from flyte_batch.records import Completion, StructuredOutput

needs_jsonschema = pytest.mark.skipif(
    importlib.util.find_spec("jsonschema") is None, reason="jsonschema comes with the extra vllm: make test-vllm"
)
SCHEMA = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})


def completion(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(text, finish_reason, 3, 7)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (StructuredOutput(json_schema=SCHEMA), ' {"n": 1, "more": []}\n'),
        (StructuredOutput(json_schema="true"), "[]"),
        (StructuredOutput(regex=r"#### \d+"), "#### 12"),
        (StructuredOutput(choice=("yes", "no")), "no"),
        (StructuredOutput(grammar='root ::= "a"'), "whatever a grammar allows"),
    ],
)
def test_the_right_form_passes(form: StructuredOutput, text: str) -> None:
    ResponseCheck(form)(completion(text))


@pytest.mark.parametrize(
    ("form", "text", "why"),
    [
        (StructuredOutput(json_schema=SCHEMA), '{"n": 1', "is no JSON"),
        (StructuredOutput(json_schema=SCHEMA), "", "is no JSON"),
        (StructuredOutput(json_schema="true"), "[" * 100_000, "is no JSON|nested too deeply"),
        (StructuredOutput(regex=r"\d+"), "12 apples", r"does not match the regex '\\\\d\+'"),
        (StructuredOutput(choice=("yes", "no")), "yes.", "is none of 'yes', 'no'"),
        (StructuredOutput(choice=tuple(map(str, range(50)))), "50", r"'9', \.\.\.; the response begins with '50'"),
    ],
)
def test_another_form_is_a_bad_response(form: StructuredOutput, text: str, why: str) -> None:
    with pytest.raises(BadResponse, match=why) as caught:
        ResponseCheck(form)(completion(text))
    assert len(str(caught.value)) < 500


@needs_jsonschema
@pytest.mark.parametrize(
    ("text", "why"),
    [('{"n": "x"}', r"at \['n'\]: 'x' is not of type 'integer'"), ("{}", "JSON schema: 'n' is a required property")],
)
def test_json_that_does_not_fit_names_the_place(text: str, why: str) -> None:
    with pytest.raises(BadResponse, match=why):
        ResponseCheck(StructuredOutput(json_schema=SCHEMA))(completion(text))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (StructuredOutput(json_schema=SCHEMA), '{"n": 12345'),
        (StructuredOutput(regex=r"\d+"), "12345"),  # it matches, and yet the number may have gone on
        (StructuredOutput(grammar='root ::= "a"+'), "aaa"),
    ],
)
def test_a_cut_response_is_bad_whatever_it_looks_like(form: StructuredOutput, text: str) -> None:
    with pytest.raises(BadResponse, match=r"cut after 7 tokens.*raise max_tokens"):
        ResponseCheck(form)(completion(text, "length"))


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (StructuredOutput(json_schema="{'n': 1}"), "json_schema is no JSON"),
        (StructuredOutput(json_schema="3"), "json_schema is a int, not an object"),
        (StructuredOutput(regex="(a"), r"the regex '\(a' is no regular expression of Python's: missing \)"),
        pytest.param(
            StructuredOutput(json_schema='{"properties": {"n": {"type": "whole"}}}'),
            r"no valid JSON schema: at \['properties'\]\['n'\]\['type'\]: 'whole' is not valid",
            marks=needs_jsonschema,
        ),
    ],
)
def test_a_form_that_is_none_is_refused_at_the_start(form: StructuredOutput, why: str) -> None:
    with pytest.raises(BadInput, match=why) as caught:
        ResponseCheck(form)
    assert "\n" not in str(caught.value)
