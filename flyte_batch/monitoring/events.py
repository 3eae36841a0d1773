"""The events: frozen, small, and about groups of records, so that a record costs next to nothing.

All times are Unix times in seconds, all durations seconds. An event says what happened in this process; which replica
the process is says `flyte_batch.monitoring.scope.process_name`. A batch may serve several callers: its `Share` per
caller says whose records they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["prepare", "infer", "finish"]
"""Where a row failed: before the batcher, in it, or after."""


@dataclass(frozen=True, eq=False, slots=True)
class Scope:
    """Whose work it is. Two scopes are the same only if they are one object: each attempt at a chunk has its own.

    Attributes:
        run: name of the Flyte run, "" outside of one.
        action: name of the Flyte action, "" outside of one.
        chunk: the chunk's id, "" where a record belongs to none.
        chunk_index: its position in the plan.
        trace: what a tracing backend found to be the caller's span; see `flyte_batch.monitoring.scope.trace_source`.
    """

    run: str = ""
    action: str = ""
    chunk: str = ""
    chunk_index: int | None = None
    trace: object = None


@dataclass(frozen=True, slots=True)
class Share:
    """One caller's records in a batch.

    Attributes:
        scope: the caller's.
        records: how many.
        failed: those of them that got an error.
        cost: of all of them, in the batcher's unit.
        latencies: (seconds from entering the queue to the outcome, records), for each time of arrival.
        lost: those of ``failed`` on which the engine died. They have no `RecordFailed`.
    """

    scope: Scope
    records: int
    failed: int
    cost: float
    latencies: tuple[tuple[float, int], ...]
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What all events have.

    Attributes:
        at: when it happened.
    """

    at: float


@dataclass(frozen=True, slots=True)
class RecordsSubmitted(Event):
    """Records entered a batcher's queue together."""

    batcher: str
    scope: Scope
    records: int
    cost: float
    queued: int


@dataclass(frozen=True, slots=True)
class BatchFormed(Event):
    """Records left the queue for the device.

    In a `ContinuousBatcher` those that it admitted in one go; in the others one call of the engine.

    Attributes:
        batcher: its id.
        batch: number within the batcher, from 1; that of the `BatchDone` to come, where there is one batch at a time.
        records: how many.
        cost: in the batcher's unit, as the budget sees it.
        fill: share of the budget or of the most records, whichever is larger.
        queued: records that are left waiting.
    """

    batcher: str
    batch: int
    records: int
    cost: float
    fill: float
    queued: int


@dataclass(frozen=True, slots=True)
class BatchDone(Event):
    """Records came back from the device, well or badly.

    In a `ContinuousBatcher` those that the engine gave back in one step.

    Attributes:
        batcher: its id.
        batch: number within the batcher, from 1.
        started_at: when the engine got them; the first of them in a `ContinuousBatcher`.
        records: how many; each retry of a split batch is a batch of its own.
        failed: those of them that got an error.
        cost: in the batcher's unit, as the budget sees it.
        fill: share of the budget or of the most records, whichever is larger, at most what was in flight.
        out_of_memory: the batch did not fit the device, and its records are tried again in smaller ones; none of them
            is in ``shares``.
        shares: the callers whose records got their outcome. A batch that is split and tried again has none.
    """

    batcher: str
    batch: int
    started_at: float
    records: int
    failed: int
    cost: float
    fill: float
    out_of_memory: bool
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class RecordFailed(Event):
    """A record got no result.

    Attributes:
        scope: the caller's.
        stage: where.
        error: the error's class, the cause by which failures are counted.
        message: what it says.
        batcher: its id, "" where the record failed outside of it.
        row: its number in the source, from 0; None for a record that is not of a chunk.
    """

    scope: Scope
    stage: Stage
    error: str
    message: str
    batcher: str = ""
    row: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkStarted(Event):
    """A worker began with a chunk."""

    scope: Scope
    rows: int


@dataclass(frozen=True, slots=True)
class ChunkDone(Event):
    """A worker committed a chunk's part; the counts are the part's own.

    Attributes:
        scope: the chunk's.
        rows: in the part, failures included.
        failures: rows with ``error`` set.
        causes: class of the error -> failed rows.
        prompt_tokens: of all rows.
        response_tokens: of all rows.
        seconds: from reading to commit.
    """

    scope: Scope
    rows: int
    failures: int
    prompt_tokens: int
    response_tokens: int
    seconds: float
    causes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkFailed(Event):
    """A worker gave a chunk up; Flyte or the driver may try again.

    Attributes:
        scope: the chunk's.
        error: the error's class.
        message: what it says.
        seconds: from reading to the failure.
    """

    scope: Scope
    error: str
    message: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineLoading(Event):
    """A process began to load what answers records.

    Attributes:
        name: of the factory.
    """

    name: str


@dataclass(frozen=True, slots=True)
class EngineLoaded(Event):
    """A process has what answers records, or has failed to get it.

    Attributes:
        name: of the factory.
        seconds: that it took.
        error: class of the error, "" if it went well.
    """

    name: str
    seconds: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class EngineStarted(Event):
    """A batcher began to take records.

    Attributes:
        batcher: its id.
        engine: class of the engine, of the batcher where it owns none.
    """

    batcher: str
    engine: str


@dataclass(frozen=True, slots=True)
class EngineDied(Event):
    """A batcher can't go on.

    Attributes:
        batcher: its id.
        engine: class of the engine, of the batcher where it owns none.
        error: class of what ended it.
        message: what that says.
        lost: records that were queued or on the device, but for those that a `Share` names.
    """

    batcher: str
    engine: str
    error: str
    message: str
    lost: int


@dataclass(frozen=True, slots=True)
class LoopBlocked(Event):
    """The event loop stood still for more than a second, and turns again. Comes from a thread of its own.

    Attributes:
        seconds: for how long.
        code: the function that held it, with its file.
    """

    seconds: float
    code: str


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A driver planned its run and begins to fan it out.

    Attributes:
        scope: the driver's.
        output: the folder of the parts.
        rows: of the whole output.
        rows_reused: those of them that an earlier run committed.
        chunks: of the whole output.
        chunks_reused: those of them that an earlier run committed.
    """

    scope: Scope
    output: str
    rows: int
    rows_reused: int
    chunks: int
    chunks_reused: int


@dataclass(frozen=True, slots=True)
class ChunkReported(Event):
    """A driver heard how a chunk ended.

    Attributes:
        scope: the driver's.
        chunk: the chunk's id.
        chunk_index: its position in the plan.
        rows: of the chunk.
        failures: rows without a response; 0 if the chunk failed.
        prompt_tokens: of all rows.
        response_tokens: of all rows.
        seconds: from reading to commit, on the replica.
        error: class of the error if the chunk failed, else "".
    """

    scope: Scope
    chunk: str
    chunk_index: int
    rows: int
    failures: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """A driver is done, or gave up.

    Attributes:
        scope: the driver's.
        output: the folder of the parts.
        rows: in the committed parts.
        failures: those of them without a response.
        seconds: of this run.
        error: class of the error that ended it, "" if the manifest was written.
    """

    scope: Scope
    output: str
    rows: int
    failures: int
    seconds: float
    error: str = ""
