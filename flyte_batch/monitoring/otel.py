"""Events as OpenTelemetry spans and metrics.

Spans nest as ``run`` -> ``chunk`` -> ``batch`` -> ``record``. A batch of a shared batcher may serve several traces: it
is a span in each of them, with that trace's own records, and links to all chunks and callers that it serves. With
flyteplugins-otel, which makes spans of Flyte's tasks, a run and all its replicas are one trace.

Names follow OpenTelemetry's conventions where there are some (``gen_ai.usage.*``, ``error.type``, ``exception.*``) and
flyteplugins-otel's for Flyte's own (``flyte.run_name``); the rest is below ``flyte_batch``.
"""

from __future__ import annotations

import atexit
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import SimpleQueue

from opentelemetry import context as contexts
from opentelemetry import metrics as metrics_api
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, StatusCode, TracerProvider
from opentelemetry.util.types import AttributeValue

import flyte_batch
from flyte_batch.errors import MESSAGE_CHARS, BadInput, counted_as
from flyte_batch.monitoring import hooks, metrics, scope
from flyte_batch.monitoring.events import (
    BatchDone,
    BatchFormed,
    ChunkDone,
    ChunkFailed,
    ChunkReported,
    ChunkStarted,
    EngineDied,
    EngineLoaded,
    EngineLoading,
    EngineStarted,
    Event,
    LoopBlocked,
    RecordFailed,
    RecordsSubmitted,
    RunEnded,
    RunStarted,
    Scope,
    Share,
)
from flyte_batch.monitoring.metrics import Metric

logger = logging.getLogger(__name__)

Attributes = dict[str, AttributeValue]

_MOST_OPEN = 1000
"""Chunks whose end never came, after which the oldest are ended."""
_MOST_QUEUED = 10_000
"""Events that wait for the thread, beyond which more are left out."""
_CLOSING_S = 5.0
"""How long `close` waits for the thread."""
_MOST_LINKS = 64
_MOST_EXCEPTIONS = 10
"""Failed records of a batch that are told of one by one."""
_MOST_LATENCIES = 8
"""Latencies that a batch adds to the histogram: OpenTelemetry takes them one by one, at some microseconds each."""


