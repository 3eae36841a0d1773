"""The dashboard: Grafana's own types read it, Prometheus understands every query, and each panel finds something."""

from __future__ import annotations

import asyncio
import json
import re
import time
import weakref
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

import flyte_batch as fb
from flyte_batch.monitoring import events as ev
from flyte_batch.monitoring import gpu, hooks, metrics
from flyte_batch.monitoring.grafana import ROWS, UID, dashboard
from tests.monitoring.tools import VLLM_METRICS, Prometheus, prometheus, promtool, until

PANELS = [panel for _, section in ROWS for panel in section]
EXPRESSIONS = [query.expression for panel in PANELS for query in panel.queries]
NAME = re.compile(r"\b(?:flyte_batch_\w+|vllm:\w+)")


def filled(expression: str, window: str = "5m") -> str:
    """A query as Grafana sends it."""
    for name, text in {"$__rate_interval": window, "$__range": "1h", "$job": ".*", "$instance": ".*"}.items():
        expression = expression.replace(name, text)
    assert "$" not in expression
    return expression


def labels_of(name: str) -> set[str] | None:
    """Labels of a series by its name; None if there is no such metric."""
    for metric in metrics.METRICS:
        series = {f"{metric.name}_bucket": {"le"}, f"{metric.name}_sum": set(), f"{metric.name}_count": set()}
        if metric.kind != "histogram":
            series = {metric.name: set()}
        if name in series:
            return {*metric.labels, "job", "instance", *series[name]}
    return {"job", "instance"} if name in VLLM_METRICS else None


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_of_a_query_is_defined(expression: str) -> None:
    names = NAME.findall(expression)
    assert names
    for name in names:
        known = labels_of(name)
        assert known is not None, name
        for selector in re.findall(re.escape(name) + r"\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)=~?\"", selector)) <= known
            assert {"job", "instance"} <= set(re.findall(r"(\w+)=~?\"", selector))
        for by in re.findall(r"by \((.*?)\)", expression):
            assert set(by.split(", ")) <= known


def test_every_metric_is_on_the_dashboard_or_elsewhere_on_purpose() -> None:
    shown = set(NAME.findall(" ".join(EXPRESSIONS)))
    missing = {
        metric.name
        for metric in metrics.METRICS
        if not shown & {metric.name, f"{metric.name}_bucket", f"{metric.name}_sum"}
    }
    assert missing == {each.name for each in (metrics.BUILD_INFO, metrics.RECORDS_SUBMITTED, metrics.RUNS_RUNNING)}


def test_promtool_understands_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": filled(expression)} for i, expression in enumerate(EXPRESSIONS)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(EXPRESSIONS)} rules found" in promtool("check", "rules", str(file))


def test_grafanas_own_types_read_all_of_it() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    content = json.loads(dashboard())
    read = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(content)))
    assert missing_in(read, content) == []


def missing_in(read: Any, written: Any, path: str = "") -> list[str]:
    """Where something that was written is not what was read."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [each for key in written for each in missing_in(read.get(key), written[key], f"{path}.{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(read) == len(written):
        pairs = enumerate(zip(read, written, strict=True))
        return [each for i, (one, other) in pairs for each in missing_in(one, other, f"{path}[{i}]")]
    return [] if read == written else [f"{path}: {written!r} is read as {read!r}"]


def test_panels_lie_side_by_side_within_the_grid() -> None:
    places = [panel["gridPos"] for panel in json.loads(dashboard())["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_panels_have_ids_titles_helps_and_the_chosen_datasource() -> None:
    content = json.loads(dashboard())
    assert content["uid"] == UID
    assert [variable["name"] for variable in content["templating"]["list"]] == ["datasource", "job", "instance"]
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)
    panels = [panel for panel in content["panels"] if panel["type"] != "row"]
    assert len(panels) == len(PANELS)
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


# -- Against a real server -------------------------------------------------------------------------------------------


class Vllm:
    """vLLM's metrics, which grow with every scrape."""

    def __init__(self) -> None:
        self.scrapes = 0

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self.scrapes += 1
        for name, kind in VLLM_METRICS.items():
            family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
            yield family(name, "As vLLM has it.", value=self.scrapes)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    client = pytest.importorskip("prometheus_client")
    from flyte_batch.monitoring.prometheus import PrometheusHook

    monkeypatch.setattr(hooks, "_batchers", weakref.WeakSet())
    registry = client.CollectorRegistry()
    registry.register(Vllm())
    unsubscribe = hooks.subscribe(PrometheusHook(registry))
    yield registry
    unsubscribe()


async def test_every_query_finds_something_while_there_is_work(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flyte_batch.monitoring.prometheus import serve

    sample = gpu.GpuSample(
        at=0, index=0, uuid="GPU-0", name="NVIDIA A10G", utilization=0.5, memory_utilization=0.5, memory_used_bytes=1,
        memory_total_bytes=2, power_w=1, temperature_c=1, sm_clock_mhz=1, memory_clock_mhz=1, energy_j=1,
        energy_source="counter", throttle_reasons=(),
    )  # fmt: skip
    monkeypatch.setattr(gpu, "latest", lambda: (sample,))
    with serve(0, registry=registry) as ours, prometheus(tmp_path, ours.port) as server:
        work = asyncio.create_task(keep_working())
        try:
            await asyncio.to_thread(until, lambda: not empty(server), 40)
        except AssertionError:
            assert await asyncio.to_thread(empty, server) == []
        finally:
            work.cancel()


def empty(server: Prometheus) -> list[str]:
    """Queries without a figure."""
    found = {expression: server.query(filled(expression, "5s")) for expression in EXPRESSIONS}
    return [each for each, values in found.items() if not any(value == value for value in values.values())]  # NaN


async def keep_working() -> None:
    """Let everything happen that a metric counts, again and again."""

    def double(numbers: list[int]) -> list[Any]:
        return [ValueError("negative") if number < 0 else 2 * number for number in numbers]

    direct, driver = ev.Scope(), ev.Scope(run="r")
    hooks.emit(ev.RunStarted(0, driver, "out", rows=1000, rows_reused=0, chunks=10, chunks_reused=0))
    async with fb.DynamicBatcher(double, batch_timeout_s=0) as batcher:
        while True:
            await batcher.map(range(-2, 5), return_exceptions=True)
            chunk = ev.Scope(chunk="c")
            hooks.emit(ev.ChunkStarted(0, chunk, 10))
            hooks.emit(ev.ChunkDone(0, chunk, 10, 1, 30, 20, 0.5, {"ValueError": 1}))
            hooks.emit(ev.ChunkReported(0, driver, "c", 0, 10, 1))
            hooks.emit(ev.EngineLoaded(0, "solver", 1.0))
            share = ev.Share(chunk, 1, 0, 1, ((0.5, 1),))
            other = ev.Share(direct, 1, 0, 1, ((0.5, 1),))
            hooks.emit(ev.BatchDone(time.time(), batcher.id, 1, time.time(), 2, 0, 2, 0.5, False, (share, other)))
            hooks.emit(ev.BatchDone(time.time(), batcher.id, 1, time.time(), 2, 2, 2, 0.5, True, ()))
            hooks.emit(ev.BatchDone(time.time(), batcher.id, 1, time.time(), 1, 1, 2, 0.5, False, (share,)))
            await asyncio.sleep(0.02)
