"""What is pushed, to a small gateway that takes it as a real one does; and a gateway that is away breaks nothing."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.errors import BadInput
from flyte_batch.monitoring import hooks
from flyte_batch.monitoring.events import LoopBlocked
from flyte_batch.monitoring.scope import process_name
from tests.helpers import flyte_run, write_jsonl
from tests.monitoring.tools import Gateway, Series, free_port, until, value

prometheus_client = pytest.importorskip("prometheus_client")

from flyte_batch.monitoring.prometheus import PrometheusHook, push  # noqa: E402


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def registry() -> Iterator[Any]:
    registry = prometheus_client.CollectorRegistry()
    unsubscribe = hooks.subscribe(PrometheusHook(registry))
    yield registry
    unsubscribe()


def block(seconds: float) -> None:
    """Something that is counted."""
    hooks.emit(LoopBlocked(0, seconds, "f (a/b.py)"))


def blocked(series: Series) -> float | None:
    return value(series, "flyte_batch_loop_blocked_seconds_sum")


def test_metrics_are_pushed_again_and_again_under_the_process_name(gateway: Gateway, registry: Any) -> None:
    with push(f"http://{gateway.address}", every_s=0.01, registry=registry):
        block(2)
        until(lambda: bool(gateway.pushes) and blocked(gateway.pushes[-1][3]) == 2)
        block(3)
        until(lambda: blocked(gateway.pushes[-1][3]) == 5)
    method, path, authorisation, _ = gateway.pushes[-1]
    assert (method, path) == ("PUT", f"/metrics/job/flyte_batch/instance/{process_name()}")
    assert authorisation is None


def test_the_last_push_comes_with_the_end(gateway: Gateway, registry: Any) -> None:
    with push(f"http://{gateway.address}/", every_s=3600, registry=registry, job="nightly"):
        block(7)
    (only,) = gateway.pushes
    assert only[1].startswith("/metrics/job/nightly/instance/")
    assert blocked(only[3]) == 7


def test_credentials_go_to_the_gateway_and_into_no_log(
    gateway: Gateway, registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway.status = 401
    with push(f"http://us%40er:s3c%2Fret@{gateway.address}", every_s=3600, registry=registry) as pusher:
        pass
    (only,) = gateway.pushes
    assert only[2] == "Basic " + base64.b64encode(b"us@er:s3c/ret").decode()
    assert "can't be pushed" in caplog.text
    assert "401" in caplog.text
    assert pusher.gateway == f"http://{gateway.address}"
    for secret in ("s3c", "us%40er", "us@er"):
        assert secret not in caplog.text


def test_a_gateway_that_is_away_is_one_warning_and_tried_again(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flyte_batch")
    port = free_port()
    with push(f"http://user:s3cret@127.0.0.1:{port}", every_s=0.01, registry=registry):
        until(lambda: "can't be pushed" in caplog.text)
        gateway = Gateway(port)
        try:
            until(lambda: "again" in messages(caplog)[-1] and bool(gateway.pushes))
        finally:
            gateway.close()
    # The last push met a gateway that is gone once more.
    assert [message.partition(" to ")[0] for message in messages(caplog)] == [
        "metrics can't be pushed",
        "metrics are pushed",
        "metrics can't be pushed",
    ]
    assert "s3cret" not in caplog.text


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_collector_that_fails_is_a_warning_too(
    gateway: Gateway, registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> list[Any]:
            raise RuntimeError("no figures")

    registry.register(Failing())
    with push(f"http://{gateway.address}", every_s=3600, registry=registry):
        pass
    assert "no figures" in caplog.text
    assert not gateway.pushes


@pytest.mark.parametrize(
    "url",
    [
        "gateway:9091",
        "ftp://user:s3cret@gateway",
        "http://",
        "http://user:s3/cret@gateway:9091",
        "http://user:s3cret@gateway:port",
        "http://user:s3cret@[gateway",
        "http://user:s3cret@gateway?token=s3cret",
    ],
)
def test_a_url_that_is_none_is_refused_without_repeating_it(url: str, registry: Any) -> None:
    with pytest.raises(BadInput, match="http://HOST:PORT") as caught:
        push(url, registry=registry)
    assert "s3" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("every_s", [0, -1, float("nan")])
def test_a_time_between_pushes_must_be_positive(every_s: float, registry: Any) -> None:
    with pytest.raises(BadInput, match="every_s"):
        push("http://gateway:9091", every_s, registry=registry)


def test_a_run_pushes_what_its_manifest_says(gateway: Gateway, tmp_path: Path) -> None:
    rows = [{"id": i, "question": None if i % 10 == 3 else f"question {i}"} for i in range(50)]
    output = tmp_path / "out"
    run = flyte_run(
        "generate.py", "--source", write_jsonl(tmp_path / "rows.jsonl", rows), "--output", str(output),
        "--engine", "fake", "--chunk_size", "20", FLYTE_BATCH_MONITORING=f"push:http://{gateway.address}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    manifest = json.loads((output / "_manifest.json").read_text())
    series = gateway.pushes[-1][3]

    def told(name: str, **labels: str) -> float | None:
        return value(series, f"flyte_batch_{name}", **labels)

    totals = manifest["totals"]
    assert (totals["rows"], totals["failures"]) == (50, 5)
    assert told("rows_total", outcome="ok") == told("records_total", engine="FakeEngine", outcome="ok") == 45
    assert told("rows_total", outcome="failed") == 5
    assert told("row_failures_total", cause="MissingValue") == totals["causes"]["MissingValue"] == 5
    assert told("record_failures_total", stage="prepare", cause="MissingValue") == 5
    assert told("tokens_total", kind="prompt") == totals["prompt_tokens"] > 0
    assert told("tokens_total", kind="response") == totals["response_tokens"] > 0
    assert told("chunks_total", outcome="done") == len(manifest["parts"]) == 3
    assert [told(f"run_rows{kind}") for kind in ("", "_done", "_failed")] == [50, 50, 5]
    assert told("runs_total", outcome="done") == 1
    assert [told(name) for name in ("runs_running", "chunks_running", "engines_loading")] == [0, 0, 0]
    assert told("record_latency_seconds_count", engine="FakeEngine", caller="chunk") == 45
