"""A run over a dataset: plan chunks, fan them out, commit the manifest. Knows no Flyte: it takes "run this chunk".

A run's way: `open_source` and `Output.open` (everything that can be wrong is found here, before any engine starts)
-> `plan_chunks` -> chunks that a former run committed are skipped -> bounded fan-out -> manifest -> `RunSummary`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from flyte_batch.data.chunks import Chunk, ChunkReport, plan_chunks
from flyte_batch.data.pandas_import import import_pandas
from flyte_batch.errors import BadInput, BatcherDied, ChunkFailed, DeadlineExceeded, EngineDead, TooManyFailures
from flyte_batch.fingerprint import fingerprint
from flyte_batch.monitoring import clock, events
from flyte_batch.monitoring.backends import attach_backends
from flyte_batch.monitoring.details import ChunkDetails
from flyte_batch.monitoring.events import Scope
from flyte_batch.monitoring.hooks import emit
from flyte_batch.monitoring.scope import new_scope
from flyte_batch.planning.chunks import few_at_once, is_sound, plan_chunk_rows
from flyte_batch.planning.overheads import USUAL_ROWS_PER_S
from flyte_batch.progress import ProgressMode, RunView, check_mode
from flyte_batch.progress.texts import by_earlier_runs
from flyte_batch.replica import check_driver
from flyte_batch.report.answer import utilization
from flyte_batch.report.formats import plural, seconds
from flyte_batch.report.keeper import PAGE_FILE, ReportKeeper
from flyte_batch.report.run_log import ChunkEntry, Plan, RunLog
from flyte_batch.versions import versions

if TYPE_CHECKING:
    from flyte_batch.data.manifest import Manifest
    from flyte_batch.data.output import Output

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

DEFAULT_MAX_FAILURE_RATE = 0.5
FEWEST_ROWS_FOR_DEFAULT_RATE = 100
"""Fewer rows make no rate: three rows of which two are null are no reason to call a run failed."""

MOST_FAILED_ALONE = 3
"""Chunks that ended their engine or replica alone, after which no more are tried: each costs its attempts."""

RunChunk = Callable[[Chunk], Awaitable[ChunkReport]]
"""Runs one chunk somewhere: a Flyte task, a coroutine function that calls one, or `infer` itself."""


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        rows: rows in the output, each exactly once.
        failures: those of them without a response; their ``error`` column says why.
        prompt_tokens: tokens of all prompts, template included.
        response_tokens: tokens generated.
        seconds: wall-clock time of this run.
        utilization: share (0-1) of their time in which the replicas' devices were busy, model load included;
            0 if this run had nothing to do. One at most where engines do not say when their devices were at work, and
            event loops stood still.
        chunks: chunks of the output.
        chunks_reused: those of them that an earlier run had committed.
        output: the folder with the Parquet parts and the manifest.
    """

    rows: int
    failures: int
    prompt_tokens: int
    response_tokens: int
    seconds: float
    utilization: float
    chunks: int
    chunks_reused: int
    output: str


