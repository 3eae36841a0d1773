"""Prometheus: what happens as metrics, served to be scraped or pushed to a gateway.

What batchers count themselves (records, seconds of the device, the queue) is read from them when somebody scrapes, and
costs nothing until then. The rest is counted event by event.
"""

from __future__ import annotations

import abc
import logging
import platform
import threading
import weakref
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit
from wsgiref.simple_server import WSGIServer
from wsgiref.types import WSGIApplication

from prometheus_client import REGISTRY, CollectorRegistry, push_to_gateway, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import basic_auth_handler, default_handler
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

import flyte_batch
from flyte_batch.errors import BadInput, counted_as
from flyte_batch.monitoring import events as ev
from flyte_batch.monitoring import gpu, hooks, metrics
from flyte_batch.monitoring.metrics import Metric
from flyte_batch.monitoring.scope import process_name

logger = logging.getLogger(__name__)

Labels = tuple[str, ...]

PUSH_TIMEOUT_S = 10.0

_FROM_STATS: tuple[tuple[Metric, Labels, Callable[[hooks.Stats], float]], ...] = (
    (metrics.RECORDS_SUBMITTED, (), lambda stats: stats.total_submitted),
    (metrics.RECORDS, ("ok",), lambda stats: stats.total_completed - stats.total_failed),
    (metrics.RECORDS, ("failed",), lambda stats: stats.total_failed - stats.total_lost),
    (metrics.RECORDS, ("lost",), lambda stats: stats.total_lost),
    (metrics.RECORDS, ("abandoned",), lambda stats: stats.total_abandoned),
    (metrics.RECORDS_EXPIRED, (), lambda stats: stats.total_expired),
    (metrics.OUT_OF_MEMORY, (), lambda stats: stats.out_of_memory),
    (metrics.DEVICE_SECONDS, ("busy",), lambda stats: stats.busy_time_s),
    (metrics.DEVICE_SECONDS, ("starved",), lambda stats: stats.starved_time_s),
    (metrics.DEVICE_SECONDS, ("assembling",), lambda stats: stats.assembling_time_s),
    (metrics.DEVICE_SECONDS, ("late",), lambda stats: stats.late_time_s),
)
"""Counters that are a batcher's own: metric, labels beside the engine, its value in a `flyte_batch.BatchStats`."""

_FROM_GPUS: tuple[tuple[Metric, Callable[[gpu.GpuSample], float | None]], ...] = (
    (metrics.GPU_UTILIZATION, lambda sample: sample.utilization),
    (metrics.GPU_MEMORY_USED, lambda sample: sample.memory_used_bytes),
    (metrics.GPU_MEMORY_SIZE, lambda sample: sample.memory_total_bytes),
    (metrics.GPU_POWER, lambda sample: sample.power_w),
    (metrics.GPU_TEMPERATURE, lambda sample: sample.temperature_c),
    (metrics.GPU_ENERGY, lambda sample: sample.energy_j),
)


class _Histogram:
    """Values in buckets; n equal ones cost what one does."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = tuple(map(float, bounds))  # of one type they compare quicker
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Iterable[tuple[float, int]]) -> None:
        """Each value so many times."""
        bounds, counts, total = self._bounds, self.counts, self.total
        for value, times in values:
            counts[bisect_left(bounds, value)] += times
            total += value * times
        self.total = total


class _Counts:
    """What was counted so far, by metric and labels."""

    def __init__(self) -> None:
        self.values: dict[Metric, defaultdict[Labels, float]] = {
            metric: defaultdict(float) for metric in metrics.METRICS if metric.kind != "histogram"
        }
        self.histograms: dict[Metric, dict[Labels, _Histogram]] = {
            metric: {} for metric in metrics.METRICS if metric.kind == "histogram"
        }

    def add(self, metric: Metric, *labels: str, number: float = 1) -> None:
        self.values[metric][labels] += number

    def histogram(self, metric: Metric, *labels: str) -> _Histogram:
        found = self.histograms[metric].get(labels)
        if found is None:
            found = self.histograms[metric][labels] = _Histogram(metric.buckets)
        return found

    def copy(self) -> _Counts:
        copied = _Counts()
        for metric, values in self.values.items():
            copied.values[metric].update(values)
        for metric, histograms in self.histograms.items():
            for labels, histogram in histograms.items():
                copied.histogram(metric, *labels).counts[:] = histogram.counts
                copied.histogram(metric, *labels).total = histogram.total
        return copied


class _Batcher:
    """A batcher that is not known to have ended.

    Attributes:
        engine: class of its engine.
        stats: at the last scrape; None before the first.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.stats: Any = None


