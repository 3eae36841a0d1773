"""Traced chunks of several runs, before an engine that a test holds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from flyteplugins import otel

import flyte_batch as fb
from images import cpu_image

if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:  # not in the test's own process
    otel.init(service_name="traced")

replicas = fb.replica_environment("traced", image=cpu_image, replicas=1, concurrency=8, monitoring=["otel"])
driver = fb.driver_environment("traced-driver", image=cpu_image, depends_on=[replicas], monitoring=["otel"])


async def answer(text: str) -> str:
    while not (Path(os.environ["TRACED_FOLDER"]) / "open").exists():  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(0.02)
    return text


@fb.singleton
async def solver() -> fb.EngineBatcher:
    return fb.EngineBatcher(fb.FakeEngine(answer), max_batch_size=8, batch_timeout_s=0.01)


def ask(row: dict[str, object]) -> str:
    text = str(row["text"])
    (Path(os.environ["TRACED_FOLDER"]) / f"asked {text}").touch()
    return text


@replicas.task
async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt=ask)


@driver.task
async def main(source: str, output: str) -> fb.RunSummary:
    return await fb.run(source, output, infer_chunk, chunk_size=10, concurrency=4)