class OtelHook:
    """Gives spans and metrics to OpenTelemetry's providers.

    The span of a run or chunk is the current one of the task that emits its event, until its end: what an engine, an
    HTTP client or the user's own code traces meanwhile nests in it. A chunk's parent is the span in which its worker
    was called: with flyteplugins-otel that of its Flyte task, whose parent is the run's.

    Spans are made and metrics are counted on a thread, so that no batch waits for it.

    Args:
        tracer_provider: takes the spans; by default the global one, which may be set later.
        meter_provider: takes the metrics; by default the global one, which may be set later.
        sample_records: share (0-1) of the records that get a span.
        batches_per_chunk: so many batches of a chunk get a span; later ones do if one of their records is sampled.
            Totals on the chunk's span count all.
        message_chars: cut messages of errors to so many characters; 0 leaves them out.
        rng: draws the sample.

    Raises:
        BadInput: an option that cannot work.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        sample_records: float = 0.01,
        batches_per_chunk: int = 1000,
        message_chars: int = MESSAGE_CHARS,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 <= sample_records <= 1:
            raise BadInput(f"sample_records must be between 0 (no record) and 1 (every record), got {sample_records}")
        for name, value in (("batches_per_chunk", batches_per_chunk), ("message_chars", message_chars)):
            if value < 0:
                raise BadInput(f"{name} must not be negative, got {value}")
        self._tracer = trace.get_tracer("flyte_batch", flyte_batch.__version__, tracer_provider)
        self._metrics = _Metrics(meter_provider)
        self._sample = _Sample(sample_records, rng or random.Random())  # noqa: S311
        self._batches_per_chunk = batches_per_chunk
        self._message_chars = message_chars
        # Added to where events happen, taken from by the thread: single operations of dicts, which need no lock.
        self._runs: dict[Scope, _Open] = {}
        self._chunks: dict[Scope, _Open] = {}
        self._failed: list[RecordFailed] = []  # of batches that are still to be told of
        self._trace_source_before = scope.trace_source
        self._trace_source = lambda: trace.get_current_span().get_span_context()
        scope.trace_source = self._trace_source
        self._events: SimpleQueue[tuple[Event, Context] | None] = SimpleQueue()
        self._is_behind = False
        self._thread = threading.Thread(target=self._work, name="flyte-batch-otel", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Work off what was heard, and end what is open; scopes know no spans any more. Flush the providers then."""
        atexit.unregister(self.close)
        self._events.put(None)
        self._thread.join(_CLOSING_S)
        if scope.trace_source is self._trace_source:
            scope.trace_source = self._trace_source_before
        self._metrics.close()
        self._end_oldest(self._chunks, 0)
        self._end_oldest(self._runs, 0)

    def on_event(self, event: Event) -> None:
        """Enter or leave the span of a run or chunk; what takes longer is left to a thread."""
        opened: _Open | None = None
        match event:
            case BatchFormed() | EngineLoading():
                return
            case ChunkStarted():
                self._chunk_started(event)
            case RunStarted():
                self._run_started(event)
            case ChunkDone() | ChunkFailed():
                opened = self._chunks.get(event.scope)
            case RunEnded():
                opened = self._runs.get(event.scope)
        if self._events.qsize() < _MOST_QUEUED:
            self._events.put((event, contexts.get_current()))
        elif not self._is_behind:
            self._is_behind = True
            logger.warning("more happens than OpenTelemetry can be told: its spans and metrics miss some of it")
        if opened is not None:
            opened.leave()

    def _work(self) -> None:
        has_failed = False
        while (heard := self._events.get()) is not None:
            try:
                self._take(*heard)
            except Exception:
                if not has_failed:
                    logger.warning("OpenTelemetry could not be told of something", exc_info=True)
                has_failed = True

    def _take(self, event: Event, context: Context) -> None:
        """Extend or end spans, count. ``context`` is that in which the event happened."""
        match event:
            case BatchDone():
                self._batch_done(event)
            case RecordsSubmitted():
                if event.scope in self._chunks:
                    self._chunks[event.scope].batchers.add(event.batcher)
            case RecordFailed():
                self._record_failed(event)
            case ChunkStarted():
                self._end_oldest(self._chunks, _MOST_OPEN)
            case RunStarted():
                self._end_oldest(self._runs, _MOST_OPEN)
            case ChunkDone():
                self._chunk_done(event)
            case ChunkFailed():
                self._metrics.chunk_failed()
                self._end(self._chunks, event.scope, event.at, {}, event.error, event.message)
            case EngineStarted():
                self._metrics.engine_started(event)
            case EngineLoaded():
                self._engine_loaded(event, context)
            case EngineDied():
                self._engine_died(event)
            case LoopBlocked():
                self._loop_blocked(event)
            case ChunkReported():
                self._chunk_reported(event)
            case RunEnded():
                ended = {"flyte_batch.run.rows": event.rows, "flyte_batch.run.failures": event.failures}
                self._end(self._runs, event.scope, event.at, ended, event.error)

    # -- Runs and chunks ---------------------------------------------------

    def _run_started(self, event: RunStarted) -> None:
        attributes: Attributes = {
            "flyte_batch.output": event.output,
            "flyte_batch.run.rows_planned": event.rows,
            "flyte_batch.run.rows_reused": event.rows_reused,
            "flyte_batch.run.chunks": event.chunks,
            "flyte_batch.run.chunks_reused": event.chunks_reused,
        }
        opened = self._start("run", self._runs, event.scope, event.at, attributes)
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        opened.propagation = scope.action_context(**carrier)
        opened.propagation.__enter__()

    def _chunk_reported(self, event: ChunkReported) -> None:
        opened = self._runs.get(event.scope)
        if opened is not None and event.error:
            attributes = {"error.type": event.error, **_of_chunk(event.chunk, event.chunk_index)}
            opened.span.add_event("flyte_batch.chunk.failed", attributes, _ns(event.at))

    def _chunk_started(self, event: ChunkStarted) -> None:
        attributes: Attributes = {
            **_of_chunk(event.scope.chunk, event.scope.chunk_index),
            "flyte_batch.chunk.rows": event.rows,
            "flyte_batch.replica": scope.process_name(),
        }
        self._start("chunk", self._chunks, event.scope, event.at, attributes)

    def _chunk_done(self, event: ChunkDone) -> None:
        self._metrics.chunk_done(event)
        ended = {
            "flyte_batch.chunk.rows": event.rows,
            "flyte_batch.chunk.failures": event.failures,
            "gen_ai.usage.input_tokens": event.prompt_tokens,
            "gen_ai.usage.output_tokens": event.response_tokens,
        }
        self._end(self._chunks, event.scope, event.at, ended)

    def _start(self, name: str, table: dict[Scope, _Open], whose: Scope, at: float, attributes: Attributes) -> _Open:
        before = contexts.get_current()
        span = self._tracer.start_span(name, before, attributes=_of_flyte(whose) | attributes, start_time=_ns(at))
        contexts.attach(trace.set_span_in_context(span, before))
        opened = table[whose] = _Open(span, before, at)
        return opened

    def _end_oldest(self, table: dict[Scope, _Open], most: int) -> None:
        """Leave so many open."""
        for whose in list(table)[: len(table) - most] if len(table) > most else ():
            table.pop(whose).give_up()

    def _end(
        self, table: dict[Scope, _Open], whose: Scope, at: float, attributes: Mapping[str, int], error: str = "",
        message: str = "",
    ) -> None:  # fmt: skip
        opened = table.pop(whose, None)
        if opened is None:
            return
        opened.span.set_attributes(attributes)
        if error:
            self._exception(opened.span, at, error, message)
            _mark_failed(opened.span, error)
        opened.end(at)

    # -- Batches and records -----------------------------------------------

    def _batch_done(self, event: BatchDone) -> None:
        self._metrics.batch_done(event)
        failed = [each for each in self._failed if each.batcher == event.batcher]
        self._failed = [each for each in self._failed if each.batcher != event.batcher]
        if not event.shares:
            return
        requests: dict[tuple[int, int, str], _Request] = {}
        for share in event.shares:
            opened = self._chunks.get(share.scope)
            span = opened.span.get_span_context() if opened is not None else share.scope.trace
            if not isinstance(span, SpanContext):
                span = trace.INVALID_SPAN_CONTEXT
            run = share.scope.run
            key = span.trace_id, span.span_id, run
            requests.setdefault(key, _Request(span, run, opened)).shares.append(share)
        traces: dict[tuple[int, str], list[_Request]] = {}
        for request in requests.values():
            traces.setdefault(request.trace, []).append(request)
            if request.opened is not None:
                request.opened.records += request.records
                request.opened.batches += 1
        for own in traces.values():
            others = (request for request in requests.values() if request.trace != own[0].trace)
            self._trace_batch(event, own, others, failed)

    def _trace_batch(
        self, event: BatchDone, own: list[_Request], others: Iterable[_Request], failed: list[RecordFailed]
    ) -> None:
        """The part of a batch that one trace has."""
        shares = [share for request in own for share in request.shares]
        sampled = [(share, latency) for share in shares for latency in self._sample.of(share)]
        main = max(own, key=lambda request: request.records)
        if main.opened is not None and main.opened.batches > self._batches_per_chunk and not sampled:
            return
        links = [request.link() for request in islice(chain(own, others), _MOST_LINKS) if request.span.is_valid]
        records = sum(request.records for request in own)
        failures = sum(request.failed for request in own)
        attributes: Attributes = {
            **_of_flyte(Scope(main.run)),
            "flyte_batch.batcher.id": event.batcher,
            "flyte_batch.batch.number": event.batch,
            "flyte_batch.batch.records": event.records,
            "flyte_batch.batch.fill": event.fill,
            "flyte_batch.records": records,
            "flyte_batch.failed": failures,
            "flyte_batch.cost": sum(share.cost for share in shares),
        }
        parent = _below(main.span)
        span = self._tracer.start_span(
            "batch", parent, attributes=attributes, links=links, start_time=_ns(event.started_at)
        )
        if failures:
            scopes = {share.scope for share in shares}
            mine = [each for each in failed if each.scope in scopes]
            for each in mine[:_MOST_EXCEPTIONS]:
                self._exception(span, each.at, each.error, each.message)
            if failures == records:
                _mark_failed(span, mine[0].error if mine else "")
        below = trace.set_span_in_context(span, Context())
        for share, latency in sampled:
            attributes = _of_chunk(share.scope.chunk, share.scope.chunk_index)
            record = self._tracer.start_span("record", below, attributes=attributes, start_time=_ns(event.at - latency))
            record.end(_ns(event.at))
        span.end(_ns(event.at))

    def _record_failed(self, event: RecordFailed) -> None:
        self._metrics.record_failed(event)
        if event.batcher:
            self._failed.append(event)  # its batch comes next
            del self._failed[:-_MOST_OPEN]
        elif event.scope in self._chunks:
            stage: Attributes = {"flyte_batch.stage": event.stage}
            self._exception(self._chunks[event.scope].span, event.at, event.error, event.message, stage)

    def _exception(self, span: Span, at: float, error: str, message: str, more: Attributes | None = None) -> None:
        attributes: Attributes = {"exception.type": error, **(more or {})}
        if message and self._message_chars:
            cut = message[: self._message_chars]
            attributes["exception.message"] = cut.encode(errors="backslashreplace").decode()  # half a surrogate pair
        span.add_event("exception", attributes, _ns(at))

    # -- Engines and the event loop ----------------------------------------

    def _engine_loaded(self, event: EngineLoaded, context: Context) -> None:
        """A span below the chunk for which it was loaded; with links to the others that waited for it."""
        opened = (each for each in list(self._chunks.values()) if each.since <= event.at)
        waiting = [each.span for each in opened if not each.batchers]
        span = self._tracer.start_span(
            "load",
            trace.set_span_in_context(waiting[0], Context()) if waiting else context,
            attributes={"flyte_batch.engine.factory": event.name, "flyte_batch.replica": scope.process_name()},
            links=[Link(each.get_span_context()) for each in waiting[1:_MOST_LINKS]],
            start_time=_ns(event.at - event.seconds),
        )
        if event.error:
            _mark_failed(span, event.error)
        span.end(_ns(event.at))

    def _engine_died(self, event: EngineDied) -> None:
        self._metrics.engine_died(event)
        for opened in list(self._chunks.values()):
            if event.batcher in opened.batchers:
                died: Attributes = {"flyte_batch.batcher.id": event.batcher, "flyte_batch.lost": event.lost}
                self._exception(opened.span, event.at, event.error, event.message, died)

    def _loop_blocked(self, event: LoopBlocked) -> None:
        self._metrics.loop_blocked(event)
        blocked: Attributes = {"flyte_batch.seconds": event.seconds, "flyte_batch.code": event.code}
        for opened in list(self._chunks.values()):
            if opened.since <= event.at:
                opened.span.add_event("flyte_batch.loop.blocked", blocked, _ns(event.at))


