"""Parquet: rows, schema and row groups come from the footer; no row is read before a worker needs it.

Identity is the content where that is cheap (local files up to `HASHED_BYTES`, every byte); otherwise size, footer and
the time of the last change, so that a copy of a larger or remote file counts as another file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from flyte_batch.data import storage
from flyte_batch.data.chunks import Span
from flyte_batch.data.formats import SourceFile
from flyte_batch.data.storage import Location
from flyte_batch.errors import BadInput

HASHED_BYTES = 1 << 30
"""Local files up to this size are hashed whole: about a second a GiB, nothing beside inferring their rows."""

_MAGIC = b"PAR1"
_BROKEN = re.compile(r"deserializ|corrupt|decompress|unexpected end of stream|invalid", re.IGNORECASE)
_BUFFER_BYTES = 4 << 20


class Parquet:
    """See `flyte_batch.data.formats.Format`."""

    name = "parquet"
    suffixes: tuple[str, ...] = (".parquet", ".pq")

    def scan(
        self, location: Location, size: int, modified: float | None, columns: Sequence[str] | None, index_entries: int
    ) -> SourceFile:
        del index_entries  # row groups are the index
        with storage.open_file(location) as file:
            footer = _footer(file, location, size)
            with storage.explained("read", location):
                try:
                    parquet = pq.ParquetFile(file)
                    rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
                except (pa.ArrowException, OSError) as error:
                    raise BadInput(
                        f"{location} has a broken Parquet footer ({storage.reason(error)}): write it anew"
                    ) from error
                seal = _seal(size, footer)
                if location.is_local and size <= HASHED_BYTES:
                    identity = f"content-{_content_digest(file)}"
                else:
                    identity = f"{seal}-{modified}"
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if twice:
            raise BadInput(f"{location} has more than one column {twice[0]!r}: rename one of them")
        chosen = [name for name in (schema.names if columns is None else columns) if name in schema.names]
        return SourceFile(
            location=location,
            format=self.name,
            rows=rows,
            size=size,
            identity=identity,
            seal=seal,
            names=tuple(schema.names),
            schema=pa.schema([(name, bare_type(schema.field(name).type)) for name in chosen]),
        )

    def read(self, span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[pa.Table]:
        location = storage.locate(span.path)
        changed = BadInput(f"{location} was changed since its chunks were planned: run again to plan it anew")
        with storage.open_file(location) as file, storage.explained("read", location):
            size = file.size()
            try:
                intact = _seal(size, _footer(file, location, size)) == span.seal
            except BadInput:
                intact = False
            if not intact:
                raise changed
            try:
                yield from _read(file, span, schema, batch_rows)
            except (pa.ArrowException, OSError) as error:
                # pyarrow reports broken pages as an OSError without a number, like an object store its faults.
                if isinstance(error, OSError) and not _BROKEN.search(str(error)):
                    raise
                raise BadInput(f"{location} is broken ({storage.reason(error)}): write it anew") from error


def _read(file: pa.NativeFile, span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[pa.Table]:
    # A buffer size makes pyarrow stream the pages instead of loading whole column chunks.
    parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
    groups: list[int] = []
    before = row = 0  # rows before the first group that is needed; rows before the group at hand
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if row + rows <= span.start:
            before = row + rows
        elif row < span.stop:
            groups.append(group)
        row += rows
    names = [name for name in schema.names if name in parquet.schema_arrow.names]
    row = before
    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=groups, columns=names):
        start, stop = max(span.start - row, 0), min(span.stop - row, batch.num_rows)
        row += batch.num_rows
        if start < stop:
            yield conform(pa.Table.from_batches([batch.slice(start, stop - start)]), schema)
        if row >= span.stop:
            return


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with exactly the columns and types of ``schema``; a column that it lacks is all null."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(field.name)
        # Large integers in a column that is a float elsewhere are rounded, as JSON does; all else must fit.
        rounds = pa.types.is_floating(field.type) and pa.types.is_integer(column.type)
        columns.append(column if column.type == field.type else column.cast(field.type, safe=not rounds))
    return pa.table(columns, schema=schema)


def bare_type(kind: pa.DataType) -> pa.DataType:
    """A type without what only its file needs: dictionaries become their values."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _footer(file: pa.NativeFile, location: Location, size: int) -> bytes:
    """The footer's bytes, magic included.

    Raises:
        BadInput: the file is no Parquet file, or was cut off.
    """
    remedy = "write it anew, or name it after its format"
    with storage.explained("read", location):
        if size == 0:
            raise BadInput(f"{location} is empty (0 bytes), not a Parquet file: {remedy}")
        head, tail = storage.read_range(file, 0, 4), storage.read_range(file, max(size - 8, 0), 8)
        if head != _MAGIC and tail[-4:] != _MAGIC:
            raise BadInput(f"{location} is not a Parquet file (it begins with {head!r}, not {_MAGIC!r}): {remedy}")
        length = int.from_bytes(tail[:4], "little") if len(tail) == 8 else size
        if head != _MAGIC or tail[-4:] != _MAGIC or length + 12 > size:
            raise BadInput(f"{location} is a Parquet file that was cut off or damaged (no whole footer): write it anew")
        return storage.read_range(file, size - length - 8, length + 8)


def _seal(size: int, footer: bytes) -> str:
    return f"{size}-{hashlib.sha256(footer).hexdigest()[:24]}"


def _content_digest(file: pa.NativeFile) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BUFFER_BYTES):
        digest.update(block)
    return digest.hexdigest()[:32]
