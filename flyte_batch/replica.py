"""What a process knows of the replica that it is: its environment says so in an environment variable.

Set by `flyte_batch.environments.replica_environment`, so a process without it is none of our replicas: local mode, a
driver, a script. And what a task does to its own environment by waiting for other tasks of it.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from flyte_batch.errors import BadInput

VARIABLE = "FLYTE_BATCH_REPLICA"
"""Flyte tells pools of warm containers apart by what they run, environment variables included, but not by the kind of
GPU nor by concurrency: without this a run that asks for an L4 might be served by a warm A10G."""

DEFAULT_STALL_LIMIT_S = 1800.0

_EXECUTOR = "unionai_actor_executor"
"""What runs the tasks of a reused container. A container that is used once may carry the variable as well: that of a
task with ``reusable="off"``, or of an environment that was cloned from a replica's."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaSettings:
    """How a replica's environment was declared.

    Attributes:
        environment: its name.
        gpu: device and count; None for none.
        replicas: most replicas of the environment.
        concurrency: chunks that one replica takes at once.
        idle_ttl_s: seconds until an idle environment shuts down.
        stall_limit_s: seconds that its event loop or its engine may stand still before it ends itself.
    """

    environment: str
    gpu: str | int | None = None
    replicas: int = 1
    concurrency: int = 1
    idle_ttl_s: float = 300
    stall_limit_s: float = DEFAULT_STALL_LIMIT_S

    def variable(self) -> dict[str, str]:
        """The environment variable for the containers."""
        return {VARIABLE: json.dumps(asdict(self), sort_keys=True)}


def this_replica() -> ReplicaSettings | None:
    """The settings of the replica that this process is; None if it is none."""
    text = os.environ.get(VARIABLE)
    return ReplicaSettings(**json.loads(text)) if text else None


def check_driver(run_chunk: object) -> None:
    """Whether a driver that runs in this process leaves slots for the chunks that it gives away by ``run_chunk``.

    Raises:
        BadInput: it holds the only slot that they could run in.
    """
    here = this_replica()
    if here is not None and _EXECUTOR in sys.modules and here.environment in environments_called(run_chunk):
        check_own_slots("this driver", here.environment, here.replicas * here.concurrency)


def check_own_slots(caller: str, environment: str, slots: int) -> None:
    """Warn about a task that waits for tasks of its own environment, whose slots it takes.

    Raises:
        BadInput: the environment has one slot.
    """
    remedy = "Run it in a container of its own (fb.driver_environment)"
    if slots == 1:
        raise BadInput(
            f"{caller} runs in the only slot (replicas x concurrency) of environment {environment!r}, and waits for "
            f"tasks of the same environment, which would never start. {remedy}, or raise replicas or concurrency"
        )
    logger.warning(
        "%s takes one of the %d slots (replicas x concurrency) of environment %r while it waits for tasks of the same "
        "environment; as many at once as there are slots would wait for each other for ever. %s",
        caller, slots, environment, remedy,
    )  # fmt: skip


def environments_called(function: object) -> set[str]:
    """The environments whose Flyte tasks a function may call: it is one, or names one, or a function that does."""
    found: set[str] = set()
    seen: dict[int, object] = {}
    todo: list[Any] = [function]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        # Static: a name may be a lazy module, which an ordinary look would load.
        environment = inspect.getattr_static(each, "parent_env_name", None)
        if isinstance(environment, str):
            found.add(environment)
        elif isinstance(each, partial):
            todo += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, FunctionType):
            todo += _named_by(each)
    return found


def _named_by(function: FunctionType) -> Iterator[object]:
    yield from (function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # assigned later
            yield cell.cell_contents


def _names(code: CodeType) -> set[str]:
    """Global names in a function's code; ``co_names`` has those of attributes too."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    used = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return used.union(*map(_names, inner))