@dataclass(eq=False, slots=True)
class _Open:
    """A span that has not ended, and what was current before it."""

    span: Span
    before: Context
    since: float
    batchers: set[str] = field(default_factory=set)
    records: int = 0
    batches: int = 0
    propagation: AbstractContextManager[None] | None = None

    def end(self, at: float) -> None:
        if self.batches:
            self.span.set_attributes({"flyte_batch.records": self.records, "flyte_batch.batches": self.batches})
        self.span.end(_ns(at))

    def leave(self) -> None:
        """The task that this is called in is in the span no more."""
        if trace.get_current_span() is self.span:
            contexts.attach(self.before)
        if self.propagation is not None:
            self.propagation.__exit__(None, None, None)

    def give_up(self) -> None:
        """End it without having heard of its end; the task it was current in is elsewhere."""
        self.span.set_attribute("flyte_batch.unfinished", True)
        self.end(time.time())


@dataclass(eq=False, slots=True)
class _Request:
    """What one span has of a batch: a chunk's, or that of a caller outside of chunks."""

    span: SpanContext
    run: str
    opened: _Open | None
    shares: list[Share] = field(default_factory=list)

    @property
    def trace(self) -> tuple[int, str]:
        """Requests that have this in common get one span for a batch."""
        return self.span.trace_id, self.run

    @property
    def records(self) -> int:
        return sum(share.records for share in self.shares)

    @property
    def failed(self) -> int:
        return sum(share.failed for share in self.shares)

    def link(self) -> Link:
        return Link(self.span, {"flyte_batch.records": self.records})