async def run(
    source: str,
    output: str,
    run_chunk: RunChunk,
    *,
    settings: Mapping[str, object] | None = None,
    code_version: str | None = None,
    columns: Sequence[str] | None = None,
    required_columns: Sequence[str] = (),
    limit: int | None = None,
    chunk_size: int | None = None,
    replicas: int = 1,
    concurrency: int = 4,
    batch_rows: int = 256,
    rows_per_s: float | None = None,
    max_failure_rate: float | None = None,
    max_failed_chunks: int = 10,
    retry_failures: bool = False,
    overwrite: bool = False,
    price_per_hour: float | None = None,
    progress: ProgressMode | None = None,
) -> RunSummary:
    """Run every chunk of a source that has no part yet, then commit the output.

    Args:
        source: a JSONL or Parquet file, a folder of them, or a glob.
        output: a folder for the parts and the manifest.
        run_chunk: runs one chunk; at most ``replicas x concurrency`` calls are under way.
        settings: what determines the answers beside the source and the code: model, prompt, parameters. They decide
            whether finished chunks may be reused. Plain values only, and no secrets: they are written to the output.
        code_version: names the code that asks and finishes; by default the `fingerprint` of ``run_chunk``.
        columns: the source's columns to keep; all by default.
        required_columns: columns that the prompt reads; checked before anything starts.
        limit: at most so many rows, from the start.
        chunk_size: rows per chunk; by default as the output was begun, or planned (`plan_chunk_rows`).
        replicas: replicas that work at once.
        concurrency: chunks that one replica takes at once.
        batch_rows: records in a full batch, for planning chunks.
        rows_per_s: rows that one replica answers a second, for planning chunks: what an earlier run's progress said,
            divided by its replicas. By default as for `plan_chunk_rows`.
        max_failure_rate: share (0-1) of failed rows above which the run fails; by default `DEFAULT_MAX_FAILURE_RATE`,
            in runs of at least `FEWEST_ROWS_FOR_DEFAULT_RATE` rows. Whatever its value, a run in which no row at all
            was answered fails.
        max_failed_chunks: chunks that may fail (after their own retries) before no more are started; of those whose
            engine or replica ended, ``concurrency`` more.
        retry_failures: do finished chunks again that hold failed rows.
        overwrite: replace an output made with other settings instead of refusing.
        price_per_hour: of one replica, for the report; any currency.
        progress: ``live`` (a view that refreshes itself), ``plain`` (lines), ``off``, or ``auto``: what suits the
            standard output. By default what the environment variable ``FLYTE_BATCH_PROGRESS`` says, else ``auto``.

    While it runs, and when it ends, the output holds a report: ``_report.html``, ``_report.json``. A task with
    ``report=True`` shows it in Flyte's UI.

    Logs a warning if the chunks of a replica's slots together hold fewer rows than a full batch, or if the driver takes
    a slot of the replicas that it waits for.

    Raises:
        BadInput: something given cannot work; nothing was started.
        ChunkFailed: chunks failed. The others are committed: run again to do only these. Chunks whose engine or
            replica ended are tried once more before, one at a time: it may have been a neighbour that ended it.
        TooManyFailures: more rows failed than allowed. The parts are there, the manifest is not.
    """
    from flyte_batch.data.output import Output
    from flyte_batch.data.sources import open_source

    started, began_at = time.monotonic(), clock.now()
    check_mode(progress)
    _check(max_failure_rate, replicas, concurrency, max_failed_chunks, chunk_size, limit, rows_per_s, price_per_hour)
    attach_backends()
    check_driver(run_chunk)
    left_out = [name for name in required_columns if columns is not None and name not in columns]
    if left_out:
        raise BadInput(f"the prompt reads {left_out[0]!r}, which --columns leaves out: add it, or leave --columns out")
    import_pandas()
    opened = await asyncio.to_thread(open_source, source, columns=columns)
    opened.require(required_columns)
    full = {**(settings or {}), "code": code_version or fingerprint(run_chunk)}
    rows = min(opened.rows, limit or opened.rows)
    target = await asyncio.to_thread(Output.open, output, full, opened, overwrite=overwrite)
    planned = plan_chunk_rows(
        rows, replicas=replicas, concurrency=concurrency, batch_rows=batch_rows, rows_per_s=rows_per_s
    )
    size = chunk_size or (target.chunk_rows if is_sound(target.chunk_rows, rows) else None) or planned
    chunks = plan_chunks(opened, target.path, size, settings=full, limit=limit)
    parts = await asyncio.to_thread(
        target.resume, chunks, chunk_rows=size, retry_failures=retry_failures, may_shrink=overwrite
    )
    scope = new_scope()
    plan = Plan(
        rows=rows,
        chunks=len(chunks),
        chunk_rows=size,
        rows_reused=sum(part.rows for part in parts.values()),
        chunks_reused=len(parts),
        replicas=replicas,
        concurrency=concurrency,
        batch_rows=batch_rows,
        rows_per_s=rows_per_s or USUAL_ROWS_PER_S,
        price_per_hour=price_per_hour,
    )
    log = RunLog(
        target.path, opened.path, target.run.settings, plan, scope.run, scope.action, began_at, versions=versions()
    )
    for part in parts.values():
        log.count_part(part)
    _warn_if_starving(size, rows - plan.rows_reused, replicas, concurrency, batch_rows)
    rate = max_failure_rate if max_failure_rate is not None else DEFAULT_MAX_FAILURE_RATE
    if max_failure_rate is None and rows < FEWEST_ROWS_FOR_DEFAULT_RATE:
        rate = 1.0
    fan = _FanOut(target, chunks, set(parts), run_chunk, log, scope, rate, max_failed_chunks)
    async with ReportKeeper(log, target.location) as keeper:
        with RunView(log, progress) as view:
            if parts:
                rows_there = f"{plan.rows_reused:,} of {rows:,} rows"
                view.say(f"{len(parts)} of {len(chunks)} chunks ({rows_there}) are finished already, by earlier runs")
            manifest = await fan.run(view)
        summary = RunSummary(
            rows=manifest.rows,
            failures=manifest.failures,
            prompt_tokens=manifest.prompt_tokens,
            response_tokens=manifest.response_tokens,
            seconds=round(time.monotonic() - started, 3),
            utilization=round(log.utilization, 4),
            chunks=len(chunks),
            chunks_reused=len(parts),
            output=target.path,
        )
    why = ", see the column 'error'" if summary.failures else ""
    done = f"{plural(summary.rows, 'row')}{by_earlier_runs(summary.rows, plan.rows_reused)}"
    busy = f", device busy {utilization(log.time_shares())}" if log.engines else ""
    page = f"; how it went: {PAGE_FILE} there" if keeper.has_page else ""
    view.say(
        f"{done}, {summary.failures:,} failed{why}; {seconds(summary.seconds)}{busy}; "
        f"{plural(summary.chunks, 'part')}, {summary.chunks_reused} of them kept: {summary.output}{page}"
    )
    return summary