class _Run:
    """A run as its driver sees it.

    Attributes:
        rows: of the whole output.
        done: of the parts that are committed.
        failed: those without a response that this run committed.
        is_over: whether it ended.
    """

    def __init__(self, rows: int, done: int) -> None:
        self.rows = rows
        self.done = done
        self.failed = 0
        self.is_over = False


class PrometheusHook(Collector):
    """Counts what happens. A `flyte_batch.monitoring.hooks.Hook`, and a collector of ``prometheus_client``.

    Args:
        registry: where the metrics appear; None takes the process' usual one, in which vLLM's are, too.

    Raises:
        BadInput: the registry has such a hook already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._causes: set[str] = set()
        self._chunks: set[ev.Scope] = set()
        self._runs: dict[ev.Scope, _Run] = {}
        self._batchers: dict[str, _Batcher] = {}
        self._ended: dict[str, Any] = {}  # engine -> stats of the batchers that are no more, added up
        self._told: dict[tuple[Metric, Labels], float] = {}  # counters of `_FROM_STATS` at the last scrape
        self._last_stats: deque[tuple[str, hooks.Stats]] = (
            deque()
        )  # of batchers that went; appended to by the garbage collector
        self._handlers: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.BatchDone: self._batch_done,
            ev.RecordFailed: self._record_failed,
            ev.ChunkStarted: self._chunk_started,
            ev.ChunkDone: self._chunk_done,
            ev.ChunkFailed: self._chunk_failed,
            ev.EngineLoading: self._engine_loading,
            ev.EngineLoaded: self._engine_loaded,
            ev.EngineStarted: self._engine_started,
            ev.EngineDied: self._engine_died,
            ev.LoopBlocked: self._loop_blocked,
            ev.RunStarted: self._run_started,
            ev.ChunkReported: self._chunk_reported,
            ev.RunEnded: self._run_ended,
        }
        self._begin()
        self._registry = REGISTRY if registry is None else registry
        try:
            self._registry.register(self)
        except ValueError as error:
            raise BadInput("the registry has a PrometheusHook already: use that, or another registry") from error

    def close(self) -> None:
        """Take the metrics out of the registry."""
        self._registry.unregister(self)

    def _begin(self) -> None:
        """Begin at 0 where the labels are known: a rate misses the first count of a series that begins with it."""
        for metric, values in (
            (metrics.ROWS, ("ok", "failed")),
            (metrics.TOKENS, ("prompt", "response")),
            (metrics.CHUNKS, ("done", "failed")),
            (metrics.RUNS, ("done", "failed")),
        ):
            for value in values:
                self._counts.add(metric, value, number=0)
        self._counts.add(metrics.ENGINES_LOADING, number=0)
        self._counts.histogram(metrics.LOOP_BLOCKED)
        self._counts.histogram(metrics.CHUNK_SECONDS)
        self._counts.add(metrics.BUILD_INFO, flyte_batch.__version__, platform.python_version())

    # -- Events --------------------------------------------------------------

    def on_event(self, event: ev.Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            with self._lock:
                handler(event)

    def _batch_done(self, event: ev.BatchDone) -> None:
        engine = self._engine_of(event.batcher)
        counts = self._counts
        outcome = "split" if not event.shares else "failed" if event.failed == event.records else "ok"
        counts.add(metrics.BATCHES, engine, outcome)
        counts.histogram(metrics.BATCH_RECORDS, engine).observe(event.records)
        counts.histogram(metrics.BATCH_FILL, engine).observe(event.fill)
        counts.histogram(metrics.BATCH_SECONDS, engine).observe(max(0.0, event.at - event.started_at))
        for share in event.shares:
            caller = "chunk" if share.scope.chunk else "direct"
            counts.histogram(metrics.RECORD_LATENCY, engine, caller).observe_all(share.latencies)

    def _record_failed(self, event: ev.RecordFailed) -> None:
        self._counts.add(metrics.RECORD_FAILURES, event.stage, counted_as(event.error, self._causes))

    def _chunk_started(self, event: ev.ChunkStarted) -> None:
        self._chunks.add(event.scope)

    def _chunk_done(self, event: ev.ChunkDone) -> None:
        self._chunks.discard(event.scope)
        counts = self._counts
        counts.add(metrics.CHUNKS, "done")
        counts.histogram(metrics.CHUNK_SECONDS).observe(event.seconds)
        counts.add(metrics.ROWS, "ok", number=event.rows - event.failures)
        counts.add(metrics.ROWS, "failed", number=event.failures)
        for cause, rows in event.causes.items():
            counts.add(metrics.ROW_FAILURES, counted_as(cause, self._causes), number=rows)
        counts.add(metrics.TOKENS, "prompt", number=event.prompt_tokens)
        counts.add(metrics.TOKENS, "response", number=event.response_tokens)

    def _chunk_failed(self, event: ev.ChunkFailed) -> None:
        self._chunks.discard(event.scope)
        self._counts.add(metrics.CHUNKS, "failed")

    def _engine_loading(self, event: ev.EngineLoading) -> None:
        self._counts.add(metrics.ENGINES_LOADING)

    def _engine_loaded(self, event: ev.EngineLoaded) -> None:
        self._counts.add(metrics.ENGINES_LOADING, number=-1)
        self._counts.histogram(metrics.ENGINE_LOAD_SECONDS, "failed" if event.error else "ok").observe(event.seconds)

    def _engine_started(self, event: ev.EngineStarted) -> None:
        self._find_batchers()
        self._counts.add(metrics.ENGINE_STARTS, event.engine)
        self._counts.add(metrics.ENGINE_DEATHS, event.engine, number=0)

    def _engine_died(self, event: ev.EngineDied) -> None:
        self._counts.add(metrics.ENGINE_DEATHS, event.engine)

    def _loop_blocked(self, event: ev.LoopBlocked) -> None:
        self._counts.histogram(metrics.LOOP_BLOCKED).observe(event.seconds)

    def _run_started(self, event: ev.RunStarted) -> None:
        self._runs = {scope: run for scope, run in self._runs.items() if not run.is_over}
        self._runs[event.scope] = _Run(event.rows, event.rows_reused)

    def _chunk_reported(self, event: ev.ChunkReported) -> None:
        run = self._runs.get(event.scope)
        if run is not None and not event.error:
            run.done += event.rows
            run.failed += event.failures

    def _run_ended(self, event: ev.RunEnded) -> None:
        self._counts.add(metrics.RUNS, "failed" if event.error else "done")
        run = self._runs.get(event.scope)
        if run is not None:
            run.is_over = True

    # -- Batchers ------------------------------------------------------------

    def _engine_of(self, batcher: str) -> str:
        """Class of a batcher's engine."""
        if batcher not in self._batchers:
            self._find_batchers()
        known = self._batchers.get(batcher)
        return known.engine if known is not None else "unknown"

    def _find_batchers(self) -> None:
        """Know the batchers that are alive; of each its last figures will be had, without keeping it."""
        for batcher in hooks.live_batchers():
            if batcher.id not in self._batchers:
                self._batchers[batcher.id] = _Batcher(batcher.engine_name)
                last = weakref.finalize(batcher, _bury, batcher.id, batcher.stats_source, self._last_stats)
                last.atexit = False

    def _read_batchers(self, alive: list[hooks.Batcher], into: _Counts) -> None:
        self._find_batchers()
        for batcher in alive:
            known, stats = self._batchers[batcher.id], batcher.stats
            known.stats = stats
            into.add(metrics.RECORDS_QUEUED, known.engine, number=stats.queued)
            into.add(metrics.RECORDS_RUNNING, known.engine, number=stats.running)
            into.add(metrics.BATCHERS_RUNNING, known.engine, number=batcher.is_running)
        while self._last_stats:
            batcher_id, stats = self._last_stats.popleft()
            engine = self._batchers.pop(batcher_id).engine
            self._ended[engine] = self._ended.get(engine, 0) + stats
        totals = dict(self._ended)
        for known in self._batchers.values():
            if known.stats is not None:  # of one that is just being taken apart what it said last
                totals[known.engine] = totals.get(known.engine, 0) + known.stats
        for engine, total in totals.items():
            for gauge in (metrics.RECORDS_QUEUED, metrics.RECORDS_RUNNING, metrics.BATCHERS_RUNNING):
                into.add(gauge, engine, number=0)
            for metric, labels, value in _FROM_STATS:
                # Never less than before: busy seconds may turn out to have been late ones, but a counter only grows.
                key = metric, (engine, *labels)
                self._told[key] = max(self._told.get(key, 0), value(total))
                into.add(metric, engine, *labels, number=self._told[key])

    # -- Scrapes -------------------------------------------------------------

    def describe(self) -> Iterator[Family]:
        """The metrics without values; a registry asks for their names."""
        return map(_family, metrics.METRICS)

    def collect(self) -> Iterator[Family]:
        """The metrics at this moment, all of one moment."""
        alive = hooks.live_batchers()  # kept until the lock is free: the end of one that is let go here may take long
        with self._lock:
            counts = self._counts.copy()
            self._read_batchers(alive, counts)
            runs = list(self._runs.values())
            counts.add(metrics.CHUNKS_RUNNING, number=len(self._chunks))
            counts.add(metrics.RUNS_RUNNING, number=sum(not run.is_over for run in runs))
            counts.add(metrics.RUN_ROWS, number=sum(run.rows for run in runs))
            counts.add(metrics.RUN_ROWS_DONE, number=sum(run.done for run in runs))
            counts.add(metrics.RUN_ROWS_FAILED, number=sum(run.failed for run in runs))
        for sample in gpu.latest():
            for metric, value in _FROM_GPUS:
                if (number := value(sample)) is not None:
                    counts.add(metric, str(sample.index), sample.name, number=number)
        for metric in metrics.METRICS:
            family = _family(metric)
            if isinstance(family, HistogramMetricFamily):
                for labels, histogram in counts.histograms[metric].items():
                    family.add_metric(labels, _cumulative(metric, histogram), histogram.total)
            else:
                for labels, number in counts.values[metric].items():
                    family.add_metric(labels, number)
            yield family


