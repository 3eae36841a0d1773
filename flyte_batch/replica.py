"""What a process knows of the replica that it is: its environment says so in an environment variable.

Set by `flyte_batch.environments.replica_environment`, so a process without it is none of our replicas: local mode, a
driver, a script.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "FLYTE_BATCH_REPLICA"
"""Flyte tells pools of warm containers apart by what they run, environment variables included, but not by the kind of
GPU nor by concurrency: without this a run that asks for an L4 might be served by a warm A10G."""

DEFAULT_STALL_LIMIT_S = 1800.0


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
