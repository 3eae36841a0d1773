"""Cutting a source into chunks, and reading a chunk's rows back.

A chunk is a reference: paths, row numbers and digests, about a kilobyte. It is what a driver sends to a worker, so this
module loads no pyarrow before a row is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flyte_batch.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

    from flyte_batch.data.sources import Source

RESULT_COLUMNS = ("response", "finish_reason", "error", "prompt_tokens", "response_tokens")
"""The columns that a part adds to the source's; a source column can't have one of these names."""

_ID_VERSION = 1
FAMILY_CHARS = 6
"""Of a chunk's id: equal in all chunks of the same settings, columns and size; so a part's name tells whose it is."""


@dataclass(frozen=True)
class Span:
    """Rows ``[start, stop)`` of one file.

    Attributes:
        path: local path or URI of the file.
        format: ``jsonl`` or ``parquet``.
        start: first row, counted from 0 within the file.
        stop: row after the last one.
        offset: byte at which reading begins (JSONL; 0 for Parquet).
        end: byte at which reading may stop (JSONL; the file's size for Parquet).
        skip: rows between ``offset`` and row ``start``; 0 for files of up to a million rows, below 1% beyond.
        digest: digest of the content, for the chunk's id: of the rows from ``offset`` to ``end`` (JSONL), or of the
            file (Parquet).
        seal: what a reader compares to find that the file was changed since it was planned.
    """

    path: str
    format: str
    start: int
    stop: int
    offset: int
    end: int
    skip: int
    digest: str
    seal: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Chunk:
    """What one worker task gets: a range of a dataset, by reference.

    Attributes:
        id: 32 hex digits, a hash of all that determines the chunk's output: the rows' content, the columns and their
            types, and the run's settings. Paths are no part of it: a copied or moved dataset keeps its ids.
        index: position in the plan, from 0.
        first_row: number of its first row within the source, from 0.
        rows: number of rows, at least 1.
        spans: the files and row ranges, in source order.
        output: local path or URI of the folder that gets the part.
        schema: the source's Arrow schema, serialised, base64.
    """

    id: str
    index: int
    first_row: int
    rows: int
    spans: tuple[Span, ...]
    output: str
    schema: str

    @property
    def part(self) -> str:
        """The part's file name; names sort in source order, and name the content that they hold."""
        return f"part-{self.first_row:012d}-{self.id[:16]}.parquet"


@dataclass(frozen=True)
class ChunkReport:
    """What a worker tells the driver about one chunk: counts, never rows.

    Attributes:
        chunk_id: the chunk's id.
        index: the chunk's position in the plan.
        rows: rows in the part, failures included.
        failures: rows without a response.
        prompt_tokens: tokens of all prompts.
        response_tokens: tokens of all responses.
        part: the part's file name.
        seconds: wall time from reading to commit.
        details: how the replica fared meanwhile: a `flyte_batch.monitoring.details.ChunkDetails` as JSON.
    """

    chunk_id: str
    index: int
    rows: int
    failures: int
    prompt_tokens: int
    response_tokens: int
    part: str
    seconds: float
    details: str


def plan_chunks(
    source: Source,
    output: str,
    rows_per_chunk: int,
    *,
    settings: Mapping[str, object],
    limit: int | None = None,
) -> list[Chunk]:
    """Cuts a source into chunks of ``rows_per_chunk`` rows, the last one smaller; chunks may span files.

    Args:
        source: from `flyte_batch.data.sources.open_source`.
        output: the folder that gets the parts, as path or URI.
        rows_per_chunk: at least 1.
        settings: all that determines a response besides the row: model, prompt, parameters, code version. Plain
            values, lists and mappings. They enter the chunks' ids and the manifest, so keep secrets out of them.
        limit: infer only this many rows, the first ones; None for all.

    Raises:
        BadInput: a chunk size or limit below 1, or settings that JSON cannot hold.
    """
    if rows_per_chunk < 1:
        raise BadInput(f"rows per chunk must be at least 1, got {rows_per_chunk}")
    if limit is not None and limit < 1:
        raise BadInput(f"the limit must be at least 1 row, got {limit}; leave it out for all rows")
    from flyte_batch.data.storage import locate

    folder = locate(output).uri  # absolute: a worker may run elsewhere
    rows = source.rows if limit is None else min(limit, source.rows)
    schema = source.encoded_schema
    common = hashlib.sha256(f"{_ID_VERSION}\n{schema}\n{canonical_json(settings)}".encode()).hexdigest()

    family = hashlib.sha256(f"{common}\n{rows_per_chunk}".encode()).hexdigest()[:FAMILY_CHARS]

    chunks: list[Chunk] = []
    file_index, file_first_row = 0, 0  # the file that holds the row we are at, and the row that file begins with
    for first_row in range(0, rows, rows_per_chunk):
        last_row = min(first_row + rows_per_chunk, rows)
        spans: list[Span] = []
        row = first_row
        while row < last_row:
            file = source.files[file_index]
            stop = min(last_row - file_first_row, file.rows)
            if stop > row - file_first_row:
                spans.append(file.span(row - file_first_row, stop))
                row = file_first_row + stop
            if stop == file.rows:
                file_first_row += file.rows
                file_index += 1
        content = [(span.format, span.digest, span.skip, span.start, span.stop) for span in spans]
        chunks.append(
            Chunk(
                id=family + hashlib.sha256(f"{common}\n{json.dumps(content)}".encode()).hexdigest()[FAMILY_CHARS:32],
                index=len(chunks),
                first_row=first_row,
                rows=last_row - first_row,
                spans=tuple(spans),
                output=folder,
                schema=schema,
            )
        )
    return chunks


def canonical_json(settings: Mapping[str, object]) -> str:
    """Settings as JSON that is the same for equal settings, whatever the order of their keys.

    Raises:
        BadInput: names the entry that is no plain value (text, number, bool, None), list, mapping or dataclass.
    """
    return json.dumps(plain(settings), sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def plain(value: object, name: str = "settings") -> object:
    """``value`` as JSON holds it: tuples become lists, dataclasses become mappings.

    Raises:
        BadInput: names the entry that cannot be held.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadInput(f"{name} is {value}, which a manifest can't hold: use a finite number or None")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name), f"{name}.{field.name}") for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadInput(f"{name} has the key {key!r}, which is no text")
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise BadInput(
        f"{name} is a {type(value).__name__}, which a manifest can't hold: "
        "use text, numbers, lists, mappings or dataclasses"
    )


def read_chunk(chunk: Chunk) -> pa.Table:
    """A chunk's rows, all in memory: the source's columns with the source's schema, in source order.

    Raises:
        BadInput: the file is gone, can't be read, or was changed since the chunks were planned.
    """
    import pyarrow as pa

    from flyte_batch.data.sources import decode_schema

    return pa.Table.from_batches(
        (batch for table in iter_rows(chunk, batch_rows=8192) for batch in table.to_batches()),
        schema=decode_schema(chunk.schema),
    )


def iter_rows(chunk: Chunk, columns: Sequence[str] | None = None, batch_rows: int = 1024) -> Iterator[pa.Table]:
    """A chunk's rows as tables of at most ``batch_rows`` rows, in bounded memory.

    Args:
        chunk: what to read.
        columns: these of the source's columns only; None for all.
        batch_rows: most rows of one table.

    Raises:
        BadInput: as `read_chunk`; a change of a JSONL file may be noticed only after the last table.
    """
    from flyte_batch.data.sources import decode_schema, reader

    schema = decode_schema(chunk.schema)
    if columns is not None:
        for name in columns:
            if name not in schema.names:
                raise BadInput(f"no column {name!r} in this chunk; it has {', '.join(schema.names)}")
        schema = _select(schema, columns)
    for span in chunk.spans:
        yield from reader(span.format).read(span, schema, batch_rows)


def _select(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in columns])
