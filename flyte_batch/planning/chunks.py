"""How many rows go in a chunk when the user does not say.

Three forces, in the order in which they yield to each other:

1. Few enough chunks for the orchestrator: Flyte advises 10,000 to 20,000 actions a run and submits 100 a second.
2. Enough chunks that the slots finish together: the tail of a run is at most one chunk long, so a slot should see
   several of them.
3. Enough rows in flight to fill batches: what all slots of a replica hold at once should exceed two full batches,
   one on the device and one waiting.
"""

from __future__ import annotations

MAX_CHUNKS = 10_000
CHUNKS_PER_SLOT = 8
BATCHES_IN_FLIGHT = 3


def plan_chunk_rows(rows: int, *, replicas: int, concurrency: int, batch_rows: int) -> int:
    """Rows per chunk, at least 1.

    Args:
        rows: rows of the run.
        replicas: most replicas that work at once.
        concurrency: chunks that one replica takes at once.
        batch_rows: records in a full batch of the engine.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in (("rows", rows), ("replicas", replicas), ("concurrency", concurrency), ("batch_rows", batch_rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    fills_batches = -(-BATCHES_IN_FLIGHT * batch_rows // concurrency)
    balances = -(-rows // (replicas * concurrency * CHUNKS_PER_SLOT))
    bounds_count = -(-rows // MAX_CHUNKS)
    return min(rows, max(fills_batches, balances, bounds_count))
