"""Which Arrow types hold a stream of JSON values: one pass, any number of rows, memory for the types only.

The rules: null fits everything; an integer becomes a float where floats occur; a missing key is a null; texts stay
texts, dates included; lists and objects keep their structure. Anything else that differs is a conflict, which names
both lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

MAX_FIELDS = 2000
"""More keys than this in one object are data, not columns."""

_KINDS = {str: "text", bool: "true/false", int: "integer", float: "number", list: "list", dict: "object"}
_SCALARS: dict[str | None, pa.DataType] = {
    "text": pa.string(),
    "true/false": pa.bool_(),
    "number": pa.float64(),
    None: pa.null(),
}
_NUMBERS = frozenset(("integer", "number"))
_INT64 = range(-(2**63), 2**63)


MAX_DEPTH = 32


class Conflict(Exception):
    """Values of one column that no type holds; the message is for the user and lacks only the file's name."""


class Shape:
    """What is known of the values at one place: a column, a list's items, an object's field."""

    __slots__ = ("fields", "high", "item", "kind", "line", "low")

    def __init__(self) -> None:
        self.kind: str | None = None
        self.line = 0
        self.low = 0
        self.high = 0
        self.item: Shape | None = None
        self.fields: dict[str, Shape] | None = None

    def observe(self, value: Any, line: int, name: str) -> None:
        """Widens the shape by one value, seen in ``line`` (from 1) of column ``name``."""
        if value is None:
            return
        kind = _KINDS[type(value)]
        if name.count(".") + name.count("[]") > MAX_DEPTH:
            raise Conflict(
                f"line {line} is nested more than {MAX_DEPTH} deep, which Parquet can't hold: write it as text"
            )
        if kind != self.kind:
            self._become(kind, line, name)
        if kind == "integer":
            if value > self.high:
                self.high = value
            elif value < self.low:
                self.low = value
        elif kind == "list":
            if self.item is None:
                self.item = Shape()
            for item in value:
                self.item.observe(item, line, f"{name}[]")
        elif kind == "object":
            if self.fields is None:
                self.fields = {}
            observe_fields(self.fields, value, line, f"{name}.")

    def _become(self, kind: str, line: int, name: str) -> None:
        if self.kind is None:
            self.kind, self.line = kind, line
        elif self.kind in _NUMBERS and kind in _NUMBERS:
            self.kind = "number"
        else:
            raise Conflict(
                f"column {name!r} is {_article(self.kind)} in line {self.line} and {_article(kind)} in line {line}"
            )

    def type(self, name: str) -> pa.DataType:
        """The Arrow type that holds every value observed.

        Raises:
            Conflict: integers beyond 64 bits.
        """
        if self.kind == "integer":
            if self.low in _INT64 and self.high in _INT64:
                return pa.int64()
            if self.low >= 0 and self.high < 2**64:
                return pa.uint64()
            raise Conflict(f"column {name!r} holds integers of more than 64 bits: write them as texts")
        if self.kind == "number":
            try:
                float(self.low), float(self.high)
            except OverflowError:
                raise Conflict(f"column {name!r} holds numbers beyond 1.8e308: write them as texts") from None
        if self.kind == "list":
            return pa.list_(pa.null() if self.item is None else self.item.type(f"{name}[]"))
        if self.kind == "object":
            if not self.fields:
                return pa.null()  # Parquet has no object without fields
            return pa.struct([(key, shape.type(f"{name}.{key}")) for key, shape in self.fields.items()])
        return _SCALARS[self.kind]


def observe_fields(shapes: dict[str, Shape], values: dict[str, Any], line: int, prefix: str = "") -> None:
    """Widens the shapes of an object's fields; new fields are added in the order in which they are first seen."""
    for key, value in values.items():
        shape = shapes.get(key)
        if shape is None:
            if len(shapes) >= MAX_FIELDS:
                raise Conflict(
                    f"{'column ' + repr(prefix[:-1]) if prefix else 'the file'} has more than {MAX_FIELDS} different "
                    f"keys by line {line}: store them as a list of key and value"
                )
            shape = shapes[key] = Shape()
        shape.observe(value, line, prefix + key)


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def to_array(values: list[Any], kind: pa.DataType) -> pa.Array[Any]:
    """JSON values as an Arrow array of a type that was inferred from them or is wider.

    Raises:
        pyarrow.ArrowException: the values do not fit, because the file was changed since.
    """
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError):
        # Rare: integers above 2^53 among floats, objects that never have a field. Python rounds and drops those.
        convert = _converter(kind)
        return pa.array([convert(value) for value in values], kind)


def _converter(kind: pa.DataType) -> Callable[[Any], Any]:
    if pa.types.is_floating(kind):
        return lambda value: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if pa.types.is_null(kind):
        return lambda value: None if value == {} else value
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = _converter(kind.value_type)
        return lambda value: [item(one) for one in value] if isinstance(value, list) else value
    if pa.types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}
        return lambda value: (
            {key: convert(value.get(key)) for key, convert in fields.items()} if isinstance(value, dict) else value
        )
    return lambda value: value
