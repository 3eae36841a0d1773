"""Parameters on the page: nested ones flat, secrets never."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.report.settings import MASK, MOST_CHARACTERS, flat


def test_nested_settings_become_dotted_names_also_inside_texts_of_json() -> None:
    settings = {
        "model": "m",
        "sampling": {"max_tokens": 64, "stop": ["END"], "structured": {"json_schema": None}},
        "engine_options": '{"max_model_len": 4096}',
        "template": "{question}",
        "empty": {},
    }
    assert list(flat(settings)) == [
        ("model", "m"), ("sampling.max_tokens", "64"), ("sampling.stop", '["END"]'),
        ("sampling.structured.json_schema", "null"), ("engine_options.max_model_len", "4096"),
        ("template", "{question}"), ("empty", "{}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "OPENAI_API_KEY", "hf_token", "token", "password", "db.password", "secret", "client_secret",
     "aws-secret-access-key", "authorization", "credentials", "private_key", "secret_value", "db_password_file"],
)  # fmt: skip
def test_what_is_named_like_a_secret_is_masked_wherever_it_is(name: str) -> None:
    for given_settings in (
        {name: "abc123"}, {"options": {name: "abc123"}}, {"options": json.dumps({name: "abc123"})},
        {name: {"inner": "abc123"}}, {"list": [{"deep": {name: "abc123"}}]},
    ):  # fmt: skip
        shown = list(flat(given_settings))
        assert "abc123" not in str(shown)
        assert MASK in str(shown)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "prompt_tokens", "stop_token_ids", "tokenizer", "author", "keyboard", "key_column", "secretary"],
)
def test_what_only_sounds_like_a_secret_is_shown(name: str) -> None:
    assert list(flat({name: 64})) == [(name, "64")]


@pytest.mark.parametrize(
    "text",
    ["hf_" + "a" * 20, "sk-" + "a1" * 12, "AKIA" + "A" * 16, "ghp_" + "a" * 20, "postgres://user:pass@host/db",
     "redis://:pass@host:6379", "glpat-" + "a" * 20, "github_pat_" + "a" * 22, "xoxb-" + "1" * 12,
     "Bearer eyJhbGciOiJI.eyJzdWIiOiIx.abc", "-----BEGIN RSA PRIVATE KEY-----\nMII"],
)  # fmt: skip
def test_what_has_the_form_of_a_secret_is_masked_under_any_name(text: str) -> None:
    assert list(flat({"model": text})) == [("model", MASK)]


@pytest.mark.parametrize(
    "text", ["task-abcdefghijklmnopqrst", "http://host:80/a@b", "s3://bucket/sk-1", "hf_models_of_everybody"]
)
def test_what_only_looks_like_a_secret_is_shown(text: str) -> None:
    assert list(flat({"model": text})) == [("model", text)]


def test_long_values_are_cut() -> None:
    ((_, shown),) = flat({"template": "x" * 10_000})
    assert len(shown) == MOST_CHARACTERS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=10), JSON, max_size=5))
def test_any_settings_can_be_shown(settings: dict[str, object]) -> None:
    assert len(list(flat(settings))) >= len(settings)
