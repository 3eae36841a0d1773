"""How many rows go in a chunk when the user does not say.

Four forces:

1. Enough rows in flight to fill batches: what all slots of a replica hold at once should exceed two full batches, one
   on the device and one waiting.
2. Few enough chunks for the orchestrator: Flyte advises 10,000 to 20,000 actions a run.
3. Chunks long enough for what each costs (`stretch`): between two chunks of a slot there is a gap, and all slots
   together must not want chunks faster than one driver hands them out.
4. Chunks short enough for what is under way at once (`tail`): when no chunks are left, replicas stand idle for as long
   as the last chunk takes; and it is what a kill makes a run do again.

The size is the smallest that fills batches, doubled as often as the number of chunks demands. It is doubled further as
long as the third force costs more than `MOST_LOST`, but only if that shortens the run: a doubling at most halves what
the third costs, and doubles the fourth, so a percent of overhead is never paid for with more than a percent of tail. A
run too short for both keeps its small chunks.

So the size rarely changes when a dataset grows or a limit is raised, and the chunks that are done already stay as they
are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyte_batch.planning.overheads import CHUNK_GAP_S, FAN_OUT_PER_S, USUAL_ROWS_PER_S

BATCHES_IN_FLIGHT = 3
CHUNKS_PER_SLOT = 8
USUAL_CHUNKS = 1_000
MAX_CHUNKS = 10_000
MOST_LOST = 0.01
"""Share of the devices' time that a run may lose to orchestration before larger chunks are considered."""


def plan_chunk_rows(
    rows: int, *, replicas: int, concurrency: int, batch_rows: int, rows_per_s: float | None = None
) -> int:
    """Rows per chunk, at least 1; may exceed ``rows``, which then make one chunk.

    Args:
        rows: rows of the run.
        replicas: most replicas that work at once.
        concurrency: chunks that one replica takes at once.
        batch_rows: records in a full batch of the engine.
        rows_per_s: rows that one replica answers a second; `USUAL_ROWS_PER_S` where it is unknown.

    Raises:
        ValueError: an argument is below 1, or ``rows_per_s`` not positive.
    """
    for name, value in (
        ("rows", rows),
        ("replicas", replicas),
        ("concurrency", concurrency),
        ("batch_rows", batch_rows),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if rows_per_s is None:
        rows_per_s = USUAL_ROWS_PER_S
    if not 0 < rows_per_s < math.inf:
        raise ValueError(f"rows_per_s must be a positive number, got {rows_per_s}")

    def stretched(size: int) -> float:
        return stretch(min(size, rows), replicas=replicas, concurrency=concurrency, rows_per_s=rows_per_s)

    def run_time(size: int) -> float:
        return stretched(size) + tail(size, rows, slots=replicas * concurrency)

    size = -(-BATCHES_IN_FLIGHT * batch_rows // concurrency)
    most_chunks = min(MAX_CHUNKS, max(USUAL_CHUNKS, CHUNKS_PER_SLOT * replicas * concurrency))
    while rows > size * most_chunks:
        size *= 2
    while 1 - 1 / stretched(size) > MOST_LOST and run_time(2 * size) < run_time(size):
        size *= 2
    return size


def stretch(chunk_rows: int, *, replicas: int, concurrency: int, rows_per_s: float) -> float:
    """How much longer a run takes for its chunks' overheads: 1 for no longer. Its start and its tail are not in it.

    The larger of two bounds. In the gap between two chunks of a slot the replica does its other chunks, as far as they
    do not end together: at worst each round of all its slots has one gap. And a driver hands out no more than
    `FAN_OUT_PER_S` chunks a second to all replicas together.

    Args:
        chunk_rows: rows per chunk.
        replicas: as for `plan_chunk_rows`.
        concurrency: as for `plan_chunk_rows`.
        rows_per_s: rows that one replica answers a second.
    """
    device_s = chunk_rows / rows_per_s
    return max(1 + CHUNK_GAP_S / (concurrency * device_s), replicas / device_s / FAN_OUT_PER_S)


def tail(chunk_rows: int, rows: int, *, slots: int) -> float:
    """The longest that the end of a run may take, as a share of what its rows alone take: a chunk for every slot.

    Args:
        chunk_rows: rows per chunk.
        rows: rows of the run.
        slots: chunks that all replicas take at once.
    """
    return slots * min(chunk_rows, rows) / rows


@dataclass(frozen=True)
class FewAtOnce:
    """That a replica has fewer rows at once than one batch takes, and either number that would give it enough.

    Attributes:
        rows: that it has at once.
        chunk_rows: rows per chunk that would do.
        concurrency: chunks at once that would do.
    """

    rows: int
    chunk_rows: int
    concurrency: int


def few_at_once(chunk_rows: int, rows: int, *, replicas: int, concurrency: int, batch_rows: int) -> FewAtOnce | None:
    """Whether a replica has fewer rows at once than a full batch, and than its share of the rows to do.

    Args:
        chunk_rows: rows per chunk; 0 where it is unknown.
        rows: that are to be done.
        replicas: as for `plan_chunk_rows`.
        concurrency: as for `plan_chunk_rows`.
        batch_rows: as for `plan_chunk_rows`.
    """
    at_once, share = chunk_rows * concurrency, -(-rows // replicas)
    if chunk_rows < 1 or at_once >= min(batch_rows, share):
        return None
    wanted = min(2 * batch_rows, share)
    return FewAtOnce(at_once, -(-wanted // concurrency), -(-wanted // chunk_rows))


def is_sound(chunk_rows: int | None, rows: int) -> bool:
    """Whether a chunk size that an output was begun with still makes a number of chunks that the orchestrator takes."""
    return chunk_rows is not None and rows <= chunk_rows * MAX_CHUNKS
