"""One chunk, start to end: read its rows, ask, answer, write its part. Knows no Flyte.

A row's way: `read_chunk` -> prompt and tokens (threads) -> batcher -> engine -> finish (threads) -> `write_part`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from flyte_batch.batching.engine_batcher import EngineOwner
from flyte_batch.data.chunks import Chunk, ChunkReport, read_chunk
from flyte_batch.data.pandas_import import import_pandas
from flyte_batch.errors import MOST_CAUSES, BadInput, BadRecord, DeadlineExceeded, EngineError
from flyte_batch.guard import Guard, watch
from flyte_batch.monitoring import clock, events, gpu
from flyte_batch.monitoring.backends import attach_backends
from flyte_batch.monitoring.details import ChunkDetails, EngineLife, Example
from flyte_batch.monitoring.hooks import emit
from flyte_batch.monitoring.recorder import ChunkRecording, recorder
from flyte_batch.monitoring.scope import new_scope, process_name, rows_entered, scope_entered
from flyte_batch.pipeline import GONE, Failure, Pipeline
from flyte_batch.prompts import PromptFunction, PromptTemplate, Row, prompt_columns, prompt_function
from flyte_batch.records import Chat, Completion, Prompt

logger = logging.getLogger(__name__)

FinishFunction = Callable[[Row, Completion], str]
"""Turns a row and its completion into the text of the ``response`` column; an exception fails that row only."""


class Undecodable(str):
    """In a value's place, why it could not be read."""


Solver = Callable[[], Awaitable[EngineOwner[Any, Completion, Any]]]
"""Gives the process's engine and batcher: an `EngineBatcher`, or a `ContinuousBatcher`."""

EXAMPLES = 3
"""Failed rows of each cause that a chunk's report shows."""
EXAMPLE_CHARACTERS = 300

DEATHS_APART_S = 600.0
"""An engine that dies again so soon after a death is not the engine's own bad luck: let another replica try."""


async def infer(
    chunk: Chunk,
    solver: Solver,
    *,
    prompt: str | PromptTemplate | PromptFunction,
    finish: FinishFunction | None = None,
    timeout_s: float | None = None,
) -> ChunkReport:
    """Infer the rows of a chunk and commit its part. Safe to repeat: the part appears whole, once, under one name.

    Args:
        chunk: which rows, and where the part goes.
        solver: gives the process's engine and batcher, usually a `singleton`; called again if the engine died.
        prompt: a template such as ``"{question}"``, or a function of a row. A prompt without a seed gets its row's
            number in the source, so that an engine that seeds each record samples a row alike in every run.
        finish: post-processing of a response; without it the response is the completion's text.
        timeout_s: seconds for the whole chunk, a model's load included; one that takes longer is given up. If the
            engine was there for half of that, and nobody got an answer, the replica ends itself as well: code that
            hangs on a thread can't be stopped.

    Returns:
        Counts of the chunk, and what its replica's device did meanwhile.

    Raises:
        BadInput: the source changed since the run was planned, or lacks a column that the prompt reads.
        EngineError: the engine failed every row; nothing was written, so that a retry can do better.
        EngineDead, BatcherDied: the engine died twice within `DEATHS_APART_S`; let another replica try.
        DeadlineExceeded: ``timeout_s`` was over; says what the chunk waited for.
        ValueError: ``timeout_s`` is not positive.
    """
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    import_pandas()
    guard = watch()
    attach_backends()
    scope = new_scope(chunk.id, chunk.index)
    with recorder.recording(scope) as recording:
        work = _Work(chunk, solver, scope, recording)
        emit(events.ChunkStarted(time.time(), scope, chunk.rows))
        started = time.monotonic()
        try:
            with scope_entered(scope):
                return await _within(timeout_s, work, guard, prompt, finish)
        except BaseException as error:
            seconds = time.monotonic() - started
            emit(events.ChunkFailed(time.time(), scope, type(error).__name__, str(error), seconds))
            raise


async def _within(
    timeout_s: float | None,
    work: _Work,
    guard: Guard,
    prompt: str | PromptTemplate | PromptFunction,
    finish: FinishFunction | None,
) -> ChunkReport:
    """See `infer`."""
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await work.run(prompt, finish)
    except TimeoutError as error:
        if not deadline.expired() or timeout_s is None:
            raise
        silent_s = work.silent_s()
        if silent_s > timeout_s / 2:  # less says little of an engine that has just been loaded
            guard.end_replica_soon(f"the engine is there, but nobody got an answer for {silent_s:.0f} s")
        raise DeadlineExceeded(
            f"{work} was not done after {timeout_s:g} s: {work.stage()}; if that is just too short, give chunks more "
            "time (timeout_s, --chunk_timeout_s) or fewer rows (chunk_size)"
        ) from error


