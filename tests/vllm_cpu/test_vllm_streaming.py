"""Weights that come from an object store, straight into the engine: a small S3 server stands in for one."""

from __future__ import annotations

import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines import VLLMEngine, choose_engine, start_engine
from flyte_batch.errors import BadInput, EngineError
from flyte_batch.records import Prompt, SamplingParameters
from tests.vllm_cpu.starting import FAST, MODEL

_XML = '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>'


class _Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading needs: list a prefix, get an object or a range of it."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, Path]
    read: list[str]

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        key = urllib.parse.unquote(url.path).removeprefix("/bucket").strip("/")
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{name}</Key><Size>{path.stat().st_size}</Size><ETag>x</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, path in self.objects.items()
                if name.startswith(prefix)
            )
            return self.answer(200, _XML.format(found).encode())
        if key not in self.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        self.read.append(key)
        content = self.objects[key].read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.answer(200, content)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content)), len(content) - 1)
        return self.answer(206, content[start : end + 1], f"bytes {start}-{end}/{len(content)}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, content: bytes, part: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if part is not None:
            self.send_header("Content-Range", part)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    """A bucket with the demo model below ``models/demo``, which flyte's storage finds by its environment variables."""

    class Store(_Store):
        objects = {f"models/demo/{path.name}": path for path in MODEL.iterdir()}  # noqa: RUF012
        read: list[str] = []  # noqa: RUF012

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "FLYTE_AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "FLYTE_AWS_ACCESS_KEY_ID": "id",
        "FLYTE_AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield Store
    server.shutdown()
    server.server_close()
    thread.join()


async def test_a_model_in_a_bucket_answers(store: type[_Store]) -> None:
    chosen = choose_engine("auto", "s3://bucket/models/demo")
    assert chosen.engine == "vllm"
    engine = await start_engine(chosen, SamplingParameters(max_tokens=100), max_model_len=256, engine_args=FAST)
    assert isinstance(engine, VLLMEngine)
    try:
        problems = list(generate(5, 3))
        results = await engine.infer([engine.prepare(Prompt(problem.question)) for problem in problems])
        assert all(is_right(getattr(r, "text", None), p.answer) for r, p in zip(results, problems, strict=True))
        assert "models/demo/model.safetensors" in store.read
        fetched = {path.name for path in (engine._launch.folder / "model").iterdir()}
        assert "config.json" in fetched
        assert "model.safetensors" not in fetched
    finally:
        await engine.aclose()


async def test_a_prefix_without_a_model_says_so(store: type[_Store]) -> None:
    with pytest.raises((BadInput, EngineError), match="s3://bucket/models/none"):
        await start_engine(choose_engine("vllm", "s3://bucket/models/none"))


async def test_a_prefetched_model_is_streamed_and_one_that_is_copied_by_half_says_so(
    store: type[_Store], tmp_path: Path
) -> None:
    await fb.prefetch(MODEL, tmp_path / "demo")
    store.objects = {f"models/demo/{path.name}": path for path in (tmp_path / "demo").iterdir()}
    chosen = choose_engine("auto", "s3://bucket/models/demo")
    engine = await start_engine(chosen, SamplingParameters(max_tokens=100), max_model_len=256, engine_args=FAST)
    try:
        (problem,) = generate(1, 3)
        (answer,) = await engine.infer([engine.prepare(Prompt(problem.question))])
        assert is_right(getattr(answer, "text", None), problem.answer)
    finally:
        await engine.aclose()
    del store.objects["models/demo/config.json"]  # the last that prefetch writes
    with pytest.raises(BadInput, match="copied by half: wait for its prefetch to end, or run it again"):
        await start_engine(chosen)
