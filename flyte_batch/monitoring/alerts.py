"""Rules for Prometheus: what somebody should look at, generated from the metrics' definitions.

A rule is about all processes of a scrape job, or about each of them. Where a threshold is about a share or a time, it
is one of `Thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from flyte_batch.errors import BadInput
from flyte_batch.monitoring import metrics

_SHARE = "a share between 0 and 1"
_POSITIVE = "a positive number"


def _share(default: float, help: str) -> Any:
    return field(default=default, metadata={"help": help, "what": _SHARE})


def _positive(default: float, help: str) -> Any:
    return field(default=default, metadata={"help": help, "what": _POSITIVE})


@dataclass(frozen=True)
class Thresholds:
    """From where on something is worth an alert.

    Attributes:
        error_rate: share of records, or of rows, that fail in ten minutes.
        starved: share of ten minutes in which the device of a process that has chunks is free, with nothing to do.
        no_progress_s: seconds without a row that a run under way gets done, or without a record that a process with
            chunks gets done. More than a chunk takes.
        engine_deaths: engines that die within an hour.
        p99_latency_s: seconds from queue to outcome that 1% of the records of direct callers exceed. Those of chunks
            wait by the thousand on purpose, and are left out.
        loop_blocked: share of ten minutes in which the event loop stands still.

    Raises:
        BadInput: one of them is no share, or not positive.
    """

    error_rate: float = _share(0.05, "Share of records, or of rows, that fail.")
    starved: float = _share(0.5, "Share of the time in which a device with chunks has nothing to do.")
    no_progress_s: float = _positive(3600.0, "Seconds without a row or record done; more than a chunk takes.")
    engine_deaths: int = _positive(2, "Engines that die within an hour.")
    p99_latency_s: float = _positive(2.0, "Seconds that 1% of the records of direct callers may take.")
    loop_blocked: float = _share(0.1, "Share of the time in which the event loop stands still.")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, what = getattr(self, each.name), each.metadata["what"]
            if not (0 < value < (1 if what is _SHARE else math.inf)):
                raise BadInput(f"{each.name} must be {what}, got {value!r}")


def _rule(
    name: str, expression: str, for_s: float, severity: str, summary: str, description: str, remedy: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": f"{math.ceil(for_s)}s",
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description, "remedy": remedy},
    }


def _ratio(parts: str, whole: str, by: str) -> str:
    return f"sum by ({by}) (rate({parts}[10m])) / sum by ({by}) (rate({whole}[10m]))"


def rules(thresholds: Thresholds = Thresholds()) -> str:
    """The rules as YAML, for Prometheus' ``rule_files``."""
    return _yaml({"groups": [{"name": "flyte_batch", "rules": list(_rules(thresholds))}]})


