"""What only a measurement can show: that a load test was passed, and what a run will cost."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.workflow import Environment, Workflow
from flyte_batch.errors import BadInput
from flyte_batch.load.report import LoadReport, conclusions
from flyte_batch.report.formats import seconds
from flyte_batch.report.run_log import RunLog

OLDEST_LOAD_TEST_DAYS = 30


@dataclass(frozen=True)
class Evidence:
    """What is known beside the workflow.

    Attributes:
        load_test: of ``flyte batch load --output``.
        run: the log of an earlier run.
        model: that production runs use; None takes the default of the workflow's parameter ``model``.
        rows: of a production run; None takes those of ``run``.
        rows_per_s: that one replica answers a second; None takes what ``run`` measured.
        price_per_hour: of one replica, in any currency; None takes that of ``run``.

    Raises:
        BadInput: a number that is not positive.
    """

    load_test: LoadReport | None = None
    run: RunLog | None = None
    model: str | None = None
    rows: int | None = None
    rows_per_s: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "rows_per_s", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"--{name} must be a positive number, got {value}")


def check_load_test(workflow: Workflow, evidence: Evidence) -> Iterator[Finding]:
    test = evidence.load_test
    if test is None:
        remedy = "flyte batch load --output FILE, or workflows/load.py on a replica; then --load_test FILE"
        yield Finding("load_test.level", "", "missing", "no load test was shown", remedy)
        return
    said, kept = conclusions(test), test.limit.highest_kept
    if kept is None:
        yield Finding("load_test.level", "", "missing", said[0], "faster replicas, a smaller model, or a lower level")
    elif not kept.is_shown:
        yield Finding("load_test.level", "", "could not tell", " ".join(said[:2]))
    else:
        yield Finding("load_test.level", "", "ok", said[0])
    yield _age(test)
    yield _model(workflow, test, evidence.model)
    yield from _hardware(workflow, test)


def _age(test: LoadReport) -> Finding:
    days = (time.time() - datetime.fromisoformat(test.started_at).timestamp()) / 86400
    evidence = f"of {test.started_at[:10]}, {days:.0f} days old"
    if days > OLDEST_LOAD_TEST_DAYS:
        return Finding("load_test.age", "", "missing", evidence, "make a new one: models, images and machines change")
    return Finding("load_test.age", "", "ok", evidence)


def _model(workflow: Workflow, test: LoadReport, told: str | None) -> Finding:
    check, tested = "load_test.model", test.test.choice.model
    defaults = {task.inputs["model"] for task in workflow.entries if isinstance(task.inputs.get("model"), str)}
    used = told or (str(next(iter(defaults))) if len(defaults) == 1 else None)
    if test.test.choice.engine == "fake":
        return Finding(check, "", "missing", "the fake engine was tested, which only echoes", "test the real engine")
    if used is None:
        return Finding(check, "", "could not tell", f"{tested} was tested; which model runs is not said: give --model")
    if used != tested:
        return Finding(check, "", "missing", f"{tested} was tested, {used} is what runs", "test the model that runs")
    return Finding(check, "", "ok", tested)


def _hardware(workflow: Workflow, test: LoadReport) -> Iterator[Finding]:
    check, remedy = "load_test.hardware", "test on a replica: workflows/load.py"
    if not workflow.replicas:
        yield Finding(check, "", "could not tell", f"tested on {test.hardware}; no environment has replicas")
    shown = {each.name: _is_like(each, test.hardware.gpus) for each in workflow.replicas}
    for each in workflow.replicas:
        evidence = f"tested on {test.hardware}; a replica has {_gpu(each)}"
        if shown[each.name]:
            yield Finding(check, each.name, "ok", evidence)
        elif shown[each.name] is None or True in shown.values():
            yield Finding(check, each.name, "could not tell", f"{evidence}, of which that says nothing")
        else:
            yield Finding(check, each.name, "missing", f"{evidence}, of which that says nothing", remedy)


def _gpu(replica: Environment) -> str:
    gpu = replica.resources.get("gpu")
    if gpu is None:
        return "no GPU"
    return f"{gpu} of any kind" if str(gpu).isdecimal() else str(gpu)


def _is_like(replica: Environment, gpus: Sequence[str]) -> bool | None:
    """Whether what was measured on these GPUs holds for a replica; None where it has a number of GPUs of any kind."""
    if "gpu" not in replica.resources:
        return not gpus
    kind = str(replica.resources["gpu"]).partition(":")[0]
    if kind.isdecimal():
        return None if gpus else False
    return _is_of(kind, ", ".join(gpus))


def _is_of(kind: str, gpus: str) -> bool:
    """Whether Flyte's name of a GPU, ``A100_80G`` say, stands for one of these: ``1 x NVIDIA A100-SXM4-80GB``."""
    words = kind.removesuffix(" shared").split("_")
    return all(re.search(rf"(?<![^\W_]){re.escape(word)}B?(?![^\W_])", gpus, re.IGNORECASE) for word in words)


