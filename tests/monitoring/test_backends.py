"""The environment variable that names a process's backends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import flyte_batch as fb
from flyte_batch.monitoring.backends import VARIABLE, check_backends, named
from tests.helpers import ENVIRONMENT, ROOT, questions, write_jsonl

PROGRAM = """
import asyncio, sys
import flyte_batch as fb

@fb.singleton
async def solver():
    return fb.EngineBatcher(fb.FakeEngine(), batch_timeout_s=0.001)

async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")

asyncio.run(fb.run(sys.argv[1], sys.argv[2], infer_chunk, chunk_size=10, progress="off"))
"""


def run(
    folder: Path, backends: str, more: str = "", source: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + more, source or questions(folder / "in.jsonl", 20), str(folder / "out")],
        cwd=ROOT, env={**ENVIRONMENT, VARIABLE: backends, **environment}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_a_process_without_the_variable_has_no_backend_and_says_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_variable_attaches_what_it_names(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    seen = """
from prometheus_client import REGISTRY
print("seen", REGISTRY.get_sample_value("flyte_batch_rows_total", {"outcome": "ok"}))
"""
    done = run(tmp_path, "logs,prometheus:0", seen)
    assert done.returncode == 0, done.stderr
    assert "seen 20.0" in done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"run_started", "chunk_done", "run_ended"} <= {line["event"] for line in lines}


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        ("nonsense", "'nonsense' is no backend; there are logs, logs:debug, otel, prometheus"),
        ("prometheus:99999", "prometheus is off"),
        ("prometheus:203.0.113.1:9464", "prometheus is off"),
    ],
)
def test_what_cannot_be_attached_is_a_warning_and_the_run_goes_on(tmp_path: Path, backends: str, said: str) -> None:
    done = run(tmp_path, backends)
    assert done.returncode == 0
    assert said in done.stderr
    assert fb.read_output(str(tmp_path / "out")).num_rows == 20


def test_a_library_that_fails_is_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    broken = """
import prometheus_client

def start_http_server(*_: object) -> None:
    raise RuntimeError("can't start new thread")

prometheus_client.start_http_server = start_http_server
"""
    done = subprocess.run(
        [sys.executable, "-c", broken + PROGRAM, questions(tmp_path / "in.jsonl", 20), str(tmp_path / "out")],
        cwd=ROOT, env={**ENVIRONMENT, VARIABLE: "prometheus"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "monitoring: prometheus is off: can't start new thread" in done.stderr


@pytest.mark.parametrize("backends", ["logs,logs", " logs, ,logs:debug,logs"])
def test_a_backend_that_is_named_twice_is_attached_once(tmp_path: Path, backends: str) -> None:
    done = run(tmp_path, backends)
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events.count("run_started") == 1


def test_a_library_that_is_not_installed_is_named_with_the_extra(tmp_path: Path) -> None:
    block = "import sys; sys.modules['prometheus_client'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + PROGRAM, questions(tmp_path / "in.jsonl", 20), str(tmp_path / "out")],
        cwd=ROOT, env={**ENVIRONMENT, VARIABLE: "prometheus"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "prometheus is off, because prometheus_client can't be imported: install flyte-batch with the extra" in (
        done.stderr
    )


class Takers(ThreadingHTTPServer):
    """A gateway and a collector that answer nobody before all that a process sends at its end has been asked for.

    Attributes:
        asked: paths, of the last spans and metrics.
    """

    def __init__(self, answers_after: int) -> None:
        self.asked: list[str] = []
        self.barrier = threading.Barrier(answers_after)
        super().__init__(("127.0.0.1", 0), _Taker)
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.barrier.abort()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Taker(BaseHTTPRequestHandler):
    server: Takers

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path.split("/instance/")[0])
        with contextlib.suppress(threading.BrokenBarrierError):
            self.server.barrier.wait()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def takers(request: pytest.FixtureRequest) -> Iterator[Takers]:
    pytest.importorskip("flyteplugins.otel", reason="needs the extra monitoring")
    pytest.importorskip("prometheus_client")
    takers = Takers(answers_after=request.param)
    yield takers
    takers.close()


def run_to_its_end(folder: Path, takers: Takers) -> str:
    """What a run says whose spans and metrics are sent at its end only."""
    done = run(
        folder, f"push:{takers.url},otel", OTEL_EXPORTER_OTLP_ENDPOINT=takers.url, OTEL_BSP_SCHEDULE_DELAY="600000"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(takers.asked) == ["/metrics/job/flyte_batch", "/v1/metrics", "/v1/traces"]
    return done.stderr


@pytest.mark.parametrize("takers", [3], indirect=True)
def test_at_the_end_all_is_sent_side_by_side(tmp_path: Path, takers: Takers) -> None:
    assert run_to_its_end(tmp_path, takers) == ""


@pytest.mark.parametrize("takers", [99], indirect=True)
def test_takers_that_never_answer_hold_up_the_end_together_only_so_long_and_are_named(
    tmp_path: Path, takers: Takers
) -> None:
    assert run_to_its_end(tmp_path, takers) == (
        f"not taken within 5 s, and lost, as the process ends: the last metrics for {takers.url}, "
        "spans for OpenTelemetry, metrics for OpenTelemetry\n"
    )


def failing(folder: Path) -> str:
    """A source of two rows, the first of which fails with `MESSAGE`."""
    return write_jsonl(folder / "in.jsonl", [{"question": "long " * 5000}, {"question": "fine"}])


MESSAGE = (
    "the prompt has 5000 tokens, the model's context holds 4096 with the response: "
    "shorten it, or leave out rows like it"
)


def messages_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Those of failed records in the log."""
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["event"] == "record_failed"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [("", MESSAGE), (",message_chars:10", "the prompt"), (",message_chars:0", "")],
)
def test_messages_of_errors_are_cut_or_left_out_of_logs(tmp_path: Path, entry: str, message: str) -> None:
    assert messages_of(run(tmp_path, f"logs{entry}", source=failing(tmp_path))) == [message]


