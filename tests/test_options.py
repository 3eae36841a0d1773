"""Options that come as texts, from a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.engines import check_engine_options
from flyte_batch.options import parse_object, parse_schema, sampling_parameters

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def test_an_object_is_parsed_and_an_empty_text_is_an_empty_one() -> None:
    assert parse_object("x", '{"a": [1, null]}') == {"a": [1, None]}
    assert parse_object("x", "") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1}", "--x is no JSON"),
        ("[1]", "must be a JSON object"),
        ("7", "got a int"),
        ('{"a": NaN}', "NaN is no JSON"),
    ],
)
def test_what_is_no_object_is_refused_by_the_options_name(text: str, message: str) -> None:
    with pytest.raises(fb.BadInput, match=message):
        parse_object("x", text)


def test_a_schema_is_given_as_its_text_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert json.loads(parse_schema("json_schema", str(file))) == SCHEMA
    assert json.loads(parse_schema("json_schema", json.dumps(SCHEMA))) == SCHEMA
    with pytest.raises(fb.BadInput, match="no file that can be read"):
        parse_schema("json_schema", str(tmp_path / "missing.json"))
    with pytest.raises(fb.BadInput, match="is a file here, not in the cluster"):
        parse_schema("json_schema", str(file), files=False)
    file.write_text("[1]")
    with pytest.raises(fb.BadInput, match="must be a JSON object"):
        parse_schema("json_schema", str(file))


def test_plain_values_become_sampling_parameters() -> None:
    assert sampling_parameters(
        {"max_tokens": 9, "stop": ["END"], "stop_token_ids": [1, 2], "structured": {"choice": ["a", "b"]}}
    ) == fb.SamplingParameters(
        max_tokens=9, stop=("END",), stop_token_ids=(1, 2), structured=fb.StructuredOutput(choice=("a", "b"))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top-p": 1}, "no sampling parameter 'top-p': did you mean top_p"),
        ({"stop": "END"}, "stop must be a list of str, got 'END'"),
        ({"top_p": 2}, "top_p must be above 0"),
        ({"top_p": "much"}, "the sampling parameter top_p must be of type float, got 'much'"),
        ({"max_tokens": True}, "max_tokens must be of type int, got True"),
        ({"stop": [1]}, "stop must be a list of str"),
        ({"structured": {"choice": "yes"}}, "field of structured choice must be a list of str, got 'yes'"),
        ({"structured": "json"}, "structured must be an object"),
        ({"structured": {"schema": "{}"}}, "no field of structured 'schema': did you mean json_schema"),
        ({"structured": {"regex": "a", "choice": ["a"]}}, "exactly one of"),
    ],
)
def test_a_sampling_parameter_that_cannot_work_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fb.BadInput, match=message):
        sampling_parameters(options)


@pytest.mark.parametrize(
    ("engine", "options", "sampling", "message"),
    [
        (
            "vllm",
            {"max_model_length": 9},
            {},
            "the engine vllm has no option 'max_model_length': did you mean max_model_len",
        ),
        ("vllm", {"max_model_len": 0}, {}, "max_model_len must be a whole number"),
        ("vllm", {"block_size": 16}, {}, "goes into engine_args"),
        ("ctranslate2", {"quantization": "fp8"}, {}, "the engine ctranslate2 has no option 'quantization'"),
        ("ctranslate2", {}, {"min_p": 0.1}, "has no min_p"),
        ("vllm", {}, {"structured": fb.StructuredOutput(regex="(")}, "regex"),
        ("fake", {"answer": 1}, {}, "the engine fake has no option 'answer'"),
    ],
)
def test_an_engines_option_that_cannot_work_is_found_without_loading_the_engine(
    engine: str, options: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(fb.BadInput, match=message):
        check_engine_options(engine, options, fb.SamplingParameters(**sampling))


def test_options_that_an_engine_has_are_let_through() -> None:
    sampling = fb.SamplingParameters()
    check_engine_options("vllm", {"max_model_len": 4096, "chat": False, "lora": "folder"}, sampling)
    check_engine_options("ctranslate2", {"compute_type": "int8"}, sampling)
    check_engine_options("fake", {"context": 10}, sampling)
