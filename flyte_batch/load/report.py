"""The evidence of a load test: what was measured, on what, and what it comes to in words."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from flyte_batch.cores import available_cores
from flyte_batch.errors import BadInput
from flyte_batch.load.generator import Latencies, LoadResult
from flyte_batch.load.levels import CONFIDENCE, Objective
from flyte_batch.load.limits import Limit
from flyte_batch.load.plan import LoadTest
from flyte_batch.monitoring.gpu import GpuSampler
from flyte_batch.replica import this_replica
from flyte_batch.versions import versions

TABLE_HEADER = "".join(f"{name:>8}" for name in ("rate/s", "p50 ms", "p99 ms", "errors", "avail."))


@dataclass(frozen=True)
class Hardware:
    """What a load test runs on.

    Attributes:
        processor: its name.
        cores: that the process may use.
        gpus: by kind: ``2 x NVIDIA L4``, or as an environment declares them, ``L4:2``.
    """

    processor: str
    cores: int
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.processor, f"{self.cores} core{'s' if self.cores > 1 else ''}", *self.gpus])


@dataclass(frozen=True)
class LoadReport:
    """The evidence of a load test.

    Attributes:
        started_at: when, in UTC, by ISO 8601.
        took_s: seconds, the model's load not included.
        hardware: what it ran on.
        load_average: processes that wanted to run on that machine when it began: other work slows the engine.
        versions: of Python and of the packages that matter, by name.
        prompts: how many there were to choose from.
        test: what was asked.
        limit: what came out.
    """

    started_at: str
    took_s: float
    hardware: Hardware
    load_average: float
    versions: dict[str, str]
    prompts: int
    test: LoadTest
    limit: Limit

    @property
    def is_kept(self) -> bool:
        """Whether the level was kept at the rate that was asked for; in a search, at any."""
        return self.limit.highest_kept_per_s is not None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LoadReport:
        """
        Raises:
            BadInput: it is no report of a load test.
        """
        try:
            report = json.loads(text)
            datetime.fromisoformat(report["started_at"])
            typed = {
                "hardware": Hardware(**{**report["hardware"], "gpus": tuple(report["hardware"]["gpus"])}),
                "test": LoadTest.from_values(report["test"]),
                "limit": _limit(report["limit"]),
            }
            return cls(**{**report, **typed})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"this is no report of `flyte batch load --output` ({error}): make a new one") from error


def _limit(values: dict[str, Any]) -> Limit:
    return Limit(**{**values, "steps": tuple(_step(step) for step in values["steps"])})


def _step(values: dict[str, Any]) -> LoadResult:
    typed = {
        "latencies": Latencies(**values["latencies"]),
        "objectives": tuple(Objective(**objective) for objective in values["objectives"]),
    }
    return LoadResult(**{**values, **typed})


def prepare_output(path: str) -> None:
    """Make sure that a report can be written there, before a load test begins.

    Raises:
        BadInput: this process may not write there, or it is a folder.
    """
    from flyte_batch.data.storage import entry, locate, make_writable_folder

    there = entry(locate(path))
    if there is not None and not there.is_file:
        raise BadInput(f"--output {path} is a folder: name a file in it, {locate(path).child('load.json')} say")
    make_writable_folder(locate(path).parent)


def write_report(report: LoadReport, path: str) -> None:
    """Write a report as JSON, whole or not at all.

    Raises:
        BadInput: this process may not write there.
        OSError: the disk is full, or the store away.
    """
    from flyte_batch.data.storage import locate, write_atomically

    write_atomically(locate(path), report.to_json().encode() + b"\n")


def read_report(path: str) -> LoadReport:
    """Read what `write_report` wrote.

    Raises:
        BadInput: there is no such file, or it holds something else; the message names it.
    """
    from flyte_batch.data.storage import locate, read_bytes

    try:
        return LoadReport.from_json(read_bytes(locate(path)).decode())
    except FileNotFoundError:
        raise BadInput(f"there is no report of a load test at {path}: flyte batch load --output {path}") from None
    except (BadInput, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from error


def table_row(step: LoadResult) -> str:
    """One load in 40 columns, under `TABLE_HEADER`; a star beside what breaks its objective."""
    broken = {objective.name for objective in step.broken}
    cells = (
        (f"{step.rate_per_s:,.0f}" if step.rate_per_s >= 100 else f"{step.rate_per_s:.3g}", ""),
        (_ms(step.latencies.p50_ms), "p50"),
        (_ms(step.latencies.p99_ms), "p99"),
        (_share(step.error_rate), "errors"),
        (_share(step.availability), "availability"),
    )
    return "".join(f"{text}{'*' if name in broken else ''}".rjust(8) for text, name in cells)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _share(value: float) -> str:
    """A percentage that says 0% and 100% only where it is exactly that."""
    if value in (0, 1):
        return f"{value:.0%}"
    return f"{min(value, 0.9999):.2%}" if value > 0.5 else f"{max(value, 0.0001):.2%}"


def conclusions(report: LoadReport) -> list[str]:
    """What a report comes to: a sentence on the level, those on how far it can be trusted, the machine."""
    limit, level = report.limit, report.test.level
    promise = (
        f"p50 < {level.p50_ms:g} ms, p99 < {level.p99_ms:g} ms, errors < {level.max_error_rate * 100:g}%, "
        f"availability > {level.min_availability * 100:g}%"
    )
    kept = limit.highest_kept
    if kept is None:
        verdict = f"is not kept at {limit.lowest_broken_per_s:g} requests/s: {limit.why}"
    elif report.test.rate_per_s is not None:
        verdict = f"is kept at {kept.rate_per_s:g} requests/s"
    elif limit.lowest_broken_per_s is None:
        verdict = f"is kept at every rate that was tried, up to {kept.rate_per_s:g} requests/s"
    else:
        verdict = f"is kept up to {kept.rate_per_s:g} requests/s, not at {limit.lowest_broken_per_s:g}: {limit.why}"
    lines = [f"The level ({promise}) {verdict}."]
    if kept is not None:
        lines += _doubts(kept)
    return [*lines, f"{report.hardware}; load average {report.load_average:.1f} at the start."]


def _doubts(kept: LoadResult) -> list[str]:
    lines = []
    few = [objective for objective in kept.objectives if not objective.is_shown]
    if few:
        needed = max(objective.requests_needed for objective in few)
        seconds = math.ceil(1.1 * needed / kept.rate_per_s)
        names = ", ".join(objective.name for objective in few)
        lines.append(
            f"{kept.requests:,} requests do not show it for {names} with {CONFIDENCE:.0%} confidence: "
            f"that takes {needed:,} without a bad one (--rate {kept.rate_per_s:g} --seconds {seconds})."
        )
    if kept.is_generator_late:
        lines.append(
            f"Arrivals ran late (p99 {kept.late_p99_ms:,.0f} ms, at most {kept.late_max_ms:,.0f} ms): the event loop "
            "was busy, and latencies include it."
        )
    return lines


def hardware() -> Hardware:
    """Of this process: GPUs are those that NVML finds here, else what the replica was declared with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    replica = this_replica()
    declared = (str(replica.gpu),) if replica is not None and replica.gpu is not None else ()
    return Hardware(next(named, "") or platform.machine(), available_cores(), _gpus() or declared)


def conditions(*packages: str) -> str:
    """What figures are true of, in a line: hardware, load average now, and versions, those of ``packages`` too."""
    found = versions()
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    named = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"{hardware()}; load average {os.getloadavg()[0]:.1f}; {named}"


def _gpus() -> tuple[str, ...]:
    """The GPUs that CUDA would use, counted by name. Blocks for some tenths of a second where there is one."""
    try:
        with GpuSampler() as sampler:
            counted = Counter(sample.name for sample in sampler.latest())
    except BadInput:  # no GPU, no driver, or no nvidia-ml-py
        return ()
    return tuple(f"{number} x {name}" for name, number in counted.items())
