"""From a row to a `Prompt` or a `Chat`: the source's columns put into words without evaluating anything."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flyte_batch.errors import BadImage, BadInput, BadRecord, MissingValue
from flyte_batch.records import Chat, Prompt

Row = Mapping[str, object]
PromptFunction = Callable[[Row], "Prompt | Chat | str"]
"""A function of a row (column name -> value) that returns what to ask; an exception fails that row only."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with ``{column}`` fields, in `str.format`'s syntax: ``{{`` is a brace, ``{price:.2f}`` formats.

    A field is the *name of a column*, never an expression: ``{a.b}`` and ``{a[0]}`` mean columns of exactly these
    names, so a template cannot reach into objects.

    Args:
        text: the template.
        system: instructions before it, the same for every row and as they are; None for none.
        image_column: a column with the row's picture or a list of them, for a vision model: each the bytes of an
            encoded picture, a path, a ``data:`` URL, or Hugging Face datasets' ``{"bytes", "path"}``.

    Raises:
        BadInput: the template is not well formed, or names no column (every row would ask the same).
    """

    text: str
    system: str | None = None
    image_column: str | None = None

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
        """The columns that the template needs, each once, in order of appearance, that of the images last."""
        fields = [field for _, field, _ in self._parts()]
        return tuple(dict.fromkeys(field for field in [*fields, self.image_column] if field is not None))

    def __call__(self, row: Row) -> Prompt:
        """Fill the template from a row.

        Raises:
            MissingValue: a column is null, or has no image in it.
            BadImage: it holds what is no image.
            BadRecord: its value does not take the field's format.
        """
        text = "".join(_fill(literal, field, spec, row) for literal, field, spec in self._parts())
        images = () if self.image_column is None else _images(row, self.image_column)
        return Prompt(text, self.system, images)

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
        raise MissingValue(f"column {field!r} is null")
    try:
        return literal + format(value, spec)
    except (TypeError, ValueError) as error:
        raise BadRecord(f"column {field!r} cannot be formatted with {spec!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class ChatColumn:
    """A column with a conversation a row: a list of ``{"role", "content"}``, or the JSON text of one.

    What a message may be says `Chat`. Keys that a row does not use may be null, as they are in Parquet files.

    Args:
        column: its name.
        system: a system message for the conversations that have none; None adds none.
        image_column: a column with the pictures, as for `PromptTemplate`, of conversations that only mark their place
            with ``{"type": "image"}``, as Hugging Face's datasets do; as many as there are marks, in their order.
    """

    column: str
    system: str | None = None
    image_column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,) if self.image_column is None else (self.column, self.image_column)

    def __call__(self, row: Row) -> Chat:
        """The row's conversation. Engines check its messages one by one.

        Raises:
            MissingValue: the column is null, or a picture is missing.
            BadImage: the column of the pictures holds what is none.
            BadRecord: the column is no list, or a text that is no JSON list; a picture is too much.
        """
        messages = self._messages(row)
        if self.image_column is not None:
            messages = _with_images(messages, _images(row, self.image_column), self.image_column)
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        if self.system is not None and "system" not in roles:
            messages = [{"role": "system", "content": self.system}, *messages]
        return Chat(messages)

    def _messages(self, row: Row) -> list[Any]:
        value = row[self.column]
        if value is None:
            raise MissingValue(f"column {self.column!r} is null")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise BadRecord(
                    f"column {self.column!r} holds a text that is no JSON ({error}): for plain questions use a template"
                ) from error
        if not isinstance(value, list):
            raise BadRecord(f"column {self.column!r} holds a {type(value).__name__}, not a list of messages")
        return value


def _images(row: Row, column: str) -> tuple[bytes | str, ...]:
    value = row[column]
    if value is None:
        raise MissingValue(f"column {column!r} is null")
    return tuple(_image(item, column) for item in (value if isinstance(value, list) else [value]))


def _image(value: object, column: str) -> bytes | str:
    if isinstance(value, Mapping):  # datasets keeps the file's bare name as path beside its bytes
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | str) and value:
        return value
    if value is None or isinstance(value, bytes | str):
        raise MissingValue(f"column {column!r} lacks an image: it is null or empty")
    raise BadImage(
        f"column {column!r} holds a {type(value).__name__} for an image: it must be bytes, a path, a data: URL or "
        "{bytes, path}"
    )


def _with_images(messages: list[Any], images: tuple[bytes | str, ...], column: str) -> list[Any]:
    """The messages with the pictures at their marks; the row's own are left as they are."""
    left = iter(images)
    filled = [
        {**message, "content": [_filled(part, left, column) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    if next(left, None) is not None:
        raise BadRecord(f"column {column!r} holds {len(images)} images, more than the conversation has places for")
    return filled


def _filled(part: Any, left: Iterator[bytes | str], column: str) -> Any:
    given = {key for key, value in part.items() if value is not None} if isinstance(part, Mapping) else set()
    if not given or part.get("type") != "image" or given & {"image", "url", "path"}:
        return part
    image = next(left, None)
    if image is None:
        raise MissingValue(f"column {column!r} holds fewer images than the conversation has places for")
    return {"type": "image", "image": image}


def prompt_function(prompt: str | PromptTemplate | ChatColumn | PromptFunction) -> PromptFunction:
    """A template's text, a template, a column or a function, all as a function of a row."""
    return PromptTemplate(prompt) if isinstance(prompt, str) else prompt


def prompt_columns(prompt: str | PromptTemplate | ChatColumn | PromptFunction) -> Sequence[str] | None:
    """The columns a prompt reads, or None if only the function knows."""
    function = prompt_function(prompt)
    return function.columns if isinstance(function, PromptTemplate | ChatColumn) else None