def _rules(limits: Thresholds) -> tuple[dict[str, Any], ...]:
    records, rows = metrics.RECORDS.name, metrics.ROWS.name
    failed_records = _ratio(f'{records}{{outcome="failed"}}', f'{records}{{outcome=~"ok|failed"}}', "job")
    failed_rows = _ratio(f'{rows}{{outcome="failed"}}', rows, "job")
    late_records = _ratio(metrics.RECORDS_EXPIRED.name, metrics.RECORDS_SUBMITTED.name, "job")
    device, process = metrics.DEVICE_SECONDS.name, "job, instance"
    starved = _ratio(f'{device}{{state="starved"}}', device, process)
    busy_with_chunks = f"sum by ({process}) ({metrics.CHUNKS_RUNNING.name}) > 0"
    latency = f'rate({metrics.RECORD_LATENCY.name}_bucket{{caller="direct"}}[10m])'
    return (
        _rule(
            "FlyteBatchErrorRate",
            "\nor\n".join(f"({each} > {limits.error_rate})" for each in (failed_records, failed_rows, late_records)),
            300,
            "critical",
            "{{ $value | humanizePercentage }} of the records of {{ $labels.job }} fail.",
            f"More than {limits.error_rate:.0%} of the records that got an outcome within ten minutes, or of the rows "
            "that were committed, failed; or of the records that came had no result when their timeout_s was over.",
            "Look at the panels of failed records and rows by cause, and at the column error of the parts. "
            "MissingValue, PromptTooLong, BadImage and BadRecord are the data's fault, anything else the engine's or "
            "the code's: stop the run, correct it, and run it again with --retry_failures. Late records (panel of "
            "records that were lost or given up) want more replicas, or fewer callers.",
        ),
        _rule(
            "FlyteBatchStarved",
            f"({starved} > {limits.starved})\nand on ({process})\n({busy_with_chunks})",
            900,
            "warning",
            "{{ $labels.instance }} has chunks, and nothing to do {{ $value | humanizePercentage }} of the time.",
            f"For 15 minutes its device was free more than {limits.starved:.0%} of the time, because no record waited.",
            "Records do not come fast enough: raise the environment's concurrency or the chunks' size, give the "
            "replica more CPU for preparing prompts and finishing responses, or look at how fast the source is read.",
        ),
        _rule(
            "FlyteBatchRunStalled",
            f"sum by (job) ({metrics.RUNS_RUNNING.name}) > 0\n"
            f"unless on (job)\nsum by (job) (changes({metrics.RUN_ROWS_DONE.name}[5m])) > 0",
            limits.no_progress_s,
            "critical",
            "A run of {{ $labels.job }} is under way, and gets no row done.",
            f"No chunk was committed for {limits.no_progress_s:g} seconds.",
            "See in the UI whether chunks wait for replicas (no machine, image or quota to be had), load the model, or "
            "fail again and again. If a chunk takes longer than that, make chunks smaller or raise --no_progress_s.",
        ),
        _rule(
            "FlyteBatchReplicaStalled",
            f"({busy_with_chunks})\n"
            f'unless on ({process})\nsum by ({process}) (increase({records}{{outcome=~"ok|failed"}}[5m])) > 0',
            limits.no_progress_s,
            "critical",
            "{{ $labels.instance }} has chunks, and gets no record done.",
            f"No record got an outcome for {limits.no_progress_s:g} seconds, a model's load included.",
            "Look at its log: a model that is still being loaded, an engine that hangs, a prepare or finish function "
            "that waits for something. --chunk_timeout_s ends such chunks.",
        ),
        _rule(
            "FlyteBatchEngineRestarts",
            f"sum by (job) (increase({metrics.ENGINE_DEATHS.name}[1h])) >= {limits.engine_deaths}",
            0,
            "warning",
            '{{ $value | printf "%.0f" }} engines of {{ $labels.job }} died within an hour.',
            "Engines are built anew, and their chunks go on; but what is being loaded answers nothing.",
            "Look at the log for EngineDied: out of memory wants a smaller budget (target_tokens_in_flight, "
            "gpu_memory_utilization) or a larger GPU; an XID of the driver wants another machine.",
        ),
        _rule(
            "FlyteBatchLatency",
            f"histogram_quantile(0.99, sum by (job, le) ({latency})) > {limits.p99_latency_s:g}",
            300,
            "warning",
            "1% of the records of direct callers of {{ $labels.job }} take {{ $value | humanizeDuration }} or more.",
            f"Their p99 from queue to outcome was above {limits.p99_latency_s:g} seconds for five minutes.",
            "Find the rate that a replica can keep with `flyte batch load`, and add replicas, or shed load with "
            'overflow="reject" or a timeout_s.',
        ),
        _rule(
            "FlyteBatchLoopBlocked",
            f"sum by ({process}) (rate({metrics.LOOP_BLOCKED.name}_sum[10m])) > {limits.loop_blocked}",
            0,
            "warning",
            "The event loop of {{ $labels.instance }} stands still {{ $value | humanizePercentage }} of the time.",
            "All calls of the process wait while one holds its event loop.",
            "The log names the function: run it on a thread (await asyncio.to_thread(...)), or use the library's async "
            "functions.",
        ),
    )


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(content: Mapping[str, Any]) -> str:
    dumped: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return dumped
