"""Parts: one Parquet file a chunk, whole or not at all, that says itself what it holds.

The footer carries the chunk's id and counts. A re-run therefore knows from the parts alone what is done, and a file
that was cut off, or that only has the right name, is never taken for a result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flyte_batch.data import storage
from flyte_batch.data.chunks import RESULT_COLUMNS, Chunk
from flyte_batch.data.sources import decode_schema
from flyte_batch.data.storage import Location
from flyte_batch.errors import MOST_CAUSES, OTHER_CAUSES
from flyte_batch.histograms import count_tokens
from flyte_batch.records import Completion

MAX_ERROR_CHARACTERS = 2000

_RESULT_TYPES = (pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64())
_COUNTS = ("rows", "failures", "prompt_tokens", "response_tokens")
_CONTENTS = ("causes", "prompt_lengths", "response_lengths")
_KEY = "flyte_batch."
_ROW_GROUP_ROWS = 65_536
_MAGIC = b"PAR1"
_TAIL_BYTES = 65_536  # holds most footers


@dataclass(frozen=True)
class PartInfo:
    """What a part's footer says, and its size.

    Attributes:
        name: file name within the output folder.
        chunk_id: the chunk it is the result of.
        first_row: number of its first row within the source, from 0.
        rows: failures included.
        failures: rows with ``error`` set.
        prompt_tokens: of all rows.
        response_tokens: of all rows.
        bytes: size of the file.
        causes: class of the error -> failed rows, the most frequent first; beyond `MOST_CAUSES` of them `OTHER_CAUSES`.
        prompt_lengths: histogram of the answered rows' prompts by tokens (`flyte_batch.histograms.TOKEN_BOUNDS`); the
            bounds are texts, as in JSON.
        response_lengths: the same of their responses.
    """

    name: str
    chunk_id: str
    first_row: int
    rows: int
    failures: int
    prompt_tokens: int
    response_tokens: int
    bytes: int
    causes: Mapping[str, int] = field(default_factory=dict)
    prompt_lengths: Mapping[str, int] = field(default_factory=dict)
    response_lengths: Mapping[str, int] = field(default_factory=dict)


def part_schema(source_schema: pa.Schema) -> pa.Schema:
    """The schema that all parts of a run share: the source's columns, then `RESULT_COLUMNS`."""
    results = [pa.field(name, kind) for name, kind in zip(RESULT_COLUMNS, _RESULT_TYPES, strict=True)]
    return pa.schema([*source_schema, *results])


def write_part(chunk: Chunk, rows: pa.Table, results: Sequence[Completion | Exception]) -> PartInfo:
    """Commits a chunk: its rows with their results, in source order, in one atomic step.

    The same rows and results give the same bytes, so two workers on one chunk write the same file.

    Args:
        chunk: names the folder and the part.
        rows: from `flyte_batch.data.chunks.read_chunk`.
        results: one a row; an exception makes the row a failure, with ``Type: message`` (at most
            `MAX_ERROR_CHARACTERS`) in ``error`` and nulls in the other result columns.

    Raises:
        ValueError: rows or results that are not this chunk's.
        BadInput: this process may not write to the output folder.
        OSError: any other trouble with writing, with the path; nothing is left behind.
    """
    if rows.num_rows != chunk.rows or len(results) != chunk.rows:
        raise ValueError(f"chunk {chunk.index} has {chunk.rows} rows, got {rows.num_rows} rows, {len(results)} results")
    source_schema = decode_schema(chunk.schema)
    if not rows.schema.equals(source_schema):
        raise ValueError(f"chunk {chunk.index} has the columns {source_schema.names}, got {rows.schema.names}")
    completions = [None if isinstance(result, Exception) else result for result in results]
    values: list[list[Any]] = [
        [None if one is None else _text(one.text) for one in completions],
        [None if one is None else _text(one.finish_reason) for one in completions],
        [_error(result) if isinstance(result, Exception) else None for result in results],
        [None if one is None else one.prompt_tokens for one in completions],
        [None if one is None else one.response_tokens for one in completions],
    ]
    columns = [pa.array(column, kind) for column, kind in zip(values, _RESULT_TYPES, strict=True)]
    counts: dict[str, Any] = {
        "chunk_id": chunk.id,
        "first_row": chunk.first_row,
        "rows": chunk.rows,
        "failures": completions.count(None),
        "prompt_tokens": sum(one.prompt_tokens for one in completions if one is not None),
        "response_tokens": sum(one.response_tokens for one in completions if one is not None),
    }
    answered = [one for one in completions if one is not None]
    contents: dict[str, Any] = {
        "causes": most_frequent(Counter(type(each).__name__ for each in results if isinstance(each, Exception))),
        "prompt_lengths": _lengths(one.prompt_tokens for one in answered),
        "response_lengths": _lengths(one.response_tokens for one in answered),
    }
    metadata = {f"{_KEY}{name}": str(value) for name, value in counts.items()}
    metadata |= {f"{_KEY}{name}": json.dumps(value) for name, value in contents.items()}
    schema = part_schema(source_schema).with_metadata(metadata)
    table = pa.Table.from_arrays([*rows.columns, *columns], schema=schema)
    data = _encode(table)
    storage.write_atomically(storage.locate(chunk.output).child(chunk.part), data)
    return PartInfo(name=chunk.part, bytes=len(data), **counts, **contents)


