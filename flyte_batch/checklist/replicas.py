"""Autoscaling and limits: how many replicas there are and when, and what bounds what they do."""

from __future__ import annotations

from collections.abc import Iterator

from flyte_batch.checklist.code import COMPUTED, keywords
from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.workflow import Environment, Pool, Task, Workflow
from flyte_batch.report.formats import plural

LEAST_IDLE_TTL_S = 60
"""Most models take longer to load than less."""
MOST_IDLE_TTL_S = 3600
MOST_SCALEDOWN_TTL_S = 600
DEFAULT_QUEUE = 5_000
LONGEST_QUEUE = 100_000
"""Records, of which each is in memory."""


def check_autoscaling(workflow: Workflow) -> Iterator[Finding]:
    if not workflow.replicas:
        yield Finding(
            "autoscaling.replicas", "", "missing", "no environment has a ReusePolicy: each call starts a container",
            "make the environment of the chunks with fb.replica_environment()",
        )  # fmt: skip
    for each in workflow.replicas:
        assert each.pool is not None  # noqa: S101 - what makes it one of `replicas`
        yield from _autoscaling(each.name, each.pool)


def _autoscaling(name: str, pool: Pool) -> Iterator[Finding]:
    check = "autoscaling.replicas"
    if pool.fewest < pool.most:
        yield Finding(check, name, "ok", f"{pool.fewest} to {pool.most} replicas")
    else:
        remedy = f"give replicas=(1, {max(2, pool.most)}), or the reason: --accept '{check}:{name}=WHY'"
        yield Finding(check, name, "missing", f"always {plural(pool.most, 'replica')}", remedy)

    check, idle = "autoscaling.idle_ttl", f"an idle pool ends after {pool.idle_ttl_s:,.0f} s"
    if pool.idle_ttl_s < LEAST_IDLE_TTL_S:
        yield Finding(
            check, name, "missing", f"{idle}, sooner than a model loads: every run starts cold", "raise idle_ttl"
        )
    elif pool.idle_ttl_s > MOST_IDLE_TTL_S:
        yield Finding(check, name, "missing", f"{idle}, and is paid for until then", "lower idle_ttl")
    else:
        yield Finding(check, name, "ok", idle)

    check, alone = "autoscaling.scaledown_ttl", f"an idle replica ends after {pool.scaledown_ttl_s:,.0f} s"
    if pool.fewest == pool.most:
        yield Finding(check, name, "not applicable", "the number of replicas is fixed")
    elif pool.scaledown_ttl_s > MOST_SCALEDOWN_TTL_S:
        evidence = f"{alone}, and is paid for at the end of every run until then"
        yield Finding(check, name, "missing", evidence, "lower scaledown_ttl")
    else:
        yield Finding(check, name, "ok", alone)

    check = "autoscaling.concurrency"
    if pool.concurrency > 1:
        yield Finding(check, name, "ok", f"{pool.concurrency} chunks a replica at once")
    else:
        evidence = "one chunk a replica at once: its device waits while the chunk is read and written"
        yield Finding(check, name, "missing", evidence, "raise concurrency to 4 or more")


def check_limits(workflow: Workflow) -> Iterator[Finding]:
    for task in workflow.answering:
        yield _retries(task)
        yield _timeout(task)
        yield _queue(task)
    yield from check_resources(workflow)
    yield from _own_driver(workflow)


def check_resources(workflow: Workflow) -> Iterator[Finding]:
    for environment in workflow.environments:
        if environment.tasks:
            yield _resources(environment)


def _retries(task: Task) -> Finding:
    check, retries = "limits.retries", plural(task.retries, "retry", "retries")
    strategy = "flyte.RetryStrategy(2, backoff=flyte.Backoff(timedelta(seconds=2), factor=5, cap=timedelta(minutes=1)))"
    if task.retries == 0:
        return Finding(
            check, task.name, "missing", "no retries: a lost replica fails its chunks", f"retries={strategy}"
        )
    if not task.has_backoff:
        evidence = f"{retries} without a pause: they may land on the replica that is about to end"
        return Finding(check, task.name, "missing", evidence, f"retries={strategy}")
    return Finding(check, task.name, "ok", f"{retries} with growing pauses")


def _timeout(task: Task) -> Finding:
    check = "limits.timeout"
    if task.timeout_s:
        return Finding(check, task.name, "ok", f"an attempt ends after {task.timeout_s:,.0f} s")
    for each in keywords(task.function):
        if each.name == "timeout_s" and each.value is not None:
            amount = "" if each.value is COMPUTED else f" of {each.value} s"
            return Finding(check, task.name, "ok", f"{each.function} passes a timeout_s{amount}")
    remedy = "give fb.infer(..., timeout_s=3600), or the task a timeout"
    return Finding(check, task.name, "missing", "nothing ends a call that takes too long", remedy)


def _queue(task: Task) -> Finding:
    check = "limits.max_queue"
    given = [each for each in keywords(task.function) if each.name == "max_queue_size"]
    for each in given:
        if isinstance(each.value, int) and each.value > LONGEST_QUEUE:
            evidence = f"{each.function} lets {each.value:,} records wait in memory"
            return Finding(check, task.name, "missing", evidence, f"lower max_queue_size to {DEFAULT_QUEUE:,} or so")
        if each.value is COMPUTED:
            evidence = f"{each.function} computes max_queue_size"
            return Finding(check, task.name, "could not tell", evidence)
    most = f"{given[0].value:,}" if given else f"{DEFAULT_QUEUE:,}, the default of flyte_batch's batchers"
    return Finding(check, task.name, "ok", f"records that may wait in a replica: {most}")


def _resources(environment: Environment) -> Finding:
    check, given = "limits.resources", environment.resources
    told = ", ".join(f"{kind} {amount}" for kind, amount in given.items()) or "none"
    lacking = [kind for kind in ("cpu", "memory") if kind not in given]
    if lacking:
        return Finding(check, environment.name, "missing", f"given: {told}", f"give {' and '.join(lacking)} too")
    return Finding(check, environment.name, "ok", told)


def _own_driver(workflow: Workflow) -> Iterator[Finding]:
    check, pools = "limits.driver", {each.name for each in workflow.replicas}
    if not workflow.drivers:
        yield Finding(check, "", "could not tell", "no task was found that names a replica's task")
    for task in workflow.drivers:
        if task.environment in pools:
            evidence = f"runs in a slot of the replicas {task.environment!r} while it waits for others"
            yield Finding(check, task.name, "missing", evidence, "give it an environment by fb.driver_environment()")
        else:
            yield Finding(check, task.name, "ok", f"in an environment of its own, {task.environment!r}")