def _bury(batcher: str, stats_source: Callable[[], hooks.Stats], last_stats: deque[tuple[str, hooks.Stats]]) -> None:
    """Keep the last figures of a batcher. Runs wherever the garbage collector does, so it takes no lock."""
    last_stats.append((batcher, stats_source()))


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    if metric.kind == "histogram":
        return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name, metric.help, labels=metric.labels)


def _cumulative(metric: Metric, histogram: _Histogram) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip((*metric.buckets, float("inf")), histogram.counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
    return buckets


class _Closing(abc.ABC):
    """Something that `close` ends, also at the end of ``with``."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Server(_Closing):
    """Serves metrics over HTTP until it is closed. Made by `serve`.

    Attributes:
        port: where.
    """

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port = server.server_port

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(port: int, host: str = "127.0.0.1", *, registry: CollectorRegistry = REGISTRY) -> Server:
    """Serve metrics to be scraped, from a thread: it answers while the event loop is blocked, too.

    Whoever reaches the port can read them; there are no texts of records among them.

    Args:
        port: 0 for any free one.
        host: address to listen at. A server elsewhere reaches ``0.0.0.0``, all of the machine's.
        registry: whose metrics.

    Raises:
        OSError: nothing can listen there; another process has the port, say.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise OSError(f"metrics can't be served at {host}:{port} ({error}): give another port, or 0 for any") from error
    if (app := server.get_app()) is not None:
        server.set_app(_text_only(app))
    return Server(server, thread)


def _text_only(app: WSGIApplication) -> WSGIApplication:
    """Answer in Prometheus' text format, whatever is asked for.

    In OpenMetrics ``prometheus_client`` turns the colon of vLLM's names into an underscore, so that nobody's dashboard
    finds them: https://github.com/prometheus/client_python/issues/1177
    """

    def answer(environment: dict[str, Any], start_response: Any) -> Any:
        environment.pop("HTTP_ACCEPT", None)
        return app(environment, start_response)

    return answer


class Pusher(_Closing):
    """Pushes metrics to a gateway until it is closed. Made by `push`."""

    def __init__(self, gateway_url: str, every_s: float, job: str, registry: CollectorRegistry) -> None:
        self.gateway, self._handler = _gateway(gateway_url)
        self._every_s = every_s
        self._job = job
        self._registry = registry
        self._is_away = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._push_often, name="flyte-batch-push", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Push once more, and then no more."""
        self._closed.set()
        self._thread.join(2 * PUSH_TIMEOUT_S)

    def _push_often(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closed.wait(self._every_s)
            self._push()

    def _push(self) -> None:
        try:
            push_to_gateway(
                self.gateway,
                self._job,
                self._registry,
                grouping_key={"instance": process_name()},
                timeout=PUSH_TIMEOUT_S,
                handler=self._handler,
            )
        except Exception as error:
            if not self._is_away:
                logger.warning("metrics can't be pushed to %s, which is tried again: %s", self.gateway, error)
            self._is_away = True
        else:
            if self._is_away:
                logger.info("metrics are pushed to %s again", self.gateway)
            self._is_away = False


def push(
    gateway_url: str, every_s: float = 15.0, *, job: str = "flyte_batch", registry: CollectorRegistry = REGISTRY
) -> Pusher:
    """Push metrics to a Pushgateway, from a thread, for processes that nobody can scrape.

    The gateway keeps what a process pushed last, under its name as ``instance``, until somebody deletes it there. One
    that is away breaks nothing: it is a warning, once, and tried again.

    Args:
        gateway_url: such as ``http://user:password@gateway:9091``; what is before the ``@`` is never logged.
        every_s: seconds between two pushes.
        job: value of the label ``job``.
        registry: whose metrics.

    Raises:
        BadInput: the URL is none of a gateway, or ``every_s`` is not positive.
    """
    if not every_s > 0:
        raise BadInput(f"every_s must be a positive number of seconds, got {every_s!r}")
    return Pusher(gateway_url, every_s, job, registry)


def _gateway(url: str) -> tuple[str, Callable[..., Callable[[], None]]]:
    """A gateway's URL without credentials, and what sends to it with them.

    Raises:
        BadInput: it is none. The message does not repeat it, for it may hold a password.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise BadInput(
            "the gateway's URL can't be used: write http://HOST:PORT or https://USER:PASSWORD@HOST:PORT, with special "
            "characters of user and password percent-encoded"
        )
    gateway = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    if parts.username is None:
        return gateway, default_handler
    user, password = unquote(parts.username), unquote(parts.password or "")
    return gateway, partial(basic_auth_handler, username=user, password=password)
