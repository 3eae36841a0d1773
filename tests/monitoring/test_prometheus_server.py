"""A real Prometheus server scrapes a process and answers PromQL, and what it says agrees with the batchers."""

from __future__ import annotations

import asyncio
import math
import socket
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import flyte_batch as fb
from flyte_batch.monitoring import hooks
from tests.monitoring.tools import parsed, prometheus, until, value

prometheus_client = pytest.importorskip("prometheus_client")

from flyte_batch.monitoring.prometheus import PrometheusHook, serve  # noqa: E402


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(hooks, "_batchers", weakref.WeakSet())
    registry = prometheus_client.CollectorRegistry()
    unsubscribe = hooks.subscribe(PrometheusHook(registry))
    yield registry
    unsubscribe()


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def labels(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def double(numbers: list[int]) -> list[Any]:
    return [ValueError("negative") if number < 0 else 2 * number for number in numbers]


async def test_a_real_server_sees_what_the_batcher_says(registry: Any, tmp_path: Path) -> None:
    with serve(0, registry=registry) as ours, prometheus(tmp_path, ours.port) as server:
        async with fb.DynamicBatcher(double, max_batch_size=8, batch_timeout_s=0) as doubler:
            await doubler.map(range(-5, 100), return_exceptions=True)
        stats = doubler.stats
        records = 'sum by (outcome) (flyte_batch_records_total{engine="DynamicBatcher"})'

        def arrived() -> bool:
            return sum(server.query(records).values()) == stats.total_submitted

        await asyncio.to_thread(until, arrived)
        assert server.query(records) == {
            labels(outcome="ok"): stats.total_completed - stats.total_failed,
            labels(outcome="failed"): stats.total_failed,
            labels(outcome="lost"): 0,
            labels(outcome="abandoned"): 0,
        }
        utilization = 'sum(flyte_batch_device_seconds_total{state="busy"}) / sum(flyte_batch_device_seconds_total)'
        # The batcher has stopped: its seconds are what they will always be.
        assert math.isclose(server.query(utilization)[labels()], stats.utilization, rel_tol=1e-6)
        assert server.query("sum(flyte_batch_batch_records_sum)")[labels()] == 105
        assert server.query("sum(flyte_batch_batch_records_count)")[labels()] == stats.total_batches
        assert server.query("flyte_batch_build_info") != {}
        kinds = {name: each[0]["type"] for name, each in server.get("/api/v1/metadata").items()}
        assert kinds["flyte_batch_records_total"] == "counter"
        assert kinds["flyte_batch_records_queued"] == "gauge"
        assert kinds["flyte_batch_record_latency_seconds"] == "histogram"


def test_it_is_served_while_the_event_loop_is_blocked(registry: Any) -> None:
    with serve(0, registry=registry) as ours:

        async def block() -> str:
            with ThreadPoolExecutor() as threads:
                return threads.submit(read, ours.port).result(30)  # on the loop, on purpose

        assert value(parsed(asyncio.run(block())), "flyte_batch_chunks_running") == 0


def test_it_listens_on_loopback_only_and_stops_when_closed(registry: Any) -> None:
    ours = serve(0, registry=registry)
    assert ours._server.server_address[0] == "127.0.0.1"
    read(ours.port)
    ours.close()
    with pytest.raises(OSError, match="refused"):
        read(ours.port)


def test_a_port_that_is_taken_is_named(registry: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port} .*another port, or 0"):
            serve(port, registry=registry)
    with pytest.raises(OSError, match="another port, or 0"):
        serve(70_000, registry=registry)


def test_vllms_names_keep_their_colon_whatever_format_is_asked_for(registry: Any) -> None:
    prometheus_client.Gauge("vllm:num_requests_running", "As vLLM has it.", registry=registry).set(3)
    with serve(0, registry=registry) as ours:
        wanted = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        request = urllib.request.Request(f"http://127.0.0.1:{ours.port}/metrics", headers=wanted)
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  it is http
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert value(parsed(answer.read().decode()), "vllm:num_requests_running") == 3


def test_without_a_registry_it_is_the_process_own(registry: Any) -> None:
    with serve(0) as ours:
        assert "python_info" in read(ours.port)