class _Work:
    """What a call does for its chunk, and how far it has come."""

    def __init__(self, chunk: Chunk, solver: Solver, scope: events.Scope, recording: ChunkRecording) -> None:
        self._chunk = chunk
        self._solver = solver
        self._scope = scope
        self._recording = recording
        self._task: _Task | None = None
        self._silence: _Silence | None = None

    def __str__(self) -> str:
        chunk = self._chunk
        return f"chunk {chunk.index} (rows {chunk.first_row}-{chunk.first_row + chunk.rows - 1})"

    def stage(self) -> str:
        """What it is at, for a message."""
        if self._task is None:
            return "its rows were not read yet"
        if self._silence is None:
            return "the model was still loading"
        return "its rows were being answered" if self._task.left else "its part was being written"

    def silent_s(self) -> float:
        """Seconds since the engine is there, if it gave nobody an answer meanwhile; else 0."""
        return self._silence.seconds if self._silence is not None else 0.0

    async def run(self, prompt: str | PromptTemplate | PromptFunction, finish: FinishFunction | None) -> ChunkReport:
        """See `infer`."""
        from flyte_batch.data.parts import write_part

        chunk = self._chunk
        started, began_at = time.monotonic(), clock.now()
        table, sampler = await asyncio.gather(
            asyncio.to_thread(read_chunk, chunk), asyncio.to_thread(gpu.start_sampler)
        )
        columns = prompt_columns(prompt)
        missing = [column for column in columns or () if column not in table.column_names]
        if missing:
            raise BadInput(f"the prompt reads column {missing[0]!r}; the source has {', '.join(table.column_names)}")
        values = await asyncio.to_thread(_values, table if columns is None or finish else table.select(list(columns)))
        task = self._task = _Task(
            values, prompt_function(prompt), finish, [None] * table.num_rows, chunk.first_row, self._scope
        )
        died_at = -math.inf
        lives: list[EngineLife] = []
        while True:
            batcher = await self._solver()  # a singleton drops what is not running any more, and builds anew
            self._silence = _Silence(batcher)
            loaded_at = clock.now()
            with recorder.sampling(batcher) as samples:
                try:
                    await task.run(batcher)
                    task.check_engine()
                    info = await asyncio.to_thread(write_part, chunk, table, task.answered())
                    break
                except GONE as error:
                    now = time.monotonic()
                    if now - died_at < DEATHS_APART_S:
                        raise
                    died_at = now
                    left = task.left
                    logger.warning("%s with %d of %d rows to do; building the engine anew", error, left, chunk.rows)
                finally:
                    started_at = lives[-1].ended if lives else began_at
                    life = (batcher.id, batcher.engine_name, started_at, loaded_at, clock.now(), samples())
                    lives.append(EngineLife(*life, *task.done(lives), batcher.is_told))
        details = ChunkDetails(
            process=process_name(),
            lives=tuple(lives),
            latencies=dict(self._recording.latencies),
            causes=info.causes,
            examples=task.examples(),
            prompt_lengths={float(bound): rows for bound, rows in info.prompt_lengths.items()},
            response_lengths={float(bound): rows for bound, rows in info.response_lengths.items()},
            stalls=tuple(self._recording.stalls),
            died=tuple(self._recording.died),
            gpus=await asyncio.to_thread(sampler.use_between, began_at, clock.now()) if sampler is not None else (),
        )
        report = ChunkReport(
            chunk_id=chunk.id,
            index=chunk.index,
            rows=info.rows,
            failures=info.failures,
            prompt_tokens=info.prompt_tokens,
            response_tokens=info.response_tokens,
            part=info.name,
            seconds=time.monotonic() - started,
            details=details.to_json(),
        )
        counts = report.rows, report.failures, report.prompt_tokens, report.response_tokens, report.seconds
        emit(events.ChunkDone(time.time(), self._scope, *counts, info.causes))
        return report


def _values(table: Any) -> dict[str, list[Any]]:
    """A table's values by column; a text that is no UTF-8, as some programs write it to Parquet, is `Undecodable`."""
    values: dict[str, list[Any]] = {}
    for name in table.column_names:
        try:
            values[name] = table[name].to_pylist()
        except UnicodeDecodeError:
            values[name] = [_value(value) for value in table[name]]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Undecodable(str(error))


