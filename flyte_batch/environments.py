"""The wiring to Flyte: task environments for replicas and drivers. With the CLI the only importer of flyte.

A *replica environment* is a pool of warm containers: each is one process that hosts one engine per model and takes
``concurrency`` chunks at once, which share its batcher. A *driver environment* is a small container that fans chunks
out; it depends on the replica environments that it calls.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import flyte

import flyte_batch
from flyte_batch import flyte_ui
from flyte_batch.errors import BadInput
from flyte_batch.monitoring import backends
from flyte_batch.replica import (
    DEFAULT_STALL_LIMIT_S,
    VARIABLE,
    ReplicaSettings,
    check_own_slots,
    environments_called,
)

DEFAULT_CONCURRENCY = 10
DEFAULT_IDLE_TTL_S = 300
DEFAULT_SCALEDOWN_TTL_S = 30

_PACKAGE = Path(flyte_batch.__file__).parent

_LOG_WITH_ACTIONS = {"FLYTE_RESET_ROOT_LOGGER": "1", "DISABLE_RICH_LOGGING": "1"}
"""Has Flyte print run and action before the lines of all loggers, not only its own; Rich would take them for markup."""

_OTEL = (*backends.OTLP_ENDPOINTS, "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME")

logger = logging.getLogger(__name__)

flyte_ui.connect()


def _include() -> tuple[str, ...]:
    """The whole package, for Flyte's code bundle, where it is not installed but lies beside the workflow.

    A bundle carries the modules that happen to be imported, and hides what the image has of the same package. Ours are
    imported when they are first needed, so without this a replica would miss most of them. File by file, because from a
    folder Flyte leaves out what git ignores or does not know yet (it takes the ``*`` in any tool's own .gitignore,
    hypothesis' say, for the whole tree).
    """
    if {"site-packages", "dist-packages"} & set(_PACKAGE.parts):  # the second is Debian's
        return ()
    return tuple(sorted(str(path) for path in _PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"))


def replica_environment(
    name: str,
    *,
    image: flyte.Image | str,
    gpu: str | int | None = None,
    cpu: str | int | None = None,
    memory: str | None = None,
    disk: str | None = None,
    shm: str | None = "auto",
    replicas: int | tuple[int, int] = (1, 2),
    concurrency: int = DEFAULT_CONCURRENCY,
    idle_ttl: int = DEFAULT_IDLE_TTL_S,
    scaledown_ttl: int = DEFAULT_SCALEDOWN_TTL_S,
    scope: Literal["global", "run"] = "global",
    stall_limit_s: float = DEFAULT_STALL_LIMIT_S,
    monitoring: Sequence[str] | str = (),
    env_vars: dict[str, str] | None = None,
    secrets: Any = None,
) -> flyte.TaskEnvironment:
    """An environment whose containers are reused (`flyte.ReusePolicy`), for tasks that infer chunks.

    Args:
        name: the environment's name, unique in the project.
        image: what the replicas run; it must hold the engine and ``unionai-reuse`` (see ``images/``).
        gpu: device and count, such as ``"A10G:1"``, ``"L4:1"`` or ``1``; None for CPU engines.
        cpu: cores, such as ``4``.
        memory: such as ``"16Gi"``.
        disk: such as ``"50Gi"``; models from Hugging Face land on it.
        shm: shared memory, such as ``"8Gi"``; several GPUs of one engine talk through it, and a container has 64 MiB
            of its own. ``"auto"`` bounds it by the container's memory.
        replicas: how many containers: a fixed number, or (fewest, most) to scale between; 0 as the fewest keeps none
            while there is nothing to do.
        concurrency: chunks that one replica takes at once. They share the engine, so several are needed to fill it:
            while one chunk is read or written, the others keep the device busy.
        idle_ttl: seconds (at least 30) until an idle environment shuts down; longer than a model's load, or every run
            starts cold.
        scaledown_ttl: seconds (at least 30) until a replica that is idle while others work is removed, down to the
            fewest.
        scope: ``"global"`` shares the replicas among runs, ``"run"`` gives every run its own, which start cold.
        stall_limit_s: a replica whose event loop or whose engine stood still for so many seconds ends itself, so that a
            sound one takes its place; Flyte's retries do its calls again. Longer than the longest load of a model that
            blocks the loop.
        monitoring: backends of the replicas, such as ``["logs", "prometheus:0.0.0.0:9464", "otel"]``, or one text with
            commas; see `flyte_batch.monitoring.backends`. The image must hold the extra ``monitoring``. With ``otel``
            the containers get the ``OTEL_EXPORTER_OTLP_ENDPOINT`` of the process that declares the environment.
        env_vars: environment variables of the containers. ``FLYTE_BATCH_REPLICA`` is added, and, unless given, what has
            Flyte print run and action before every line of a log.
        secrets: Flyte's secret request, such as a token for a model hub.

    Raises:
        ValueError: a number or a GPU that cannot work, named with its remedy.
        BadInput: a monitoring backend that there is not.

    Logs a warning about an image that lacks ``unionai-reuse``.
    """
    fewest, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if most < 1 or fewest < 0 or fewest > most:
        raise ValueError(f"replicas must be a positive number or (fewest, most), got {replicas}")
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1 chunk per replica, got {concurrency}")
    _require_known_gpu(gpu)
    if stall_limit_s <= 0:
        raise ValueError(f"stall_limit_s must be positive, got {stall_limit_s}")
    settings = ReplicaSettings(name, gpu, most, concurrency, idle_ttl, stall_limit_s)
    environment = flyte.TaskEnvironment(
        name=name,
        image=image,
        resources=flyte.Resources(cpu=cpu, memory=memory, gpu=gpu, disk=disk, shm=shm),  # type: ignore[arg-type]
        reusable=flyte.ReusePolicy(
            replicas=replicas, concurrency=concurrency, idle_ttl=idle_ttl, scaledown_ttl=scaledown_ttl, scope=scope
        ),
        env_vars={**_LOG_WITH_ACTIONS, **_backends(monitoring), **(env_vars or {}), **settings.variable()},
        secrets=secrets,
        include=_include(),
    )
    check_environment(environment)
    return environment


def _backends(given: Sequence[str] | str) -> dict[str, str]:
    """Variables for these backends, some of OpenTelemetry's own among them; not its headers, which are secrets."""
    value = backends.check_backends(given)
    if not value:
        return {}
    traced = "otel" in backends.named(value)
    return {name: os.environ[name] for name in _OTEL if traced and name in os.environ} | {backends.VARIABLE: value}


def _require_known_gpu(gpu: str | int | None) -> None:
    """Raise for a device that Flyte does not know, in fewer words than its own: it lists all 160."""
    if not isinstance(gpu, str):
        return
    kinds = get_type_hints(flyte.Resources)["gpu"]
    known = [name for kind in get_args(kinds) for name in get_args(kind) if isinstance(name, str)]
    if gpu not in known:
        spelled = {name.upper(): name for name in known}
        close = [gpu.upper(), f"{gpu.upper()}:1", *difflib.get_close_matches(gpu.upper(), spelled, 1, 0.7)]
        right = next((spelled[name] for name in close if name in spelled), None)
        hint = f"did you mean {right}? " if right else ""
        raise BadInput(f"Flyte knows no gpu {gpu!r}: {hint}write device and count, such as A10G:1, L4:1 or H100:8")


def driver_environment(
    name: str,
    *,
    image: flyte.Image | str = "auto",
    depends_on: Sequence[flyte.Environment] = (),
    cpu: str | int = 1,
    memory: str = "2Gi",
    disk: str | None = None,
    monitoring: Sequence[str] | str = (),
    env_vars: dict[str, str] | None = None,
) -> flyte.TaskEnvironment:
    """An environment for the task that plans a run and fans its chunks out.

    Its own container, never a replica: a driver that occupied a replica's slot while it waits for chunks could starve
    the very pool that it waits for.

    Args:
        name: the environment's name, unique in the project.
        image: what the driver runs; it needs flyte_batch, but no engine.
        depends_on: the replica environments whose tasks it calls; they are deployed with it.
        cpu: cores.
        memory: such as ``"2Gi"``; rows never pass through a driver, so it stays small.
        disk: such as ``"50Gi"``, for what the task itself puts there.
        monitoring: backends of the driver, as for `replica_environment`.
        env_vars: environment variables of the container. A driver imports the workflow's file again: whatever that
            reads from the environment of the shell that submits it belongs here.
    """
    return flyte.TaskEnvironment(
        name=name,
        image=image,
        resources=flyte.Resources(cpu=cpu, memory=memory, disk=disk),
        env_vars={**_LOG_WITH_ACTIONS, **_backends(monitoring), **(env_vars or {})},
        depends_on=list(depends_on),
        include=_include(),
    )


def slots(environment: flyte.TaskEnvironment) -> tuple[int, int]:
    """(most replicas, chunks per replica) of a replica environment: how wide a driver may fan out.

    Raises:
        BadInput: the environment cannot work, see `check_environment`.
    """
    policy = check_environment(environment)
    return policy.max_replicas, policy.concurrency


def check_environment(environment: flyte.TaskEnvironment) -> flyte.ReusePolicy:
    """Refuse an environment of reused containers that cannot work; log a warning about what seldom does.

    For any environment with a `flyte.ReusePolicy`, whether `replica_environment` made it or not, best called after its
    tasks are declared: `slots` does. What Flyte refuses at the declaration is not looked at again (docs/replicas.md).

    Returns:
        How its containers are reused.

    Raises:
        BadInput: its containers are not reused, it may have none, its only slot is taken by a task that waits for
            another one of it, or a task asks for other containers than the environment's.
    """
    name, policy = environment.name, environment.reusable
    if policy is None:
        raise BadInput(f"environment {name!r} has no ReusePolicy; make it with replica_environment()")
    if policy.max_replicas < 1:
        raise BadInput(f"environment {name!r} may have no replica at all: raise the most of replicas={policy.replicas}")
    for task in environment.tasks.values():
        if task.reusable is None:  # it runs in a container of its own
            continue
        if (task.resources, task.reusable) != (environment.resources, policy):
            raise BadInput(
                f"task {task.name!r} asks for other containers than its environment, whose resources or ReusePolicy "
                "changed after the task: give them when the environment is made, one environment for each kind"
            )
        if name in environments_called(getattr(task, "func", None)):
            check_own_slots(f"task {task.name!r}", name, policy.max_replicas * policy.concurrency)
    _check_variable(environment, policy)
    if _surely_lacks_reuse(environment.image):
        _warn_once(
            f"the image of environment {name!r} installs no unionai-reuse, without which no replica starts on a "
            "cluster: add .with_pip_packages('unionai-reuse'), or take an image of images/"
        )
    return policy


def _check_variable(environment: flyte.TaskEnvironment, policy: flyte.ReusePolicy) -> None:
    """Warn if replicas would be told wrong things about themselves."""
    text = (environment.env_vars or {}).get(VARIABLE)
    told = ReplicaSettings(**json.loads(text)) if text else None
    right = environment.name, policy.max_replicas, policy.concurrency
    if told is not None and (told.environment, told.replicas, told.concurrency) != right:
        _warn_once(
            f"environment {environment.name!r} tells its replicas by {VARIABLE} that they are of {told.environment!r}, "
            f"{told.replicas} x {told.concurrency} slots: make it with replica_environment(), not with clone_with()"
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


_FLYTES_BASE = re.compile(r"(ghcr\.io/flyteorg/flyte|python):")
_BRINGS_REUSE = re.compile(r"(unionai[-_.]reuse|flyte[-_.]batch)(?!\w)", re.IGNORECASE)
_BRINGS_ANYTHING = re.compile(r"\binstall\b|\.whl\b|://|^\s*(-r|-e|--req|--edit|\.|/)", re.MULTILINE)


def _surely_lacks_reuse(image: flyte.Image | str | None) -> bool:
    """Whether ``unionai-reuse`` is surely missing: the image is Flyte's own, and nothing that is added brings it.

    Flyte's own holds Flyte and no more, and is what ``"auto"`` means unless a configuration names another one. An
    address, a Dockerfile, another base, and commands that install something can't be looked into: nothing is said.
    """
    if not isinstance(image, flyte.Image):
        return image == "auto"
    flytes_own = _FLYTES_BASE.match(image.base_image or "") is not None
    return flytes_own and not any(_may_bring_reuse(layer) for layer in image._layers)


def _may_bring_reuse(layer: Any) -> bool:
    """Whether a layer of an image may install ``unionai-reuse``."""
    if hasattr(layer, "wheel_dir"):  # what wheels require is inside of them
        return True
    names = [name for field in ("packages", "commands", "lines") for name in getattr(layer, field, None) or ()]
    files = {field: getattr(layer, field) for field in _FILES if getattr(layer, field, None)}
    try:
        texts = {field: Path(file).read_text() for field, file in files.items()}
    except OSError:
        return True
    if _BRINGS_ANYTHING.search("\n".join([*names, texts.get("file", "")])):
        return True
    return any(_BRINGS_REUSE.search(text) for text in (*names, *texts.values()))


_FILES = ("file", "pyproject", "uvlock", "poetry_lock", "manifest", "pixi_lock", "script")
"""Attributes of Flyte's layers: files that say what is installed. The first is pip's, which may name others."""


def runs_here() -> bool:
    """Whether tasks that this one calls run in this process, as in local mode, not in containers of a cluster."""
    context = flyte.ctx()
    return context is None or context.mode != "remote"


def require_shared(**paths: str) -> None:
    """Refuse paths that the containers of a cluster do not share; in local mode everything is on one machine.

    A ``file://`` URI is taken as the user's word that all containers have the same disk there.

    Args:
        paths: the option's name and its path.

    Raises:
        BadInput: the run is remote and a path has no scheme such as ``s3://``.
    """
    if runs_here():
        return
    for option, path in paths.items():
        if "://" not in path:
            raise BadInput(
                f"--{option} {path} lies on one container's own disk: on a cluster name a path that all of them reach, "
                "such as s3://bucket/folder, or file:///mnt/folder if all of them mount the same disk there"
            )