def most_frequent(causes: Counter[str]) -> dict[str, int]:
    """The `MOST_CAUSES` most frequent ones, in that order, and the rest, if there is one, as `OTHER_CAUSES`."""
    named = sorted((each for each in causes.items() if each[0] != OTHER_CAUSES), key=lambda each: (-each[1], each[0]))
    found = dict(named[:MOST_CAUSES])
    rest = causes.total() - sum(found.values())
    return found | ({OTHER_CAUSES: rest} if rest else {})


def _lengths(tokens: Iterable[int]) -> dict[str, int]:
    return {str(bound): rows for bound, rows in count_tokens(tokens).items()}


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _text(text: str) -> str:
    # A detokenizer may cut a character in half; a text that UTF-8 can't hold must not cost the chunk.
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _error(error: Exception) -> str:
    text = _text(f"{type(error).__name__}: {error}")
    return text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}..."


def read_part_info(location: Location, chunk: Chunk | None = None) -> PartInfo | None:
    """What a part says of itself; None if it is missing, cut off, not ours, or not the result of ``chunk``.

    Reads the footer only: that the file ends where its footer says, that it holds as many rows as it claims, and, with
    a chunk given, that id and row count are the chunk's (the id stands for the columns, too).

    Raises:
        BadInput: it may not be read.
        OSError: any other trouble with reading it. That a store is away does not mean that the part is.
    """
    size, footer = _read_footer(location)
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except (OSError, pa.ArrowException):
        return None
    stored = metadata.metadata or {}
    try:
        texts = {name: stored[f"{_KEY}{name}".encode()].decode() for name in ("chunk_id", "first_row", *_COUNTS)}
        contents: dict[str, Any] = {name: json.loads(stored[f"{_KEY}{name}".encode()]) for name in _CONTENTS}
        chunk_id = texts.pop("chunk_id")
        counts: dict[str, Any] = {name: int(text) for name, text in texts.items()}
        info = PartInfo(
            name=location.name,
            chunk_id=chunk_id,
            bytes=size,
            **counts,
            **contents,
        )
    except (KeyError, ValueError):
        return None
    if metadata.num_rows != info.rows or _data_end(metadata) + metadata.serialized_size + 8 > size:
        return None
    if chunk is not None and (info.chunk_id, info.rows, info.first_row) != (chunk.id, chunk.rows, chunk.first_row):
        return None
    return info


def _read_footer(location: Location) -> tuple[int, bytes]:
    """A Parquet file's size in bytes and its footer; nothing for a file that is missing or ends otherwise."""
    with storage.explained("read", location):
        try:
            file = location.fs.open_input_file(location.path)
        except FileNotFoundError:
            return 0, b""
        with file:
            size = file.size()
            tail = storage.read_range(file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if size < length + 4 or storage.read_range(file, 0, 4) != _MAGIC or not tail.endswith(_MAGIC):
                return size, b""
            return size, tail[-length:] if length <= len(tail) else storage.read_range(file, size - length, length)


def _data_end(metadata: pq.FileMetaData) -> int:
    """The byte after the last data page that the footer speaks of."""
    end = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in range(row_group.num_columns):
            piece = row_group.column(column)
            begin = piece.dictionary_page_offset if piece.has_dictionary_page else piece.data_page_offset
            end = max(end, (begin or 0) + piece.total_compressed_size)
    return end
