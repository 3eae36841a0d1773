"""From the texts of a command line to options: what is not well formed is refused here, by name, with the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flyte_batch.errors import BadInput
from flyte_batch.records import SamplingParameters, StructuredOutput

_TUPLES = ("stop", "stop_token_ids", "bad_words")


def parse_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option's text holds.

    Args:
        option: its name, for the message.
        text: an empty one is an empty object.

    Raises:
        BadInput: it is no JSON, or another value than an object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise BadInput(
            f"--{option} is no JSON ({error}): write an object, and quote it from the shell: '{{\"name\": 1}}'"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f'--{option} must be a JSON object such as {{"name": 1}}, got a {type(value).__name__}')
    return value


def parse_schema(option: str, text: str) -> str:
    """The text of a JSON schema: ``text`` itself, or the content of the file that it names.

    Raises:
        BadInput: there is no such file, or it holds no JSON object.
    """
    if text.lstrip().startswith("{"):
        return json.dumps(parse_object(option, text))
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"--{option} {text} is no JSON object, and no file that can be read: {error}") from error
    return json.dumps(parse_object(f"{option} {text}", content))


def sampling_parameters(options: Mapping[str, Any]) -> SamplingParameters:
    """`SamplingParameters` from plain values, as JSON has them.

    Args:
        options: its fields by name; ``structured`` is an object with one of `StructuredOutput`'s.

    Raises:
        BadInput: a name that it does not have, or a value of another type or out of range.
    """
    given = dict(options)
    _require_fields("sampling parameter", given, SamplingParameters)
    for name in _TUPLES:
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
        elif given.get(name) is not None and not isinstance(given[name], tuple):
            raise BadInput(f"the sampling parameter {name} must be a list, got {given[name]!r}")
    try:
        structured = given.get("structured")
        if isinstance(structured, Mapping):
            _require_fields("field of structured", structured, StructuredOutput)
            given["structured"] = StructuredOutput(**{**structured, "choice": tuple(structured.get("choice") or ())})
        return SamplingParameters(**given)
    except (ValueError, TypeError) as error:
        raise BadInput(f"the sampling parameters cannot work: {error}") from error


def _require_fields(what: str, given: Mapping[str, Any], kind: type) -> None:
    known = [each.name for each in fields(kind)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise BadInput(f"there is no {what} {name!r}: {hint}there are {', '.join(known)}")