def check_cost(workflow: Workflow, evidence: Evidence) -> Iterator[Finding]:
    """Of the replicas' time at work: containers that start or stand idle, and the driver, are not in it."""
    check, run = "cost_projection.bill", evidence.run
    rows = evidence.rows or (run.plan.rows if run else None)
    rate = evidence.rows_per_s or (_measured(run) if run else None)
    price = evidence.price_per_hour or (run.plan.price_per_hour if run else None)
    lacking = [name for name, value in (("rows", rows), ("rows_per_s", rate), ("price_per_hour", price)) if not value]
    if not rows or not rate or not price:
        options = " ".join(f"--{name} N" for name in lacking)
        evidence_said = (
            "nothing was said of rows, speed and price" if len(lacking) == 3 else f"not known: {', '.join(lacking)}"
        )
        remedy = f"{options}, or --run OUTPUT of an earlier run with a price"
        yield Finding(check, "", "missing", evidence_said, remedy)
        return
    hours = rows / rate / 3600
    measured_on = _gpus(run) if run and not evidence.rows_per_s else None
    source = "told" if measured_on is None else f"measured on {', '.join(measured_on) or 'no GPU that was seen'}"
    unlike = [each for each in workflow.replicas if measured_on is not None and not _is_like(each, measured_on)]
    holds = not workflow.replicas or len(unlike) < len(workflow.replicas)
    yield Finding(
        check, "", "ok" if holds else "could not tell",
        f"{rows:,} rows at {rate:,.4g} rows/s a replica ({source}) are {seconds(3600 * hours)} of replicas: "
        f"{hours * price:,.2f} at {price:,.4g} an hour, {1e6 * price / 3600 / rate:,.2f} a million rows",
    )  # fmt: skip
    check = "cost_projection.time"
    for each in workflow.replicas:
        assert each.pool is not None  # noqa: S101 - what makes it one of `replicas`
        if each in unlike:
            said = f"{source}; a replica has {_gpu(each)}: tell its speed (--rows_per_s N), or show a run of its own"
            yield Finding(check, each.name, "could not tell", said)
            continue
        whole, idle = seconds(3600 * hours / each.pool.most), each.pool.idle_ttl_s / 3600 * price
        yield Finding(
            check, each.name, "ok",
            f"{whole} with all {each.pool.most}; standing idle after a run costs at most "
            f"{idle * each.pool.most:,.2f} more",
        )  # fmt: skip


def _gpus(run: RunLog) -> list[str]:
    """Names of the GPUs that the run's replicas saw."""
    return sorted({use.name for use in run.gpus})


def _measured(run: RunLog) -> float | None:
    """Rows that a replica of the run answered a second, its model's load and its tail included."""
    return run.rows_done / run.replica_seconds if run.replica_seconds > 0 and run.rows_done else None