class _FanOut:
    """Gives away the chunks of a planned run that have no part yet, then commits the output.

    Args:
        target: the output.
        chunks: the plan.
        done: ids of those that an earlier run committed.
        run_chunk: runs one chunk.
        log: of the run; what is heard of chunks goes there.
        scope: the driver's.
        rate: share (0-1) of failed rows above which the run fails.
        max_failed: chunks that may fail by themselves before no more are started.
    """

    def __init__(
        self,
        target: Output,
        chunks: Sequence[Chunk],
        done: set[str],
        run_chunk: RunChunk,
        log: RunLog,
        scope: Scope,
        rate: float,
        max_failed: int,
    ) -> None:
        self._target = target
        self._chunks = chunks
        self._answered = done
        self._run_chunk = run_chunk
        self._log = log
        self._scope = scope
        self._rate = rate
        self._max_failed = max_failed
        self._given: dict[str, float] = {}  # chunk -> when
        self._lags: dict[str, float] = {}  # process -> seconds, see `ChunkDetails.clock_lag`

    async def run(self, view: RunView) -> Manifest:
        """See `run`; whatever happens, the log and the events say how it ended."""
        log, plan = self._log, self._log.plan
        counts = plan.rows, plan.rows_reused, plan.chunks, plan.chunks_reused
        emit(events.RunStarted(time.time(), self._scope, log.output, *counts))
        error = ""
        try:
            manifest = await self._run(view)
            log.outcome = "done"
            return manifest
        except BaseException as raised:
            error = type(raised).__name__
            log.outcome = "failed" if isinstance(raised, Exception) else "cancelled"
            log.error = f"{error}: {raised}" if isinstance(raised, Exception) else error
            if log.outcome == "cancelled" and log.rows:
                view.say(f"what is finished in {log.output} is kept: run the same command again to do the rest")
            try:
                await asyncio.to_thread(self._target.leave, self._chunks)
            except RuntimeError:  # the interpreter ends, as by Ctrl-C, and starts no thread any more
                self._target.leave(self._chunks)
            raise
        finally:
            log.ended = clock.now()
            emit(events.RunEnded(time.time(), self._scope, log.output, log.rows, log.failures, log.seconds, error))

    async def _run(self, view: RunView) -> Manifest:
        log, plan = self._log, self._log.plan
        failed: list[_FailedChunk] = []
        if not self._too_many_rows_failed:
            todo = (chunk for chunk in self._chunks if chunk.id not in self._answered)
            # A chunk may take all down that share its replica: they do not count before they failed alone.
            most_lost = self._max_failed + plan.concurrency
            failed = await self._answer(view, todo, plan.replicas * plan.concurrency, self._max_failed, most_lost)
        own = [each for each in failed if not each.may_be_anothers]
        again = [each for each in failed if each.may_be_anothers]
        hopeless = (
            self._too_many_rows_failed or len(own) >= self._max_failed or any(each.is_bad_input for each in own)
            or log.rows == 0  # then it is not a neighbour's fault
        )  # fmt: skip
        if again and not hopeless:
            view.say(f"{_describe(failed, plan.chunks)}. {len(again)} of them are tried again, one at a time")
            one_by_one = (each.chunk for each in again)
            alone = await self._answer(view, one_by_one, 1, MOST_FAILED_ALONE, MOST_FAILED_ALONE)
            tried = self._answered | {each.chunk.id for each in alone}
            failed = own + alone + [each for each in again if each.chunk.id not in tried]
        if failed:
            message = _describe(failed, plan.chunks) + _remedy(failed, log.rows > 0, log.output)
            raise ChunkFailed(message) from failed[0].error
        if self._too_many_rows_failed or log.failures == plan.rows:
            raise TooManyFailures(_describe_failures(log.failures, plan.rows, self._rate, log.output))
        return await asyncio.to_thread(self._target.commit, self._chunks)

    @property
    def _too_many_rows_failed(self) -> bool:
        return self._log.failures / self._log.plan.rows > self._rate

    async def _answer(
        self, view: RunView, todo: Iterable[Chunk], at_once: int, most_failed: int, most_lost: int
    ) -> list[_FailedChunk]:
        """Run these chunks until too many fail by themselves, or in all; gives the failed ones."""
        failed: list[_FailedChunk] = []
        async with aclosing(fan_out(todo, self._give, at_once)) as ended:
            async for outcomes in ended:
                for chunk, outcome in outcomes:
                    if isinstance(outcome, Exception):
                        self._heard_of_failure(chunk, outcome)
                        failed.append(_FailedChunk(chunk, outcome))
                    else:
                        self._heard(chunk, outcome)
                view.refresh()
                own = sum(not each.may_be_anothers for each in failed)
                bad_input = any(each.is_bad_input for each in failed)
                if self._too_many_rows_failed or own >= most_failed or len(failed) >= most_lost or bad_input:
                    break
        return failed

    async def _give(self, chunk: Chunk) -> ChunkReport:
        self._given[chunk.id] = clock.now()
        return await self._run_chunk(chunk)

    def _heard(self, chunk: Chunk, report: ChunkReport) -> None:
        self._answered.add(report.chunk_id)
        details = ChunkDetails.from_json(report.details)
        lag = details.clock_lag(self._given.pop(chunk.id), clock.now())
        lag = self._lags.setdefault(details.process, lag)
        if lag:
            details = details.later(lag)
        counts = report.rows, report.failures, report.prompt_tokens, report.response_tokens
        ended = details.batcher, details.began, details.ended
        self._log.add_chunk(ChunkEntry(report.index, *counts, *ended), details)
        told = report.chunk_id, report.index, *counts, report.seconds
        emit(events.ChunkReported(time.time(), self._scope, *told))

    def _heard_of_failure(self, chunk: Chunk, error: Exception) -> None:
        name = _name(error)
        self._log.chunks.append(ChunkEntry(chunk.index, chunk.rows, 0, 0, 0, error=name))
        emit(events.ChunkReported(time.time(), self._scope, chunk.id, chunk.index, chunk.rows, error=name))