class _Sample:
    """Picks each record with the same probability, at a cost for each picked one only."""

    def __init__(self, share: float, rng: random.Random) -> None:
        self._share = share
        self._rng = rng
        self._skip = self._draw()

    def of(self, share: Share) -> Iterator[float]:
        """The latencies of the picked records."""
        for latency, count in share.latencies:
            left = count
            while self._skip < left:
                left -= int(self._skip) + 1
                self._skip = self._draw()
                yield latency
            self._skip -= left

    def _draw(self) -> float:
        """How many records to pass over before the next one."""
        if self._share in (0, 1):
            return 0 if self._share else math.inf
        return math.floor(math.log(1 - self._rng.random()) / math.log(1 - self._share))


class _Metrics:
    """Instruments for some of `flyte_batch.monitoring.metrics`.

    Where a collector gives them to Prometheus, they get the names and labels that Prometheus' own backend has, so that
    the same dashboards show them: ``flyte_batch.rows`` becomes ``flyte_batch_rows_total``. Only the device's seconds
    have one label more, the batcher's id.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        meter = self._meter = get_meter("flyte_batch", flyte_batch.__version__, provider)
        self._closed = False
        self._engines: dict[str, str] = {}  # of batchers, by id
        self._device_s: dict[tuple[str, str], float] = {}  # as told last
        self._causes: set[str] = set()
        self._rows = self._counter(metrics.ROWS)
        self._row_failures = self._counter(metrics.ROW_FAILURES)
        self._tokens = self._counter(metrics.TOKENS)
        self._chunks = self._counter(metrics.CHUNKS)
        self._chunk_s = self._histogram(metrics.CHUNK_SECONDS)
        self._records = self._counter(metrics.RECORDS)
        self._record_failures = self._counter(metrics.RECORD_FAILURES)
        self._latency_s = self._histogram(metrics.RECORD_LATENCY)
        self._batch_records = self._histogram(metrics.BATCH_RECORDS)
        self._batch_s = self._histogram(metrics.BATCH_SECONDS)
        self._deaths = self._counter(metrics.ENGINE_DEATHS)
        self._loop_blocked_s = self._histogram(metrics.LOOP_BLOCKED)
        meter.create_observable_gauge(
            _name(metrics.RECORDS_QUEUED), [self._queued], description=metrics.RECORDS_QUEUED.help
        )
        meter.create_observable_counter(_name(metrics.DEVICE_SECONDS), [self._device], "s", metrics.DEVICE_SECONDS.help)

    def close(self) -> None:
        """Ask batchers no more: OpenTelemetry does not let go of instruments."""
        self._closed = True

    def engine_started(self, event: EngineStarted) -> None:
        if len(self._engines) >= _MOST_OPEN:
            del self._engines[next(iter(self._engines))]
        self._engines[event.batcher] = event.engine

    def batch_done(self, event: BatchDone) -> None:
        engine = {"engine": self._engine_of(event.batcher)}
        self._batch_records.record(event.records, engine)
        self._batch_s.record(max(0.0, event.at - event.started_at), engine)
        records = sum(share.records for share in event.shares)
        failed = sum(share.failed for share in event.shares)
        lost = sum(share.lost for share in event.shares)
        for number, outcome in ((records - failed, _OK), (failed - lost, _FAILED), (lost, _LOST)):
            if number:
                self._records.add(number, engine | outcome)
        callers = {caller: engine | {"caller": caller} for caller in ("chunk", "direct")}
        for caller, latency in _evenly_picked(event.shares, records):
            self._latency_s.record(latency, callers[caller])

    def record_failed(self, event: RecordFailed) -> None:
        self._record_failures.add(1, {"stage": event.stage, "cause": counted_as(event.error, self._causes)})

    def chunk_done(self, event: ChunkDone) -> None:
        self._chunks.add(1, {"outcome": "done"})
        self._chunk_s.record(event.seconds)
        self._rows.add(event.rows - event.failures, _OK)
        self._rows.add(event.failures, _FAILED)
        for cause, rows in event.causes.items():
            self._row_failures.add(rows, {"cause": counted_as(cause, self._causes)})
        self._tokens.add(event.prompt_tokens, {"kind": "prompt"})
        self._tokens.add(event.response_tokens, {"kind": "response"})

    def chunk_failed(self) -> None:
        self._chunks.add(1, _FAILED)

    def engine_died(self, event: EngineDied) -> None:
        engine = {"engine": event.engine}
        self._deaths.add(1, engine)
        self._records.add(event.lost, engine | _LOST)

    def loop_blocked(self, event: LoopBlocked) -> None:
        self._loop_blocked_s.record(event.seconds)

    def _engine_of(self, batcher: str) -> str:
        if batcher not in self._engines:  # it started before anybody listened
            self._engines |= {each.id: each.engine_name for each in hooks.live_batchers()}
        return self._engines.get(batcher, "unknown")

    def _queued(self, _: CallbackOptions) -> Iterator[Observation]:
        queued: Counter[str] = Counter()
        for batcher in self._batchers():
            queued[batcher.engine_name] += batcher.stats.queued
        for engine, records in queued.items():
            yield Observation(records, {"engine": engine})

    def _device(self, _: CallbackOptions) -> Iterator[Observation]:
        """Seconds by batcher, as those of batchers that are gone would be missing from a sum over engines."""
        batchers = self._batchers()
        alive = {batcher.id for batcher in batchers}
        told = self._device_s = {key: seconds for key, seconds in self._device_s.items() if key[0] in alive}
        for batcher in batchers:
            stats = batcher.stats
            for state in ("busy", "starved", "assembling", "late"):
                # Busy seconds may turn out to have been late ones, but a counter only grows.
                seconds = max(getattr(stats, f"{state}_time_s"), told.get((batcher.id, state), 0.0))
                told[batcher.id, state] = seconds
                attributes = {"engine": batcher.engine_name, "state": state, "batcher": batcher.id}
                yield Observation(seconds, attributes)

    def _batchers(self) -> list[hooks.Batcher]:
        return [] if self._closed else hooks.live_batchers()

    def _counter(self, metric: Metric) -> metrics_api.Counter:
        return self._meter.create_counter(_name(metric), "s" if metric.unit else "", metric.help)

    def _histogram(self, metric: Metric) -> metrics_api.Histogram:
        return self._meter.create_histogram(
            _name(metric), "s" if metric.unit else "", metric.help,
            explicit_bucket_boundaries_advisory=metric.buckets,
        )  # fmt: skip


_OK = {"outcome": "ok"}
_FAILED = {"outcome": "failed"}
_LOST = {"outcome": "lost"}


def _name(metric: Metric) -> str:
    """Without what a collector adds for Prometheus: the unit, and ``_total``."""
    return "flyte_batch." + metric.name.removeprefix("flyte_batch_").removesuffix("_total").removesuffix("_seconds")


def _evenly_picked(shares: Iterable[Share], records: int) -> Iterator[tuple[str, float]]:
    """Kind of caller and latency of at most `_MOST_LATENCIES` of the records, every n-th of them."""
    step = max(1.0, records / _MOST_LATENCIES)
    due, seen = step / 2, 0
    for share in shares:
        caller = "chunk" if share.scope.chunk else "direct"
        for latency, count in share.latencies:
            seen += count
            while due <= seen:
                yield caller, latency
                due += step


def _below(span: SpanContext) -> Context:
    """A context for children of this span; for spans without a parent if there is none."""
    return trace.set_span_in_context(NonRecordingSpan(span), Context()) if span.is_valid else Context()


def _of_flyte(whose: Scope) -> Attributes:
    found = {"flyte.run_name": whose.run, "flyte.action_name": whose.action}
    return {name: value for name, value in found.items() if value}


def _of_chunk(chunk: str, index: int | None) -> Attributes:
    attributes: Attributes = {"flyte_batch.chunk.id": chunk} if chunk else {}
    return attributes if index is None else attributes | {"flyte_batch.chunk.index": index}


def _mark_failed(span: Span, error: str) -> None:
    if error:
        span.set_attribute("error.type", error)
    span.set_status(StatusCode.ERROR, error or None)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
