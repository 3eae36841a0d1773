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

_LISTS: dict[str, type] = {"stop": str, "stop_token_ids": int, "bad_words": str, "choice": str}
_OPTIONAL = ("seed", "structured", "json_schema", "regex", "grammar")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_tokens", "top_k", "min_tokens", "seed"), (int,)),
    **dict.fromkeys(("json_schema", "regex", "grammar"), (str,)),
    "ignore_eos": (bool,),
}
"""Types by name; a number where there is none."""


def parse_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option's text holds.

    Args:
        option: its name, for the message.
        text: an empty one is an empty object.

    Raises:
        BadInput: it is no JSON, or another value than an object.
    """
    try:
        value = json.loads(text or "{}", parse_constant=_refuse_constant)
    except ValueError as error:
        raise BadInput(
            f"--{option} is no JSON ({error}): write an object, and quote it from the shell: '{{\"name\": 1}}'"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f'--{option} must be a JSON object such as {{"name": 1}}, got a {type(value).__name__}')
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_schema(option: str, text: str, *, files: bool = True) -> str:
    """The text of a JSON schema: ``text`` itself, or the content of the file that it names.

    Args:
        option: its name, for the message.
        text: a JSON object, or a path.
        files: whether the user's files are here; not so in a container of a cluster.

    Raises:
        BadInput: there is no such file, or it holds no JSON object.
    """
    if text.lstrip().startswith("{"):
        return json.dumps(parse_object(option, text))
    if not files:
        raise BadInput(
            f'--{option} {text} is a file here, not in the cluster: give its text, --{option} "$(cat {text})"'
        )
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
    for name, value in given.items():
        given[name] = _checked("sampling parameter", name, value)
    try:
        return SamplingParameters(**given)
    except ValueError as error:
        raise BadInput(f"the sampling parameters cannot work: {error}") from error


def _checked(what: str, name: str, value: Any) -> Any:
    """A value of the type that the parameter has, lists as tuples.

    Raises:
        BadInput: it is of another type.
    """
    if value is None and name in _OPTIONAL:
        return None
    if name == "structured":
        if isinstance(value, Mapping):
            _require_fields("field of structured", value, StructuredOutput)
            form = {field: _checked("field of structured", field, each) for field, each in value.items()}
            try:
                return StructuredOutput(**form)
            except ValueError as error:
                raise BadInput(f"structured cannot work: {error}") from error
        raise BadInput(f'structured must be an object such as {{"regex": "..."}}, got {value!r}')
    if name in _LISTS:
        kind = _LISTS[name]
        if isinstance(value, list | tuple) and all(type(item) is kind for item in value):
            return tuple(value)
        raise BadInput(f"the {what} {name} must be a list of {kind.__name__}, got {value!r}")
    kinds = _KINDS.get(name, (int, float))
    if type(value) not in kinds:
        raise BadInput(f"the {what} {name} must be of type {kinds[-1].__name__}, got {value!r}")
    return value


def _require_fields(what: str, given: Mapping[str, Any], kind: type) -> None:
    known = [each.name for each in fields(kind)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise BadInput(f"there is no {what} {name!r}: {hint}there are {', '.join(known)}")
