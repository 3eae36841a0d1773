"""From a row to a `Prompt`: templates with the source's columns, filled without evaluating anything."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flyte_batch.errors import BadInput, BadRecord
from flyte_batch.records import Prompt

Row = Mapping[str, object]
PromptFunction = Callable[[Row], "Prompt | str"]
"""A function of a row (column name -> value) that returns what to ask; an exception fails that row only."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with ``{column}`` fields, in `str.format`'s syntax: ``{{`` is a brace, ``{price:.2f}`` formats.

    A field is the *name of a column*, never an expression: ``{a.b}`` and ``{a[0]}`` mean columns of exactly these
    names, so a template cannot reach into objects.

    Raises:
        BadInput: the template is not well formed, or has no field (every row would ask the same).
    """

    text: str
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            raise BadInput(
                f"the prompt template {self.text!r} names no column; write one in braces, as in '{{question}}'"
            )

    @classmethod
    def for_column(cls, column: str, system: str | None = None) -> PromptTemplate:
        """The template that asks the value of one column as it is."""
        if set(column) & set("{}:!"):
            raise BadInput(f"column name {column!r} cannot stand in a template; rename the column or give a function")
        return cls(f"{{{column}}}", system)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template needs, each once, in order of appearance."""
        return tuple(dict.fromkeys(field for _, field, _ in self._parts() if field is not None))

    def __call__(self, row: Row) -> Prompt:
        """Fill the template from a row.

        Raises:
            BadRecord: a column is null, or its value does not take the field's format.
        """
        return Prompt("".join(_fill(literal, field, spec, row) for literal, field, spec in self._parts()), self.system)

    def _parts(self) -> list[tuple[str, str | None, str]]:
        parts: list[tuple[str, str | None, str]] = []
        try:
            for literal, field, spec, conversion in string.Formatter().parse(self.text):
                if conversion:
                    raise ValueError(f"conversion '!{conversion}' is not supported")
                if field == "":
                    raise ValueError("a field is empty; write the column's name in it")
                if spec and "{" in spec:
                    raise ValueError("a format that holds fields itself is not supported")
                parts.append((literal, field, spec or ""))
        except ValueError as error:
            raise BadInput(f"the prompt template {self.text!r} is not well formed: {error}") from error
        return parts


def _fill(literal: str, field: str | None, spec: str, row: Row) -> str:
    if field is None:
        return literal
    value = row[field]
    if value is None:
        raise BadRecord(f"column {field!r} is null")
    try:
        return literal + format(value, spec)
    except (TypeError, ValueError) as error:
        raise BadRecord(f"column {field!r} cannot be formatted with {spec!r}: {error}") from error


def prompt_function(prompt: str | PromptTemplate | PromptFunction) -> PromptFunction:
    """A template's text, a template or a function, all as a function of a row."""
    return PromptTemplate(prompt) if isinstance(prompt, str) else prompt


def prompt_columns(prompt: str | PromptTemplate | PromptFunction) -> Sequence[str] | None:
    """The columns a prompt reads, or None if only the function knows."""
    function = prompt_function(prompt)
    return function.columns if isinstance(function, PromptTemplate) else None