@dataclass
class _Task:
    """The rows of one chunk and what came of them so far."""

    values: dict[str, list[Any]]  # column -> a value a row
    ask: PromptFunction
    finish: FinishFunction | None
    results: list[Completion | Exception | None]
    first_row: int  # number of the chunk's first row in the source
    scope: events.Scope

    engine_errors: list[Exception] = field(default_factory=list)  # of rows that the engine, not their content, failed

    @property
    def left(self) -> int:
        return sum(result is None for result in self.results)

    def done(self, before: Sequence[EngineLife]) -> tuple[int, int]:
        """Rows that have their results, and the tokens of these, but for what was done before."""
        tokens = sum(
            (result.prompt_tokens or 0) + (result.response_tokens or 0)
            for result in self.results
            if isinstance(result, Completion)
        )
        rows = len(self.results) - self.left
        return rows - sum(life.rows for life in before), tokens - sum(life.tokens for life in before)

    def answered(self) -> list[Completion | Exception]:
        """The results, all of which are there."""
        return [result for result in self.results if result is not None]

    def examples(self) -> tuple[Example, ...]:
        """Failed rows of each cause whose messages say different things, the first ones."""
        found: dict[str, list[Example]] = {}
        for index, result in enumerate(self.results):
            if isinstance(result, Exception):
                cause = type(result).__name__
                known = found.setdefault(cause, [])
                if len(known) < EXAMPLES and len(found) <= MOST_CAUSES:
                    example = Example(self.first_row + index, cause, str(result)[:EXAMPLE_CHARACTERS])
                    if all(example.gist != other.gist for other in known):
                        known.append(example)
        return tuple(example for examples in found.values() for example in examples)

    def check_engine(self) -> None:
        """Tell poison rows from an engine that answers nothing: a failure in the output would stay there for ever.

        Raises:
            EngineError: of several rows that reached the engine not one was answered, and not for want of good records.
        """
        errors = self.engine_errors
        if len(errors) > 1 and not any(isinstance(result, Completion) for result in self.results):
            raise EngineError(
                f"the engine answered none of {len(errors)} rows; "
                f"the first error is {type(errors[0]).__name__}: {errors[0]}"
            ) from errors[0]

    async def run(self, batcher: EngineOwner[Any, Completion, Any]) -> None:
        """Fill the places of ``results`` that are None.

        Raises:
            EngineDead, BatcherDied, BatcherNotRunning: the batcher can't go on; what was answered stays in ``results``.
        """

        def prepare(index: int) -> tuple[int, Any]:
            asked = self.ask(self._row(index))
            prompt = Prompt(asked) if isinstance(asked, str) else asked
            if isinstance(prompt, Prompt | Chat) and prompt.seed is None:
                # The row's number in the source: the same in every run, whatever the chunks' size. A new prompt,
                # because a prompt function may return one object for several rows.
                prompt = replace(prompt, seed=self.first_row + index)
            return self.first_row + index, batcher.engine.prepare(prompt)

        def finish(index: int, completion: Completion) -> tuple[int, Completion]:
            if self.finish is None:
                return index, completion
            text = self.finish(self._row(index), completion)
            if not isinstance(text, str):
                raise TypeError(f"finish returned {type(text).__name__}, not a text")
            return index, replace(completion, text=text)

        todo = [index for index, result in enumerate(self.results) if result is None]
        pipeline = Pipeline(prepare, _RowMapper(batcher), finish)
        async with aclosing(pipeline.run(todo, ordered=False, errors="yield")) as outputs:
            async for output in outputs:
                if isinstance(output, Failure):
                    self.results[output.item] = output.error
                    if output.stage != "infer":  # of those the batcher tells
                        cause = type(output.error).__name__, str(output.error)
                        row = self.first_row + output.item
                        emit(events.RecordFailed(time.time(), self.scope, output.stage, *cause, row=row))
                    if output.stage == "infer" and not isinstance(output.error, BadRecord):
                        self.engine_errors.append(output.error)
                else:
                    index, self.results[index] = output

    def _row(self, index: int) -> Row:
        row = {column: values[index] for column, values in self.values.items()}
        for column, value in row.items():
            if isinstance(value, Undecodable):
                raise BadRecord(f"column {column!r} is no valid UTF-8: {value}")
        return row


class _RowMapper:
    """A batcher whose records come with the numbers of their rows, which its events then tell."""

    def __init__(self, batcher: EngineOwner[Any, Completion, Any]) -> None:
        self._batcher = batcher
        self.preferred_block = batcher.preferred_block

    async def map(self, records: Sequence[tuple[int, Any]], *, return_exceptions: bool = False) -> Sequence[Any]:
        with rows_entered([row for row, _ in records]):
            return await self._batcher.map([record for _, record in records], return_exceptions=return_exceptions)


class _Silence:
    """For how long a batcher has given nobody an answer."""

    def __init__(self, batcher: EngineOwner[Any, Completion, Any]) -> None:
        self._batcher = batcher
        self._answered = batcher.stats.total_completed
        self._made = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since this was made, if the batcher gave nobody an answer meanwhile; else 0."""
        answered = self._batcher.stats.total_completed - self._answered
        return 0.0 if answered else time.monotonic() - self._made
