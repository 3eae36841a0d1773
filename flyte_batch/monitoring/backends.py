"""Which backends a process has: the environment variable ``FLYTE_BATCH_MONITORING`` names them.

A comma-separated list; `flyte_batch.replica_environment` and `driver_environment` set it for their containers, a shell
sets it for local runs:

- ``logs``: a JSON line an event, on standard error; ``logs:debug`` also for submitted records and for batches.
- ``prometheus``, ``prometheus:9464``, ``prometheus:0.0.0.0:9464``: metrics to be scraped, by default on loopback.
- ``push:http://gateway:9091``: the same metrics, pushed to a Pushgateway.
- ``otel``: spans and metrics through the global OpenTelemetry providers. Where the program has set none, they are those
  of ``flyteplugins-otel`` and of OpenTelemetry's SDK, which send to ``OTEL_EXPORTER_OTLP_ENDPOINT``.

One entry is no backend: ``message_chars:0`` leaves messages of errors out of logs and spans, another number cuts them.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from flyte_batch.errors import MESSAGE_CHARS, BadInput
from flyte_batch.monitoring import hooks

VARIABLE = "FLYTE_BATCH_MONITORING"
DEFAULT_PORT = 9464
"""Of OpenTelemetry's Prometheus exporter; nobody else's."""

METRICS_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Variables of OpenTelemetry's SDK that say where metrics go; the first that is set does."""
OTLP_ENDPOINTS = (*METRICS_ENDPOINTS, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Those that say where metrics and spans go."""

LAST_S = 5.0
"""How long the end of a process waits for those who take its last spans and metrics, all of them together."""

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_attached = False
_is_ending = threading.Event()
_endings: dict[str, threading.Thread] = {}


def named(value: str) -> list[str]:
    """The backends that a value of the variable names, each once; ``logs:debug`` has all that ``logs`` has."""
    names = [entry for entry in _entries(value) if not _is_of_messages(entry)]
    return [name for name in names if name != "logs" or "logs:debug" not in names]


def _entries(value: str) -> list[str]:
    return list(dict.fromkeys(entry for each in value.split(",") if (entry := each.strip())))


def _is_of_messages(entry: str) -> bool:
    """Meant to be, however it is written: a slip must not quote what somebody wanted to be left out."""
    return re.match(r"\W*message", entry, re.IGNORECASE) is not None


def _message_chars(value: str) -> int:
    """To how many characters logs and spans cut messages of errors.

    Raises:
        BadInput: no number, or several.
    """
    given = [entry for entry in _entries(value) if _is_of_messages(entry)]
    if not given:
        return MESSAGE_CHARS
    name, _, number = given[0].partition(":")
    if len(given) > 1 or name != "message_chars" or not re.fullmatch("[0-9]{1,9}", number):
        raise BadInput(
            f"monitoring: {','.join(given)!r} must be one number of characters, as in message_chars:0, which leaves "
            "messages of errors out of logs and spans"
        )
    return int(number)


def _of_this_process() -> str:
    return os.environ.get(VARIABLE, "")


def check_backends(given: Sequence[str] | str) -> str:
    """The variable's value for these backends, given as a list or as that value.

    Raises:
        BadInput: one that there is not, an address that is none, or ``message_chars`` without a number.
    """
    value = given if isinstance(given, str) else ",".join(given)
    message_chars, names = _message_chars(value), named(value)
    for name in names:
        _attacher(name, message_chars)
    return ",".join([*names, *filter(_is_of_messages, _entries(value))])


def start_tracing() -> None:
    """If ``otel`` is named, let Flyte's tasks have spans; called before one begins, as its span is opened first."""
    if "otel" not in named(_of_this_process()):
        return
    try:
        from flyteplugins import otel
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        return  # `attach_backends` says so
    before = trace.get_tracer_provider()
    otel.init(service_name=os.environ.get("OTEL_SERVICE_NAME", "flyte_batch"))
    provider = trace.get_tracer_provider()
    if provider is not before and isinstance(provider, TracerProvider):
        atexit.unregister(provider.shutdown)
        _at_end("spans for OpenTelemetry", provider.shutdown)


def attach_backends() -> None:
    """Attach what the environment variable names, once a process; what can't be attached is a warning, no error."""
    global _attached
    with _lock:
        if _attached:
            return
        _attached = True
    value = _of_this_process()
    try:
        message_chars = _message_chars(value)
    except BadInput as error:
        logger.warning("messages of errors are left out: %s", error)
        message_chars = 0  # somebody wanted less of them: nothing may be quoted by mistake
    for name in named(value):
        try:
            _attacher(name, message_chars)()
        except ImportError as error:
            logger.warning(
                "monitoring: %s is off, because %s can't be imported: install flyte-batch with the extra monitoring",
                name.partition(":")[0], error.name,
            )  # fmt: skip
        except Exception as error:  # of a library or the system: no reason to lose a run
            # A BadInput says by itself which one it is.
            what = "one backend" if isinstance(error, BadInput) else "monitoring: " + name.partition(":")[0]
            logger.warning("%s is off: %s", what, error)


def _at_end(what: str, send: Callable[[], object]) -> None:
    """Call ``send`` when the process ends, on a thread: what one does not take holds up no other.

    The thread waits from now on, because an interpreter that ends may start none. Hooks that are made later are closed
    before.
    """

    def wait() -> None:
        _is_ending.wait()
        send()

    if not _endings:
        atexit.register(_end)
    _endings[what] = threading.Thread(target=wait, name="flyte-batch-end", daemon=True)
    _endings[what].start()


def _end() -> None:
    """Have everything sent that `_at_end` was told of, and wait `LAST_S` at most."""
    _is_ending.set()
    deadline = time.monotonic() + LAST_S
    for thread in _endings.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [what for what, thread in _endings.items() if thread.is_alive()]
    if late:
        logger.warning("not taken within %g s, and lost, as the process ends: the last %s", LAST_S, ", ".join(late))


def _attacher(name: str, message_chars: int) -> Callable[[], None]:
    """What attaches a backend."""
    kind, _, rest = name.partition(":")
    if kind == "logs" and rest in ("", "debug"):
        return lambda: _logs("debug" if rest else "info", message_chars)
    if kind == "otel" and not rest:
        return lambda: _otel(message_chars)
    if kind == "prometheus":
        host, _, port = rest.rpartition(":")
        if not rest or port.isdecimal():
            return lambda: _prometheus(host or "127.0.0.1", int(port or DEFAULT_PORT))
    if kind == "push" and "@" in rest:
        raise BadInput("monitoring: the push gateway's address holds a user or a password, which would be seen by many")
    if kind == "push" and rest.startswith(("http://", "https://")):
        return lambda: _push(rest)
    raise BadInput(
        f"monitoring: {name!r} is no backend; there are logs, logs:debug, otel, prometheus, prometheus:PORT, "
        "prometheus:HOST:PORT and push:http://GATEWAY, and message_chars:NUMBER beside them"
    )


def _logs(level: Literal["info", "debug"], message_chars: int) -> None:
    from flyte_batch.monitoring.json_logs import JsonLogs

    hooks.subscribe(JsonLogs(level=level, message_chars=message_chars))


@functools.cache
def _metrics() -> None:
    from flyte_batch.monitoring.prometheus import PrometheusHook

    hooks.subscribe(PrometheusHook())


def _prometheus(host: str, port: int) -> None:
    from flyte_batch.monitoring.prometheus import serve

    _metrics()
    serve(port, host)


def _push(gateway: str) -> None:
    from flyte_batch.monitoring.prometheus import push

    _metrics()
    _at_end(f"metrics for {gateway}", push(gateway).close)


def _otel(message_chars: int) -> None:
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    from flyte_batch.monitoring.otel import OtelHook

    start_tracing()
    if not isinstance(metrics.get_meter_provider(), MeterProvider) and any(map(os.environ.get, METRICS_ENDPOINTS)):
        provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], shutdown_on_exit=False)
        metrics.set_meter_provider(provider)
        _at_end("metrics for OpenTelemetry", provider.shutdown)
    hooks.subscribe(OtelHook(message_chars=message_chars))