async def fan_out(
    items: Iterable[T], call: Callable[[T], Awaitable[R]], concurrency: int
) -> AsyncGenerator[list[tuple[T, R | Exception]], None]:
    """Call ``call`` for every item, at most ``concurrency`` at once; yields (item, result or exception) as they end.

    Those that ended at the same time come together: whoever leaves has heard of all that ended.

    Plain asyncio, so it runs the same under Flyte's local mode, where ``flyte.map`` is sequential, and remotely. Items
    are taken only as slots get free. Leaving the loop early (use ``contextlib.aclosing``) cancels what is under way.
    """
    iterator = iter(items)
    running: dict[asyncio.Future[R], T] = {}
    try:
        while True:
            for item in iterator:
                running[asyncio.ensure_future(call(item))] = item
                if len(running) >= concurrency:
                    break
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            ended: list[tuple[T, R | Exception]] = []
            for future in done:
                outcome = _outcome(future)
                ended.append((running.pop(future), outcome))
            yield ended
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _outcome(future: asyncio.Future[R]) -> R | Exception:
    if future.cancelled():  # by whoever runs it; nobody cancelled the driver
        return RuntimeError("the call was cancelled")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Exception):
        return error
    raise error


def _check(
    max_failure_rate: float | None,
    replicas: int,
    concurrency: int,
    max_failed_chunks: int,
    chunk_size: int | None,
    limit: int | None,
    rows_per_s: float | None,
    price_per_hour: float | None,
) -> None:
    if max_failure_rate is not None and not 0 <= max_failure_rate <= 1:
        raise BadInput(f"max_failure_rate must be between 0 (no row may fail) and 1, got {max_failure_rate}")
    if rows_per_s is not None and not 0 < rows_per_s < math.inf:
        raise BadInput(f"rows_per_s must be a positive number, got {rows_per_s}; leave it out if it is unknown")
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise BadInput(f"price_per_hour must be 0 or more, got {price_per_hour}; leave it out if it is unknown")
    for name, value in (
        ("replicas", replicas), ("concurrency", concurrency), ("max_failed_chunks", max_failed_chunks),
        ("chunk_size", chunk_size), ("limit", limit),
    ):  # fmt: skip
        if value is not None and value < 1:
            remedy = "; leave it out to have it planned" if name == "chunk_size" else ""
            raise BadInput(f"{name} must be at least 1, got {value}{remedy}")


