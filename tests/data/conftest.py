"""Small datasets on disk, and chunks with their results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.data.chunks import Chunk, read_chunk
from flyte_batch.data.parts import PartInfo, write_part
from flyte_batch.records import Completion

WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows as JSON Lines: ``write_rows("a.jsonl", [{...}, ...])``, or bytes as they are."""

    def write(name: str, content: bytes | Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def infer() -> Callable[[Chunk], PartInfo]:
    """Does a worker's work on a chunk, without an engine: the response to a row is its values, joined."""

    def work(chunk: Chunk) -> PartInfo:
        rows = read_chunk(chunk)
        results = [Completion(" ".join(map(str, row.values())), "stop", 5, 2) for row in rows.to_pylist()]
        return write_part(chunk, rows, results)

    return work
