"""Logs of runs, made by hand: every number of them is known."""

from __future__ import annotations

from typing import Any

from flyte_batch.monitoring.details import Example, Sample, Stall
from flyte_batch.monitoring.gpu import GpuUse
from flyte_batch.report.run_log import ChunkEntry, EngineLog, Plan, RunLog

STARTED = 1_795_000_000.0


def make_plan(**changes: Any) -> Plan:
    return Plan(
        **{
            "rows": 8_000,
            "chunks": 80,
            "chunk_rows": 100,
            "rows_reused": 0,
            "chunks_reused": 0,
            "replicas": 2,
            "concurrency": 4,
            "batch_rows": 64,
            "rows_per_s": 50.0,
            **changes,
        }
    )


def make_log(
    *,
    busy: float = 90.0,
    loading: float = 2.0,
    starved: float = 3.0,
    assembling: float = 2.0,
    late: float = 1.0,
    tail: float = 2.0,
    replicas: int = 2,
    chunks: int = 40,
    fill: float = 0.9,
    plan: Plan | None = None,
    **changes: Any,
) -> RunLog:
    """A run of equal replicas; seconds and chunks are those of each, and its parts add up to its time."""
    plan = plan or make_plan()
    begin = STARTED + 5
    first = begin + loading
    last = first + busy + starved + assembling + late
    log = RunLog(
        output="/data/answers",
        source="/data/questions.jsonl",
        settings={"model": "small", "sampling": {"max_tokens": 64, "temperature": 0.0}},
        plan=plan,
        started=STARTED,
        ended=last + tail,
        outcome="done",
        versions={"python": "3.11.9", "flyte-batch": "0.1.0"},
    )
    for replica in range(replicas):
        batcher, process = f"batcher-{replica}", f"replica-{replica}"
        rows = chunks * plan.chunk_rows
        log.engines[batcher] = EngineLog(
            batcher=batcher,
            process=process,
            engine="FakeEngine",
            started=begin,
            loaded=first,
            ended=last,
            samples=[
                Sample(first, 0.0, 0.0, 0.0, 0.0, 0, 0, 0.0, 0, 0),
                Sample(last, busy, starved, assembling, late, rows, 50, 50 * fill, 10, 5),
            ],
            rows=rows,
            tokens=rows * 30,
        )
        for index in range(chunks):
            start = first + (last - first) * index / chunks
            log.chunks.append(
                ChunkEntry(
                    index=replica * chunks + index,
                    rows=plan.chunk_rows,
                    failures=0,
                    prompt_tokens=plan.chunk_rows * 20,
                    response_tokens=plan.chunk_rows * 10,
                    batcher=batcher,
                    started=start,
                    ended=first + (last - first) * (index + 1) / chunks,
                )
            )
        log.count(rows, 0, rows * 20, rows * 10, {}, {24: rows}, {12: rows})
    log.latencies = {0.5011872: 900, 1.0: 90, 2.2387211: 10}
    for name, value in changes.items():
        assert hasattr(log, name), name
        setattr(log, name, value)
    return log


def with_failures(log: RunLog, **causes: int) -> RunLog:
    """The log, with rows that failed for these causes instead of being answered."""
    log.causes = dict(causes)
    log.failures = sum(causes.values())
    log.examples = [Example(7 + index, cause, f"why {cause}") for index, cause in enumerate(causes)]
    return log


def with_stalls(log: RunLog, *stalls: tuple[str, float]) -> RunLog:
    """The log, with stalls of the first replica's loop: (code, seconds)."""
    log.stalls = [
        ("replica-0", Stall(STARTED + 20 + 10 * index, held, code)) for index, (code, held) in enumerate(stalls)
    ]
    return log


def gpu_use(uuid: str = "GPU-1", *, start: float = STARTED, seconds: float = 100.0, joules: float = 7_200.0) -> GpuUse:
    return GpuUse(
        uuid=uuid,
        name="NVIDIA A10G",
        sampler=f"sampler-{uuid}",
        start=start,
        end=start + seconds,
        busy_start_s=0.0,
        busy_end_s=seconds * 0.75,
        energy_start_j=0.0,
        energy_end_j=joules,
        energy_source="counter",
        peak_memory_bytes=20 * 2**30,
        memory_total_bytes=24 * 2**30,
        max_temperature_c=71.0,
        throttle_reasons=("idle", "power_cap"),
    )
