"""Whether a response has the form that was asked for: engine-neutral, checked after decoding.

An engine that decodes within a grammar still returns half a JSON object when ``max_tokens`` ends it, and one that
cannot decode within a grammar returns anything: both become `BadResponse`, alone, instead of a row that breaks its
reader.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from typing import Any

from flyte_batch.errors import BadInput, BadResponse
from flyte_batch.records import Completion, StructuredOutput

_SHOWN = 80  # characters of a wrong response that a message shows


class ResponseCheck:
    """Tells responses of the form that was asked for from others. Safe from several threads.

    Args:
        form: what was asked for. A grammar is not parsed again here: only cut responses are told from whole ones.

    Raises:
        BadInput: the form itself is none: no JSON, no JSON schema, no regular expression.
    """

    def __init__(self, form: StructuredOutput) -> None:
        self._problem = _problem_finder(form)

    def __call__(self, completion: Completion) -> None:
        """Return, or say what is wrong.

        Raises:
            BadResponse: the response was cut, or does not have the form.
        """
        if completion.finish_reason == "length":
            raise BadResponse(
                f"the response was cut after {completion.response_tokens} tokens, before it had the form that was "
                f"asked for: raise max_tokens, or ask for less; it ends with {completion.text[-_SHOWN:]!r}"
            )
        problem = self._problem(completion.text)
        if problem is not None:
            raise BadResponse(f"{problem}; the response begins with {completion.text[:_SHOWN]!r}")


def _problem_finder(form: StructuredOutput) -> Callable[[str], str | None]:
    if form.json_schema is not None:
        return _json_problem(form.json_schema)
    if form.regex is not None:
        return _regex_problem(form.regex)
    if form.choice:
        allowed = frozenset(form.choice)
        shown = ", ".join(map(repr, form.choice[:10])) + (", ..." if len(form.choice) > 10 else "")
        return lambda text: None if text in allowed else f"the response is none of {shown}"
    return lambda text: None


def _json_problem(text: str) -> Callable[[str], str | None]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise BadInput(f"json_schema is no JSON ({error}): give the text of a JSON schema") from error
    if not isinstance(schema, dict | bool):
        raise BadInput(f"json_schema is a {type(schema).__name__}, not an object: give the text of a JSON schema")
    validator = _validator(schema)

    def problem(response: str) -> str | None:
        try:
            value = json.loads(response)
        except ValueError as error:
            return f"the response is no JSON ({error})"
        except RecursionError:
            return "the response is JSON nested too deeply to be read"
        errors = [] if validator is None else sorted(validator.iter_errors(value), key=lambda error: list(error.path))
        if not errors:
            return None
        where = "".join(f"[{key!r}]" for key in errors[0].absolute_path)
        return (
            f"the response does not fit the JSON schema: {('at ' + where + ': ') if where else ''}{errors[0].message}"
        )

    return problem


def _validator(schema: Any) -> Any:
    """A validator of jsonschema; None where it is not installed: then only the syntax is checked."""
    if importlib.util.find_spec("jsonschema") is None:
        return None
    import jsonschema

    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "".join(f"[{key!r}]" for key in error.absolute_path)
        raise BadInput(
            f"json_schema is no valid JSON schema: {('at ' + where + ': ') if where else ''}{error.message}"
        ) from error
    return kind(schema)


def _regex_problem(pattern: str) -> Callable[[str], str | None]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"the regex {pattern!r} is no regular expression of Python's: {error}") from error
    return lambda text: None if expression.fullmatch(text) else f"the response does not match the regex {pattern!r}"
