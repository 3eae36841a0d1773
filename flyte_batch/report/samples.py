"""Some answers of an output, to be looked at; a few kilobytes are read, whatever its size, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flyte_batch.errors import BadInput
from flyte_batch.report.formats import cut

if TYPE_CHECKING:
    from flyte_batch.data.storage import Entry, Location
    from flyte_batch.report.run_log import RunLog

SAMPLES = 5
MOST_PARTS = 3
MOST_COLUMNS = 4
MOST_CHARACTERS = 1500
"""Of one value."""


@dataclass(frozen=True)
class SampleAnswer:
    """One row of an output.

    Attributes:
        row: its number in the source, from 0.
        columns: of the source; those that the prompt reads come first.
        response: None for a failed row.
        error: None for an answered row.
    """

    row: int
    columns: Mapping[str, str]
    response: str | None
    error: str | None


def sample_answers(folder: Location, log: RunLog | None = None, count: int = SAMPLES) -> list[SampleAnswer]:
    """The first rows of the first parts of an output's last run, ``count`` in all; fewer where there are fewer.

    Long values are cut.

    Args:
        folder: the output, finished or not.
        log: of its run: tells which columns the prompt reads.
        count: rows.

    Raises:
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data import storage
    from flyte_batch.data.manifest import read_run
    from flyte_batch.data.output import current_parts

    parts = current_parts(read_run(folder), storage.entries(folder))[:MOST_PARTS]
    texts = list(_texts(log.settings)) if log is not None else []
    each = -(-count // max(1, len(parts)))
    found: list[SampleAnswer] = []
    for part in parts:
        try:
            found += _head(part, min(each, count - len(found)), texts)
        except BadInput:  # another run deleted or replaced it meanwhile
            continue
    return found


def _head(part: Entry, rows: int, texts: Sequence[str]) -> Iterator[SampleAnswer]:
    """The first rows of a part; none of a file that is no part."""
    from flyte_batch.data.chunks import RESULT_COLUMNS
    from flyte_batch.data.parquet import Parquet
    from flyte_batch.data.parts import read_part_info

    info = read_part_info(part.location)
    rows = min(rows, info.rows) if info is not None else 0
    if info is None or rows < 1:
        return
    file = Parquet().scan(part.location, part.size, part.modified, None, 0)
    of_source = [name for name in file.names if name not in RESULT_COLUMNS]
    readable = [name for name in of_source if "binary" not in str(file.schema.field(name).type)]  # pictures are not
    asked = [name for name in readable if name in texts or any(f"{{{name}}}" in text for text in texts)]
    shown = [*asked, *(name for name in readable if name not in asked)][:MOST_COLUMNS]
    schema = file.schema
    for name in file.names:
        if name not in (*shown, "response", "error"):
            schema = schema.remove(schema.get_field_index(name))
    read = [row for table in Parquet().read(file.span(0, rows), schema, rows) for row in table.to_pylist()]
    for index, row in enumerate(read):
        yield SampleAnswer(
            row=info.first_row + index,
            columns={name: _text(row[name]) for name in shown},
            response=None if row["response"] is None else cut(row["response"], MOST_CHARACTERS),
            error=None if row["error"] is None else cut(row["error"], MOST_CHARACTERS),
        )


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return cut(text, MOST_CHARACTERS)


def _texts(value: object) -> Iterator[str]:
    """All texts in settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
