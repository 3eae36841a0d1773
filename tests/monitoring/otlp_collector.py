"""An OpenTelemetry collector in this process: takes OTLP over HTTP, and keeps what it decoded."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from flyte_batch.monitoring import hooks
from flyte_batch.monitoring.otel import OtelHook


@dataclass(frozen=True)
class Event:
    name: str
    at: float
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Link:
    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A span as it came over the wire; times in seconds, ids in hexadecimal, ``parent_id`` "" for roots."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[Event]
    links: list[Link]
    failed: bool
    message: str
    library: str


@dataclass(frozen=True)
class Point:
    """A data point of a metric: a number, or a histogram's count, sum and buckets."""

    name: str
    unit: str
    attributes: dict[str, Any]
    value: float = 0
    count: int = 0
    bounds: tuple[float, ...] = ()
    is_counter: bool = False


@dataclass
class Collector:
    """What was received.

    Attributes:
        url: the base address, for exporters.
    """

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    latest: dict[tuple[str, frozenset[tuple[str, Any]]], Point] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """Of metrics, as they were exported last."""
        return list(self.latest.values())

    def named(self, name: str, trace_id: str | None = None) -> list[Span]:
        return [span for span in self.spans if span.name == name and trace_id in (None, span.trace_id)]

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span

    def by_id(self) -> dict[str, Span]:
        return {span.span_id: span for span in self.spans}

    def path(self, span: Span) -> list[str]:
        """Names from the root to this span; every parent must be there, in the same trace."""
        names = [span.name]
        known = self.by_id()
        while span.parent_id:
            parent = known[span.parent_id]
            assert parent.trace_id == span.trace_id
            span = parent
            names.insert(0, span.name)
        return names

    def metric(self, name: str, **attributes: str) -> list[Point]:
        """Points of a metric that have these attributes."""
        return [point for point in self.points if point.name == name and attributes.items() <= point.attributes.items()]

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            traces = ExportTraceServiceRequest.FromString(body)
            for resource in traces.resource_spans:
                for library in resource.scope_spans:
                    self.spans += [_span(each, library.scope.name) for each in library.spans]
        elif path == "/v1/metrics":
            metrics = ExportMetricsServiceRequest.FromString(body)
            for of_resource in metrics.resource_metrics:
                for of_library in of_resource.scope_metrics:
                    for metric in of_library.metrics:
                        for point in _points(metric):
                            self.latest[point.name, frozenset(point.attributes.items())] = point


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on loopback."""
    collector = Collector()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with lock:
                collector.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _span(span: Any, library: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span.attributes),
        events=[Event(each.name, each.time_unix_nano / 1e9, _attributes(each.attributes)) for each in span.events],
        links=[Link(each.trace_id.hex(), each.span_id.hex(), _attributes(each.attributes)) for each in span.links],
        failed=span.status.code == Status.StatusCode.STATUS_CODE_ERROR,
        message=span.status.message,
        library=library,
    )


def _points(metric: Any) -> list[Point]:
    kind = metric.WhichOneof("data")
    points = []
    for point in getattr(metric, kind).data_points:
        own: dict[str, Any] = (
            {"count": point.count, "value": point.sum, "bounds": tuple(point.explicit_bounds)}
            if kind == "histogram"
            else {"value": point.as_double or point.as_int, "is_counter": kind == "sum" and metric.sum.is_monotonic}
        )
        points.append(Point(metric.name, metric.unit, _attributes(point.attributes), **own))
    return points


class Heard(logging.Handler):
    """Remembers what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@contextmanager
def tracing(**options: Any) -> Iterator[tuple[Collector, TracerProvider]]:
    """An `OtelHook` that hears all events, its spans and metrics on their way to a collector by the real exporters."""
    with collecting() as collector:
        tracer_provider = TracerProvider()
        exporter = OTLPSpanExporter(f"{collector.url}/v1/traces", compression=Compression.Gzip)
        tracer_provider.add_span_processor(BatchSpanProcessor(exporter))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{collector.url}/v1/metrics"), 3_600_000)
        meter_provider = MeterProvider([reader])
        hook = OtelHook(tracer_provider, meter_provider, **options)
        unsubscribe = hooks.subscribe(hook)
        heard = Heard()
        logger = logging.getLogger("flyte_batch.monitoring")
        logger.addHandler(heard)
        try:
            yield collector, tracer_provider
        finally:
            unsubscribe()
            meter_provider.force_flush()  # what is asked of batchers
            hook.close()
            meter_provider.shutdown()
            tracer_provider.shutdown()
            logger.removeHandler(heard)
        assert heard.messages == [], "a hook failed, which nobody else hears of"