def _warn_if_starving(size: int, rows: int, replicas: int, concurrency: int, batch_rows: int) -> None:
    """Warn if a replica is given fewer rows at once than a full batch and than its share of what is left to do."""
    few = few_at_once(size, rows, replicas=replicas, concurrency=concurrency, batch_rows=batch_rows)
    if few is not None:
        logger.warning(
            "warning: chunks of %d rows x concurrency %d give a replica %d rows at once, fewer than the %d of a full "
            "batch: its device will wait. Raise chunk_size to %d or the replicas' concurrency to %d",
            size, concurrency, few.rows, batch_rows, few.chunk_rows, few.concurrency,
        )  # fmt: skip


def _name(error: Exception) -> str:
    """The class of an error; one that crossed a Flyte task's boundary carries its name as ``code``."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else type(error).__name__


@dataclass(frozen=True)
class _FailedChunk:
    chunk: Chunk
    error: Exception

    @property
    def is_bad_input(self) -> bool:
        return _name(self.error) == BadInput.__name__

    @property
    def may_be_anothers(self) -> bool:
        """Whether it may have failed for a neighbour's sake: an engine or a replica that they shared ended, or hung."""
        lost = any(kind.__name__ == "RuntimeSystemError" for kind in type(self.error).__mro__)  # Flyte's, not imported
        return lost or _name(self.error) in (EngineDead.__name__, BatcherDied.__name__, DeadlineExceeded.__name__)


def _describe(failed: list[_FailedChunk], chunks: int) -> str:
    first = min(failed, key=lambda each: each.chunk.index)
    rows = f"rows {first.chunk.first_row}-{first.chunk.first_row + first.chunk.rows - 1}"
    return (
        f"{len(failed)} of {chunks} chunks failed; "
        f"first: chunk {first.chunk.index} ({rows}): {_name(first.error)}: {first.error}"
    )


def _remedy(failed: list[_FailedChunk], any_done: bool, output: str) -> str:
    kept = f"What the others wrote to {output} is kept; " if any_done else ""
    remedy = "fix that, then " if any(each.is_bad_input for each in failed) else ""
    return f". {kept}{remedy}run the same command again to do the rest"


def _describe_failures(failures: int, rows: int, rate: float, output: str) -> str:
    allowed = f"more than max_failure_rate {rate:g} allows" if failures < rows else "no row was answered"
    return (
        f"{failures} of {rows} rows failed, {allowed}; the column 'error' of the parts in {output} says why. "
        + ("Fix the source or the prompt" if failures == rows else "Fix the source, raise max_failure_rate")
        + ", or try the failed rows again with retry_failures (--retry_failures)"
    )
