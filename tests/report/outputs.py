"""Outputs, as runs leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flyte_batch.data.chunks import Chunk, plan_chunks, read_chunk
from flyte_batch.data.parts import write_part
from flyte_batch.data.sources import open_source
from flyte_batch.errors import BadRecord
from flyte_batch.records import Completion


def write_output(folder: Path, rows: list[dict[str, Any]], failed: frozenset[int] = frozenset()) -> list[Chunk]:
    """An output of four rows a chunk, without a manifest; rows are answered with their number, or fail."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    chunks = plan_chunks(open_source(str(source)), str(folder), 4, settings={})
    for chunk in chunks:
        numbers = range(chunk.first_row, chunk.first_row + chunk.rows)
        results = [BadRecord(f"bad {n}") if n in failed else Completion(f"answer {n}", "stop", 5, 2) for n in numbers]
        write_part(chunk, read_chunk(chunk), results)
    return chunks
