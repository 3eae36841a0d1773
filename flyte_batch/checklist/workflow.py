"""What a workflow file declares, read from Flyte's objects by their attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flyte_batch.checklist.code import names_ours
from flyte_batch.replica import environments_called


@dataclass(frozen=True)
class Image:
    """What a container holds.

    Attributes:
        base: the base image's address, or that of an image that is taken as it is.
        requirements: what is installed by name, as it is written, and projects without a lock file.
        opaque: why more may be in it than ``requirements`` tells; "" if not.
        env_vars: set in it.
    """

    base: str
    requirements: tuple[str, ...] = ()
    opaque: str = ""
    env_vars: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Pool:
    """How an environment's containers are reused; times in seconds."""

    fewest: int
    most: int
    concurrency: int
    idle_ttl_s: float
    scaledown_ttl_s: float
    scope: str


@dataclass(frozen=True)
class Trigger:
    """What starts a task.

    Attributes:
        name: of the trigger.
        schedule: its cron expression, or ``every N minutes``; "" if it has none.
        interval_s: seconds between two of its runs at least; None where that is unknown.
        phases: those in which somebody is told; None if a named rule on the cluster says so.
        env_vars: of its runs.
        inputs: that it gives.
    """

    name: str
    schedule: str
    interval_s: float | None
    phases: tuple[str, ...] | None
    env_vars: Mapping[str, str]
    inputs: Mapping[str, object]


@dataclass(frozen=True)
class Task:
    """A Flyte task.

    Attributes:
        name: ``environment.function``.
        environment: name of its environment.
        is_entry: whether the workflow file itself names it.
        retries: after the first attempt.
        has_backoff: whether retries wait.
        timeout_s: longest that an attempt, or all of them, may take; None if unbounded.
        report: whether it shows a report in Flyte's UI.
        links: names of its links.
        triggers: that start it.
        inputs: name -> default, `REQUIRED` if there is none.
        returns: whether it returns something.
        function: the user's.
        calls: names of the environments whose tasks it may call.
    """

    name: str
    environment: str
    is_entry: bool
    retries: int
    has_backoff: bool
    timeout_s: float | None
    report: bool
    links: tuple[str, ...]
    triggers: tuple[Trigger, ...]
    inputs: Mapping[str, object]
    returns: bool
    function: Callable[..., object] | None
    calls: frozenset[str]


REQUIRED = object()

_ANSWERING = {
    *("run", "infer", "Pipeline"),
    *("ContinuousBatcher", "DynamicBatcher", "EngineBatcher", "TokenBatcher"),
}
"""Names of flyte_batch, without one of which no record is answered."""


@dataclass(frozen=True)
class Environment:
    """A Flyte environment.

    Attributes:
        name: of it.
        pool: how its containers are reused; None if each is used once.
        resources: kind -> amount, of those that are given.
        image: of its containers.
        env_vars: of its containers.
        tasks: in it.
    """

    name: str
    pool: Pool | None
    resources: Mapping[str, object]
    image: Image
    env_vars: Mapping[str, str]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Workflow:
    """A workflow file."""

    path: str
    environments: tuple[Environment, ...]

    @property
    def replicas(self) -> list[Environment]:
        """Environments whose containers are reused."""
        return [each for each in self.environments if each.pool is not None]

    @property
    def tasks(self) -> list[Task]:
        return [task for environment in self.environments for task in environment.tasks]

    @property
    def answering(self) -> list[Task]:
        """Tasks of replicas that return answers, or counts of them; those that return nothing wake replicas."""
        return [task for environment in self.replicas for task in environment.tasks if task.returns]

    @property
    def drivers(self) -> list[Task]:
        """Tasks that call tasks of replicas."""
        pools = {each.name for each in self.replicas}
        return [task for task in self.tasks if task.calls & pools]

    @property
    def answers_rows(self) -> bool:
        """Whether a task, or a function that one names, answers records by flyte_batch."""
        return any(names_ours(task.function, _ANSWERING) for task in self.tasks)

    @property
    def entries(self) -> list[Task]:
        """Tasks that the file itself names and that run in containers of their own: what users start."""
        pools = {each.name for each in self.replicas}
        return [task for task in self.tasks if task.is_entry and task.environment not in pools]


def describe(path: str, environments: Iterable[Any], entries: Iterable[Any]) -> Workflow:
    """A workflow by its Flyte objects.

    Args:
        path: of its file.
        environments: `flyte.TaskEnvironment` objects; those that they depend on are found.
        entries: Flyte tasks that the file names.
    """
    named = {id(each) for each in entries}
    found: dict[str, Any] = {}
    todo = list(environments)
    while todo:
        each = todo.pop(0)
        if hasattr(each, "tasks") and each.name not in found:
            found[each.name] = each
            todo += each.depends_on
    return Workflow(path, tuple(_environment(each, named) for each in found.values()))


