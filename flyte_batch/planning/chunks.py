"""How many rows go in a chunk when the user does not say.

Three forces:

1. Enough rows in flight to fill batches: what all slots of a replica hold at once should exceed two full batches, one
   on the device and one waiting.
2. Enough chunks that the slots finish together: the tail of a run is at most one chunk long, so a slot should see
   several of them.
3. Few enough chunks for the orchestrator: Flyte advises 10,000 to 20,000 actions a run and submits 100 a second.

The size is the smallest that fills batches, doubled as often as the number of chunks demands. So it rarely changes when
a dataset grows or a limit is raised, and the chunks that are done already stay as they are.
"""

from __future__ import annotations

BATCHES_IN_FLIGHT = 3
CHUNKS_PER_SLOT = 8
USUAL_CHUNKS = 1_000
MAX_CHUNKS = 10_000


def plan_chunk_rows(rows: int, *, replicas: int, concurrency: int, batch_rows: int) -> int:
    """Rows per chunk, at least 1; may exceed ``rows``, which then make one chunk.

    Args:
        rows: rows of the run.
        replicas: most replicas that work at once.
        concurrency: chunks that one replica takes at once.
        batch_rows: records in a full batch of the engine.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in (
        ("rows", rows),
        ("replicas", replicas),
        ("concurrency", concurrency),
        ("batch_rows", batch_rows),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    size = -(-BATCHES_IN_FLIGHT * batch_rows // concurrency)
    most_chunks = min(MAX_CHUNKS, max(USUAL_CHUNKS, CHUNKS_PER_SLOT * replicas * concurrency))
    while rows > size * most_chunks:
        size *= 2
    return size


def is_sound(chunk_rows: int | None, rows: int) -> bool:
    """Whether a chunk size that an output was begun with still makes a number of chunks that the orchestrator takes."""
    return chunk_rows is not None and rows <= chunk_rows * MAX_CHUNKS