@pytest.mark.parametrize(("entry", "message"), [("", MESSAGE), (",message_chars:0", None)])
def test_messages_of_errors_are_left_out_of_spans(tmp_path: Path, entry: str, message: str | None) -> None:
    pytest.importorskip("flyteplugins.otel", reason="needs the extra monitoring")
    from tests.monitoring.otlp_collector import collecting

    with collecting() as collector:
        done = run(tmp_path, f"otel{entry}", source=failing(tmp_path), OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert done.returncode == 0, done.stderr
    (exception,) = collector.one("chunk").events
    assert exception.attributes["exception.type"] == "PromptTooLong"
    assert exception.attributes.get("exception.message") == message


@pytest.mark.parametrize(
    "entry",
    [
        "message_chars",
        "message_chars:none",
        "message_chars:9999999999",
        "message_chars:0,message_chars:9",
        "Message-Char=0",
        '"message_chars:0"',
    ],
)
def test_a_wrong_number_of_characters_is_refused_and_in_a_shell_quotes_nothing(tmp_path: Path, entry: str) -> None:
    with pytest.raises(fb.BadInput, match=f"'{entry}' must be one number of characters, as in message_chars:0"):
        fb.replica_environment("r", image="auto", monitoring=f"logs,{entry}")
    done = run(tmp_path, f"logs,{entry}", source=failing(tmp_path))
    assert messages_of(done) == [""]
    assert f"messages of errors are left out: monitoring: '{entry}' must be" in done.stderr


def test_the_number_of_characters_goes_to_the_containers_and_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    given = ["message_chars:0", "otel", "logs"]
    variables = fb.driver_environment("d", monitoring=given).env_vars or {}
    assert variables[VARIABLE] == "otel,logs,message_chars:0"
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert named(variables[VARIABLE]) == ["otel", "logs"]


def test_environments_refuse_a_backend_that_there_is_not_and_a_secret_in_an_address() -> None:
    assert check_backends(["logs", "prometheus:0.0.0.0:9464", "push:http://gateway:9091"]) == (
        "logs,prometheus:0.0.0.0:9464,push:http://gateway:9091"
    )
    with pytest.raises(fb.BadInput, match="'promtheus' is no backend; there are logs"):
        fb.replica_environment("r", image="auto", monitoring=["promtheus"])
    with pytest.raises(fb.BadInput, match="holds a user or a password") as refused:
        fb.driver_environment("d", monitoring=["push:http://me:hunter2@gateway:9091"])
    assert "hunter2" not in str(refused.value)
    for given in (["logs", "otel"], "logs, otel,"):
        environment = fb.driver_environment("d", monitoring=given, env_vars={"A": "b"})
        assert environment.env_vars is not None
        assert (environment.env_vars[VARIABLE], environment.env_vars["A"]) == ("logs,otel", "b")
    assert VARIABLE not in (fb.driver_environment("d", monitoring="").env_vars or {})


def test_containers_that_trace_are_told_where_spans_go_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic hunter2")
    traced = fb.replica_environment("r", image="auto", monitoring="otel").env_vars or {}
    assert traced["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert "hunter2" not in str(traced)
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in (fb.driver_environment("d", monitoring="logs").env_vars or {})