def _environment(environment: Any, named: set[int]) -> Environment:
    policy, resources = environment.reusable, environment.resources
    pool = None
    if policy is not None:
        fewest, most = policy.replicas
        seconds = policy.idle_ttl.total_seconds(), policy.scaledown_ttl.total_seconds()
        pool = Pool(fewest, most, policy.concurrency, *seconds, policy.scope)
    given = {kind: getattr(resources, kind, None) for kind in ("cpu", "memory", "gpu", "disk")}
    return Environment(
        name=environment.name,
        pool=pool,
        resources={kind: _amount(amount) for kind, amount in given.items() if amount is not None},
        image=_image(environment.image),
        env_vars=dict(environment.env_vars or {}),
        tasks=tuple(_task(each, id(each) in named) for each in environment.tasks.values()),
    )


def _amount(amount: Any) -> object:
    """Of a resource; that of a `flyte.Device` as its short form, ``A100:2``."""
    return f"{amount.device}:{amount.quantity}" if hasattr(amount, "device") else amount


def _task(task: Any, is_entry: bool) -> Task:
    function = getattr(task, "func", None)
    return Task(
        name=task.name,
        environment=task.parent_env_name or "",
        is_entry=is_entry,
        retries=task.retries.count,
        has_backoff=task.retries.backoff is not None,
        timeout_s=_timeout(task.timeout),
        report=bool(task.report),
        links=tuple(link.name for link in task.links),
        triggers=tuple(_trigger(each) for each in task.triggers),
        inputs={name: _default(default) for name, (_, default) in task.native_interface.inputs.items()},
        returns=bool(task.native_interface.outputs),
        function=function,
        calls=frozenset(environments_called(function)),
    )


def _default(default: object) -> object:
    return REQUIRED if isinstance(default, type) else default  # inspect.Parameter.empty and Flyte's markers are classes


def _timeout(timeout: Any) -> float | None:
    """The shortest bound, in seconds."""
    bounds = [getattr(timeout, name, None) for name in ("max_runtime", "deadline")]
    parts = [timeout] if isinstance(timeout, (int, timedelta)) else bounds
    seconds = [part.total_seconds() if isinstance(part, timedelta) else part for part in parts if part]
    return min(seconds) if seconds else None


def _trigger(trigger: Any) -> Trigger:
    schedule, interval = _schedule(trigger.automation)
    told = trigger.notifications
    phases: tuple[str, ...] | None = ()
    if told is not None and not hasattr(told, "on_phase") and not isinstance(told, (tuple, list)):
        phases = None  # a rule that the cluster knows by name
    elif told is not None:
        each_of = told if isinstance(told, (tuple, list)) else (told,)
        phases = tuple(str(getattr(phase, "value", phase)).lower() for each in each_of for phase in each.on_phase)
    return Trigger(trigger.name, schedule, interval, phases, dict(trigger.env_vars or {}), dict(trigger.inputs or {}))


def _schedule(automation: Any) -> tuple[str, float | None]:
    if hasattr(automation, "interval_minutes"):
        return f"every {automation.interval_minutes} minutes", 60.0 * automation.interval_minutes
    if not hasattr(automation, "expression"):
        return "", None
    return automation.expression, _cron_interval(automation.expression)


def _cron_interval(expression: str) -> float | None:
    """Seconds between two times of a plain cron expression, at least; None for those that list times."""
    fields = expression.split()
    if len(fields) != 5:
        return {"@hourly": 3600.0, "@daily": 86400.0, "@midnight": 86400.0, "@weekly": 604800.0}.get(expression)
    minute, hour = fields[:2]
    every_minutes, every_hours = minute.removeprefix("*/"), hour.removeprefix("*/")
    if minute == "*":
        return 60.0
    if minute.startswith("*/") and every_minutes.isdecimal():
        return 60.0 * int(every_minutes)
    if not minute.isdecimal():
        return None
    if hour == "*":
        return 3600.0
    if hour.startswith("*/") and every_hours.isdecimal():
        return 3600.0 * int(every_hours)
    return 86400.0 if hour.isdecimal() else None


def _image(image: Any) -> Image:
    if image is None or isinstance(image, str):
        return Image(image or "auto", opaque="an image that was built elsewhere")
    requirements: list[str] = []
    env_vars: dict[str, str] = {}
    opaque = "a Dockerfile builds it" if image.dockerfile else ""
    if not image._layers and not opaque:
        opaque = "an image that was built elsewhere"
    for layer in image._layers:
        env_vars |= dict(getattr(layer, "env_vars", None) or ())
        if type(layer).__name__ != "AptPackages":
            requirements += getattr(layer, "packages", None) or ()
        if getattr(layer, "file", None):
            requirements += _lines(layer.file)
        project = getattr(layer, "pyproject", None) or getattr(layer, "manifest", None)
        if project and not any(getattr(layer, lock, None) for lock in ("uvlock", "poetry_lock", "pixi_lock")):
            requirements.append(f"{project} (without a lock file)")
        elif project:
            opaque = f"what {project} installs"
        if any("install" in command for command in getattr(layer, "commands", None) or ()):
            opaque = "its commands install something"
    return Image(image.base_image or "", tuple(requirements), opaque, env_vars)


def _lines(file: Path) -> list[str]:
    """The requirements of a file of pip's."""
    try:
        text = Path(file).read_text()
    except OSError:
        return [str(file)]
    lines = [line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-"))]
