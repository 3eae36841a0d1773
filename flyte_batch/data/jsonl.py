"""JSON Lines: one object a line, UTF-8.

One pass over the bytes finds the row count, the schema, every broken line, and where rows begin, so that a chunk can be
read without the rows before it. It is a pass in Python on purpose: as fast as pyarrow's reader in one thread (`json` is
C, too), it knows line numbers, and it reads what was written, where pyarrow.json guesses timestamps and rounds big
numbers.

Blank lines are skipped and count as lines, not as rows. A byte order mark and CRLF are fine. Identity is the content of
the rows: copies and appended rows leave the digests of the rows before unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from flyte_batch.data import storage
from flyte_batch.data.chunks import Span
from flyte_batch.data.formats import RowIndex, SourceFile, add_digests
from flyte_batch.data.inference import Conflict, Shape, observe_fields, to_array
from flyte_batch.data.storage import Location
from flyte_batch.errors import BadInput

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f"the key {twice!r} occurs twice in one object")
    return values


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _parse(line: bytes) -> dict[str, Any]:
    """One row.

    Raises:
        ValueError: says what is wrong with the line.
    """
    try:
        row = _decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if type(row) is not dict:
        raise ValueError(f'a line must be a JSON object like {{"question": ...}}, found {_short(line)}')
    if b"\\u" in line and (b"\\ud" in line or b"\\uD" in line):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 text can hold") from None
    return row


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return text if len(text) <= 40 else f"{text[:40]}..."


def _digest(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


def _lines(location: Location, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Lines of the bytes ``[offset, end)`` with the offset of each, without newline; blank ones included."""
    with storage.open_file(location) as file, storage.explained("read", location):
        rest, at = b"", offset
        while offset < end:
            block = storage.read_range(file, offset, min(BLOCK_BYTES, end - offset))
            if not block:
                break
            offset += len(block)
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            for line in lines:
                yield at, line
                at += len(line) + 1
            if len(rest) > MAX_LINE_BYTES:
                raise BadInput(
                    f"{location} has a line of more than {MAX_LINE_BYTES >> 20} MiB: JSONL needs one object a line"
                )
        if rest:
            yield at, rest


class Jsonl:
    """See `flyte_batch.data.formats.Format`."""

    name = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson", ".json-lines")

    def scan(
        self, location: Location, size: int, modified: float | None, columns: Sequence[str] | None, index_entries: int
    ) -> SourceFile:
        index = RowIndex(index_entries)
        names: dict[str, None] = {}
        shapes: dict[str, Shape] = {name: Shape() for name in columns or ()}
        for number, (offset, raw) in enumerate(_lines(location, 0, size), 1):
            line = raw.strip(_SPACE)
            if number == 1 and line.startswith(_BOM):
                offset += raw.index(_BOM) + len(_BOM)
                line = line.removeprefix(_BOM).strip(_SPACE)
            if not line:
                continue
            try:
                row = _parse(line)
            except ValueError as error:
                raise BadInput(f"{location}, line {number}: {error}; {_remedy(number, line)}") from None
            try:
                if not names.keys() >= row.keys():
                    names.update(dict.fromkeys(row))
                if columns is None:
                    observe_fields(shapes, row, number)
                else:
                    for name, shape in shapes.items():
                        shape.observe(row.get(name), number, name)
            except Conflict as error:
                raise BadInput(f"{location}: {error}; {_CONFLICT_REMEDY}") from None
            index.append(offset, offset + len(raw), _digest(line))
        try:
            fields = [(name, shape.type(name)) for name, shape in shapes.items() if name in names]
        except Conflict as error:
            raise BadInput(f"{location}: {error}; {_CONFLICT_REMEDY}") from None
        return SourceFile(
            location=location,
            format=self.name,
            rows=index.rows,
            size=size,
            identity=f"{index.total:016x}-{index.rows}",
            seal=f"{index.total:016x}",
            names=tuple(names),
            schema=pa.schema(fields),
            index=index,
        )

    def read(self, span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[pa.Table]:
        location = storage.locate(span.path)
        changed = BadInput(f"{location} was changed since its chunks were planned: run again to plan it anew")
        rows: list[dict[str, Any]] = []
        number, total = span.start - span.skip, 0
        for _, raw in _lines(location, span.offset, span.end):
            line = raw.strip(_SPACE)
            if not line:
                continue
            total = add_digests(total, _digest(line), number)
            if span.start <= number < span.stop:
                try:
                    rows.append(_parse(line))
                except ValueError:
                    raise changed from None
            number += 1
            if len(rows) == batch_rows:
                yield _table(rows, schema, changed)
                rows = []
        if f"{total:016x}" != span.seal:
            raise changed
        if rows:
            yield _table(rows, schema, changed)


def _table(rows: list[dict[str, Any]], schema: pa.Schema, changed: BadInput) -> pa.Table:
    try:
        return pa.table(
            [to_array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema
        )
    except (pa.ArrowException, TypeError, OverflowError):
        raise changed from None


_CONFLICT_REMEDY = "give the column one type in every line, or leave it out by naming the others with --columns"


def _remedy(number: int, line: bytes) -> str:
    if number == 1 and line.startswith(b"["):
        return "for a file that is one JSON array: jq -c '.[]' file.json > file.jsonl"
    return "correct or delete the line"
