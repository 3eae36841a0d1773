"""What a file format has to offer: one pass that learns everything before a run, and reading a range of rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from flyte_batch.data.chunks import Span
from flyte_batch.data.storage import Location

INDEX_ENTRIES = 1 << 20
"""Most row positions kept for one source: 16 bytes each, shared by its files."""

_MODULUS = 1 << 64


class RowIndex:
    """Where every ``stride``-th row of a text file begins, and a digest of all that comes before it; bounded memory.

    Starts exact (``stride`` 1). When it is full, every second entry goes and the stride doubles.

    The digest of rows a..b is the difference of two running sums over ``hash(row) * (2 * number + 1)`` modulo 2^64: it
    depends on each row's content and position, costs the same for any range, and does not change for the rows that
    were there when rows are appended. It notices edits; it is no defence against a forger.
    """

    def __init__(self, capacity: int) -> None:
        self.stride = 1
        self.rows = 0
        self.end = 0
        self.total = 0
        self._capacity = max(2, capacity)
        self._offsets = array("Q")
        self._sums = array("Q")

    def append(self, offset: int, end: int, digest: int) -> None:
        """Adds the next row: its bytes ``[offset, end)`` and its hash, below 2^64."""
        if self.rows % self.stride == 0:
            if len(self._offsets) >= self._capacity:
                self._offsets = self._offsets[::2]
                self._sums = self._sums[::2]
                self.stride *= 2
            if self.rows % self.stride == 0:
                self._offsets.append(offset)
                self._sums.append(self.total)
        self.total = (self.total + weighted(digest, self.rows)) % _MODULUS
        self.rows += 1
        self.end = end

    def window(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """The narrowest indexed range that holds rows ``[start, stop)``: offset, end, rows to skip, digest."""
        first = start // self.stride
        after = -(-stop // self.stride)
        inside = after < len(self._offsets)
        end = self._offsets[after] if inside else self.end
        total = self._sums[after] if inside else self.total
        return self._offsets[first], end, start - first * self.stride, (total - self._sums[first]) % _MODULUS


def weighted(digest: int, row: int) -> int:
    """A row's share in the digest of a range: odd weights keep every bit of it, and make its position count."""
    return digest * (2 * row + 1)


def add_digests(total: int, digest: int, row: int) -> int:
    """The running digest after ``row``."""
    return (total + weighted(digest, row)) % _MODULUS


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, as its scan found it.

    Attributes:
        location: where it is.
        format: ``jsonl`` or ``parquet``.
        rows: number of rows.
        size: in bytes.
        identity: digest of its content, see the format's module for how far it goes.
        seal: digest that a reader can check cheaply.
        names: all its columns.
        schema: its chosen columns.
        index: row positions (JSONL); None where the format can seek by itself.
    """

    location: Location
    format: str
    rows: int
    size: int
    identity: str
    seal: str
    names: tuple[str, ...]
    schema: pa.Schema
    index: RowIndex | None = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> str:
        """Local path or URI."""
        return self.location.uri

    def span(self, start: int, stop: int) -> Span:
        """Rows ``[start, stop)`` of this file; O(1)."""
        offset, end, skip, digest, seal = 0, self.size, 0, self.identity, self.seal
        if self.index is not None:
            offset, end, skip, total = self.index.window(start, stop)
            digest = seal = f"{total:016x}"
        return Span(self.path, self.format, start, stop, offset, end, skip, digest, seal)


class Format(Protocol):
    """One file format."""

    name: str
    suffixes: tuple[str, ...]

    def scan(
        self, location: Location, size: int, modified: float | None, columns: Sequence[str] | None, index_entries: int
    ) -> SourceFile:
        """Learns a file's rows, schema and identity.

        Args:
            location: the file.
            size: its size in bytes.
            modified: when it was last written, seconds since the epoch, where the storage knows.
            columns: the chosen columns, None for all; others may hold whatever they like. A column the file doesn't
                have is left out of its schema: another file may have it.
            index_entries: most row positions to keep.

        Raises:
            BadInput: the file is not of this format, or broken; the message says where.
        """
        ...

    def read(self, span: Span, schema: pa.Schema, batch_rows: int) -> Iterator[pa.Table]:
        """The span's rows as tables of ``schema`` with at most ``batch_rows`` rows, in bounded memory.

        Raises:
            BadInput: the file is gone, or is no longer what was planned.
        """
        ...
