"""The Grafana dashboard, generated from the metrics' definitions, so that it can't ask for what there is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flyte_batch.monitoring import metrics
from flyte_batch.monitoring.metrics import Metric

UID = "flyte-batch"
"""The dashboard's own in Grafana, part of its URL."""

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CHOSEN = 'job=~"$job",instance=~"$instance"'
_COLUMNS = 24  # of Grafana's grid

_GRAFANA_UNITS: dict[str, str] = {
    "": "short", "ratio": "percentunit", "seconds": "s", "bytes": "bytes", "watts": "watt", "joules": "joule",
    "celsius": "celsius", "per second": "cps",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """One line of a panel, or several.

    Attributes:
        expression: in PromQL.
        legend: what they are called; ``{{label}}`` stands for a label's value.
    """

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: above it.
        help: behind its (i).
        unit: a metric's, or ``per second``.
        queries: what it shows.
        kind: lines over time, or the newest value.
        stacked: the lines add up.
        width: of 24 columns.
    """

    title: str
    help: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    width: int = 8


def _of(metric: Metric, suffix: str = "", **labels: str) -> str:
    """The chosen processes' series of a metric."""
    more = "".join(f',{name}="{value}"' for name, value in labels.items())
    return f"{metric.name}{suffix}{{{_CHOSEN}{more}}}"


def _sum(metric: Metric, *by: str, **labels: str) -> str:
    return f"sum{_by(by)} ({_of(metric, **labels)})"


def _rate(metric: Metric, *by: str, suffix: str = "", **labels: str) -> str:
    return f"sum{_by(by)} (rate({_of(metric, suffix, **labels)}[$__rate_interval]))"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _mean(histogram: Metric, *by: str) -> str:
    return f"{_rate(histogram, *by, suffix='_sum')} / {_rate(histogram, *by, suffix='_count')}"


def _quantiles(histogram: Metric, **labels: str) -> tuple[Query, ...]:
    buckets = _rate(histogram, "le", suffix="_bucket", **labels)
    return tuple(Query(f"histogram_quantile({share / 100}, {buckets})", f"p{share}") for share in (50, 95, 99))


def _rates(metric: Metric, label: str) -> tuple[Query, ...]:
    """A line for each value of a label."""
    return (Query(_rate(metric, label), f"{{{{{label}}}}}"),)


_UTILIZATION = f"{_rate(metrics.DEVICE_SECONDS, state='busy')} / {_rate(metrics.DEVICE_SECONDS)}"
_FAILED_SHARE = (
    f"{_rate(metrics.RECORDS, outcome='failed')} / "
    f'sum (rate({metrics.RECORDS.name}{{{_CHOSEN},outcome=~"ok|failed"}}[$__rate_interval]))'
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel(
                "Rows done", "Share of the rows of the runs under way; of the last one, if there is none.", "ratio",
                (Query(f"{_sum(metrics.RUN_ROWS_DONE)} / {_sum(metrics.RUN_ROWS)}", "done"),), "stat", width=4,
            ),
            Panel(
                "Records", "Answered a second.", "per second",
                (Query(_rate(metrics.RECORDS, outcome="ok"), "ok"),), "stat", width=4,
            ),
            Panel(
                "Utilization", "Share of the time in which devices are at work.", "ratio",
                (Query(_UTILIZATION, "busy"),), "stat", width=4,
            ),
            Panel(
                "Failed records", "Share of the records that got an outcome.", "ratio",
                (Query(_FAILED_SHARE, "failed"),), "stat", width=4,
            ),
            Panel("Batchers", "That take records.", "", (Query(_sum(metrics.BATCHERS_RUNNING), "batchers"),), "stat",
                  width=4),
            Panel(
                "Engine deaths", "In the time that is shown.", "",
                (Query(f"sum (increase({_of(metrics.ENGINE_DEATHS)}[$__range]))", "deaths"),), "stat", width=4,
            ),
        ),
    ),
    (
        "Throughput",
        (
            Panel("Records", metrics.RECORDS.help, "per second", _rates(metrics.RECORDS, "outcome")),
            Panel("Rows committed", metrics.ROWS.help, "per second", _rates(metrics.ROWS, "outcome")),
            Panel("Tokens", metrics.TOKENS.help, "per second", _rates(metrics.TOKENS, "kind")),
            Panel(
                "Runs under way", "Rows, those that are done, and those without a response.", "",
                (
                    Query(_sum(metrics.RUN_ROWS), "rows"), Query(_sum(metrics.RUN_ROWS_DONE), "done"),
                    Query(_sum(metrics.RUN_ROWS_FAILED), "failed"),
                ),
            ),
            Panel(
                "Chunks at work", "By process.", "",
                (Query(_sum(metrics.CHUNKS_RUNNING, "instance"), "{{instance}}"),), stacked=True,
            ),
            Panel("Seconds a chunk", metrics.CHUNK_SECONDS.help, "seconds", _quantiles(metrics.CHUNK_SECONDS)),
        ),
    ),
    (
        "Device",
        (
            Panel(
                "Where the device's time goes", metrics.DEVICE_SECONDS.help, "ratio",
                (
                    Query(
                        f"{_rate(metrics.DEVICE_SECONDS, 'state')} / ignoring (state) group_left ()"
                        f" {_rate(metrics.DEVICE_SECONDS)}",
                        "{{state}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Utilization by process", "Share of the time in which its device is at work.", "ratio",
                (
                    Query(
                        f"{_rate(metrics.DEVICE_SECONDS, 'instance', state='busy')} / "
                        f"{_rate(metrics.DEVICE_SECONDS, 'instance')}",
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Queue and device", "Records that wait, and records on the device.", "",
                (
                    Query(_sum(metrics.RECORDS_QUEUED, "engine"), "{{engine}} queued"),
                    Query(_sum(metrics.RECORDS_RUNNING, "engine"), "{{engine}} on the device"),
                ),
            ),
            Panel(
                "Batch fill", metrics.BATCH_FILL.help, "ratio",
                (Query(_mean(metrics.BATCH_FILL, "engine"), "{{engine}}"),),
            ),
            Panel("Records a batch", "On average.", "", (Query(_mean(metrics.BATCH_RECORDS, "engine"), "{{engine}}"),)),
            Panel("Seconds a batch", metrics.BATCH_SECONDS.help, "seconds", _quantiles(metrics.BATCH_SECONDS)),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "Records of direct callers", "Seconds from queue to outcome.", "seconds",
                _quantiles(metrics.RECORD_LATENCY, caller="direct"), width=12,
            ),
            Panel(
                "Records of chunks", "Seconds from queue to outcome. A chunk queues many at a time: these may be long.",
                "seconds", _quantiles(metrics.RECORD_LATENCY, caller="chunk"), width=12,
            ),
        ),
    ),
    (
        "Failures",
        (
            # Numbers, not rates: a cause's series begins with its first failure, which a rate would miss.
            Panel(
                "Failed records by cause", f"{metrics.RECORD_FAILURES.help} Since the processes began.", "",
                (Query(_sum(metrics.RECORD_FAILURES, "stage", "cause"), "{{stage}}: {{cause}}"),), stacked=True,
            ),
            Panel(
                "Failed rows by cause", f"{metrics.ROW_FAILURES.help} Since the processes began.", "",
                (Query(_sum(metrics.ROW_FAILURES, "cause"), "{{cause}}"),), stacked=True,
            ),
            Panel("Chunks", metrics.CHUNKS.help, "per second", _rates(metrics.CHUNKS, "outcome")),
            Panel(
                "Batches that failed or were split", metrics.BATCHES.help, "per second",
                (
                    Query(_rate(metrics.BATCHES, outcome="failed"), "failed"),
                    Query(_rate(metrics.BATCHES, outcome="split"), "split"),
                    Query(_rate(metrics.OUT_OF_MEMORY), "out of memory"),
                ),
            ),
            Panel(
                "Records that were lost or given up",
                "Lost by an engine that died, taken back by their caller, or without a result in time.", "per second",
                (
                    Query(_rate(metrics.RECORDS, outcome="lost"), "lost"),
                    Query(_rate(metrics.RECORDS, outcome="abandoned"), "abandoned"),
                    Query(_rate(metrics.RECORDS_EXPIRED), "expired"),
                ),
            ),
            Panel(
                "Runs that ended", f"{metrics.RUNS.help} Since the processes began.", "",
                (Query(_sum(metrics.RUNS, "outcome"), "{{outcome}}"),),
            ),
        ),
    ),
    (
        "Engines and the event loop",
        (
            Panel(
                "Engines", "That started and died since the processes began, and those that are loading.", "",
                (
                    Query(_sum(metrics.ENGINE_STARTS, "engine"), "{{engine}} started"),
                    Query(_sum(metrics.ENGINE_DEATHS, "engine"), "{{engine}} died"),
                    Query(_sum(metrics.ENGINES_LOADING), "loading"),
                ),
            ),
            Panel(
                "Seconds to load an engine", metrics.ENGINE_LOAD_SECONDS.help, "seconds",
                (Query(_mean(metrics.ENGINE_LOAD_SECONDS, "outcome"), "{{outcome}}"),),
            ),
            Panel(
                "Event loop blocked", "Share of the time in which the event loop stood still.", "ratio",
                (Query(_rate(metrics.LOOP_BLOCKED, "instance", suffix="_sum"), "{{instance}}"),),
            ),
        ),
    ),
    (
        "GPUs",
        (
            Panel(
                "Utilization", metrics.GPU_UTILIZATION.help, "ratio",
                (Query(_of(metrics.GPU_UTILIZATION), "{{instance}} {{gpu}}"),),
            ),
            Panel(
                "Memory", "Share of the GPU's memory in use.", "ratio",
                (Query(f"{_of(metrics.GPU_MEMORY_USED)} / {_of(metrics.GPU_MEMORY_SIZE)}", "{{instance}} {{gpu}}"),),
            ),
            Panel("Power", metrics.GPU_POWER.help, "watts", (Query(_of(metrics.GPU_POWER), "{{instance}} {{gpu}}"),)),
            Panel(
                "Temperature", metrics.GPU_TEMPERATURE.help, "celsius",
                (Query(_of(metrics.GPU_TEMPERATURE), "{{instance}} {{gpu}}"),), width=12,
            ),
            Panel(
                "Joules a response token", "Energy of the GPUs by the tokens of committed rows.", "joules",
                (Query(f"{_rate(metrics.GPU_ENERGY)} / {_rate(metrics.TOKENS, kind='response')}", "a token"),),
                width=12,
            ),
        ),
    ),
    (
        "vLLM's own",
        (
            Panel(
                "Requests", "As vLLM's scheduler sees them.", "",
                (
                    Query(f"sum (vllm:num_requests_running{{{_CHOSEN}}})", "running"),
                    Query(f"sum (vllm:num_requests_waiting{{{_CHOSEN}}})", "waiting"),
                ),
            ),
            Panel(
                "KV cache in use", "Share of its blocks.", "ratio",
                (Query(f"vllm:kv_cache_usage_perc{{{_CHOSEN}}}", "{{instance}}"),),
            ),
            Panel(
                "Tokens", "Read and generated, as they come.", "per second",
                (
                    Query(f"sum (rate(vllm:prompt_tokens_total{{{_CHOSEN}}}[$__rate_interval]))", "prompt"),
                    Query(f"sum (rate(vllm:generation_tokens_total{{{_CHOSEN}}}[$__rate_interval]))", "response"),
                ),
            ),
            Panel(
                "Preemptions", "Requests that had to give their KV cache up; they are computed again.", "per second",
                (Query(f"sum (rate(vllm:num_preemptions_total{{{_CHOSEN}}}[$__rate_interval]))", "preemptions"),),
                width=12,
            ),
            Panel(
                "Prefix cache", "Share of the prompts' tokens that were found in it.", "ratio",
                (
                    Query(
                        f"sum (rate(vllm:prefix_cache_hits_total{{{_CHOSEN}}}[$__rate_interval])) / "
                        f"sum (rate(vllm:prefix_cache_queries_total{{{_CHOSEN}}}[$__rate_interval]))",
                        "hits",
                    ),
                ),
                width=12,
            ),
        ),
    ),
)  # fmt: skip
"""The dashboard: sections with their panels."""


def dashboard() -> str:
    """The dashboard as JSON, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, section in ROWS:
        panels.append({**_place(len(panels) + 1, 0, top, _COLUMNS, 1), "type": "row", "title": title, "panels": []})
        top += 1
        left = height = 0
        for panel in section:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + height
            height = 4 if panel.kind == "stat" else 8
            panels.append({**_place(len(panels) + 1, left, top, panel.width, height), **_panel(panel)})
            left += panel.width
        top += height
    content = {
        "uid": UID,
        "title": "flyte_batch",
        "description": "Batch inference with flyte_batch: throughput, where the devices' time goes, latency, failures.",
        "tags": ["flyte_batch", "flyte"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": 39,
        "templating": {"list": _variables()},
        "panels": panels,
    }
    return json.dumps(content, indent=2) + "\n"


def _variables() -> list[dict[str, Any]]:
    """What is chosen at the dashboard's top: the Prometheus, and whose metrics."""
    info = metrics.BUILD_INFO.name
    labels = {"job": f"label_values({info}, job)", "instance": f'label_values({info}{{job=~"$job"}}, instance)'}
    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
        *(
            {
                "type": "query",
                "name": name,
                "datasource": _DATASOURCE,
                "query": query,
                "refresh": 2,  # when the time range changes
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
            for name, query in labels.items()
        ),
    ]


def _place(identity: int, left: int, top: int, width: int, height: int) -> dict[str, Any]:
    return {"id": identity, "gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": _GRAFANA_UNITS[panel.unit], "min": 0}
    options: dict[str, Any]
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    else:
        calculation = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        options = {"reduceOptions": calculation, "colorMode": "none", "graphMode": "area"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for i, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }
