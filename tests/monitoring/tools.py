"""Prometheus' own programs, and what its parser makes of an exposition."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT

prometheus_client = pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


VLLM_METRICS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
}
"""What vLLM calls the metrics that the dashboard shows."""


def find_tool(name: str) -> str:
    """A program of Debian's package prometheus, on the PATH or unpacked in .tools; without it the test is skipped."""
    unpacked = ROOT / ".tools/usr/bin" / name
    found = shutil.which(name) or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        pytest.skip(f"{name} is not installed (apt-get install prometheus)")
    return found


def parsed(text: str) -> Series:
    """What Prometheus' own parser reads: (name, labels) -> value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(registry: Any) -> Series:
    """What a scrape of a registry tells."""
    return parsed(prometheus_client.generate_latest(registry).decode())


def value(series: Series, name: str, /, **labels: str) -> float | None:
    """One sample; None if there is none."""
    return series.get((name, frozenset(labels.items())))


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that another process or thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def promtool(*arguments: str, text: str = "") -> str:
    """What promtool says of files, or of a text; it must be content."""
    run = subprocess.run(
        [find_tool("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """What its HTTP API answers."""
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  it is http
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[frozenset[tuple[str, str]], float]:
        """The labels and values that PromQL finds now."""
        found = self.get("/api/v1/query", query=expression)["result"]
        return {
            frozenset((name, text) for name, text in each["metric"].items() if name != "__name__"): float(
                each["value"][1]
            )
            for each in found
        }

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=10):  # noqa: S310  it is http
                return True
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, *ports: int) -> Iterator[Prometheus]:
    """A real server that scrapes these ports of this machine every 200 ms."""
    targets = [f"127.0.0.1:{port}" for port in ports]
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [{"job_name": "flyte_batch", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [
                find_tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        found = Prometheus(port)
        until(lambda: server.poll() is not None or found.is_ready())
        assert server.poll() is None, (folder / "prometheus.log").read_text()
        yield found
    finally:
        server.terminate()
        server.wait(30)


class Gateway(ThreadingHTTPServer):
    """Takes pushes as a Pushgateway does.

    Attributes:
        pushes: method, path, authorisation and metrics of each.
        status: that it answers.
    """

    def __init__(self, port: int = 0) -> None:
        self.pushes: list[tuple[str, str, str | None, Series]] = []
        self.status = 200
        super().__init__(("127.0.0.1", port), _Taker)
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Taker(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.pushes.append((self.command, self.path, self.headers["Authorization"], parsed(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass
