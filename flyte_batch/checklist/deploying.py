"""Deployment: pins of images, secrets that lie open, schedules whose runs overlap."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.workflow import Image, Task, Trigger, Workflow
from flyte_batch.report.settings import is_secret_name, is_secret_text

_WHERE = {"file", "path", "dir"}
_PINNED = re.compile(r"==\s*[\w.!+-]+$|===|@\s*\S+|^\s*(git\+|https?://|/|\.)|\.whl\b")


def check_deployment(workflow: Workflow) -> Iterator[Finding]:
    yield from _images(workflow)
    yield from _secrets(workflow)
    yield from _schedules(workflow)


def _images(workflow: Workflow) -> Iterator[Finding]:
    for each in workflow.environments:
        if each.tasks:
            yield _pins(each.name, each.image)


def _pins(environment: str, image: Image) -> Finding:
    check = "deployment.images"
    if image.base == "auto":
        evidence = "image 'auto': the newest packages of the day on which it is built"
        return Finding(check, environment, "missing", evidence, "give a flyte.Image with pinned packages")
    floating = [name for name in image.requirements if not _PINNED.search(name.partition(";")[0].strip())]
    address, tag = _tag(image.base)
    if image.base and tag in ("", "latest"):
        floating.insert(0, f"the base image {address} ({'latest' if tag else 'no tag'})")
    if floating:
        return Finding(
            check, environment, "missing", f"not pinned: {_some(floating)}", "pin each with ==, images by tag or digest"
        )
    if image.opaque and not image.base:
        return Finding(check, environment, "could not tell", image.opaque)
    pinned = f"{len(image.requirements)} packages pinned, on {image.base}" if image.requirements else image.base
    return Finding(check, environment, "ok", pinned)


def _tag(address: str) -> tuple[str, str]:
    """An image's address without its tag, and the tag or digest."""
    name, at, digest = address.partition("@")
    if at:
        return name, digest
    folder, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return f"{folder}{slash}{last}", tag


def _secrets(workflow: Workflow) -> Iterator[Finding]:
    """Values are never shown."""
    check = "deployment.secrets"
    places: dict[str, Mapping[str, object]] = {}
    for each in workflow.environments:
        places[f"environment {each.name}"] = each.env_vars
        places[f"the image of environment {each.name}"] = each.image.env_vars or {}
        for task in each.tasks:
            for trigger in task.triggers:
                places[f"trigger {trigger.name}"] = {**trigger.env_vars, **trigger.inputs}
    found = [
        f"{name} of {place}" for place, values in places.items() for name in values if _is_secret(name, values[name])
    ]
    if found:
        remedy = "take it out, replace it, and give flyte.Secret(key=..., as_env_var=...) in secrets="
        yield Finding(check, "", "missing", f"looks like a secret in the open: {_some(found)}", remedy)
    else:
        yield Finding(check, "", "ok", f"{sum(map(len, places.values()))} variables and inputs, none looks like one")


def _is_secret(name: str, value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    is_place = re.split(r"[_\W]", name.lower())[-1] in _WHERE
    if is_place or value.lower() in ("true", "false") or value.replace(".", "").isdecimal():
        return False
    return is_secret_name(name) or is_secret_text(value)


def _schedules(workflow: Workflow) -> Iterator[Finding]:
    check = "deployment.schedule"
    scheduled = [(task, each) for task in workflow.entries for each in task.triggers if each.schedule]
    if not scheduled:
        yield Finding(check, "", "not applicable", "no trigger with a schedule")
    for task, trigger in scheduled:
        yield _overlap(check, task, trigger)


def _overlap(check: str, task: Task, trigger: Trigger) -> Finding:
    subject, when = f"{task.name}, trigger {trigger.name}", f"scheduled {trigger.schedule}"
    remedy = "give the task a timeout below the schedule's interval: @env.task(timeout=timedelta(...))"
    if not task.timeout_s:
        evidence = f"{when}, and nothing ends a run: one that takes too long overlaps the next"
        return Finding(check, subject, "missing", evidence, remedy)
    ends = f"{when}; a run ends after {task.timeout_s:,.0f} s"
    if trigger.interval_s is None:
        return Finding(check, subject, "could not tell", f"{ends}; the shortest time between two is not known")
    if task.timeout_s >= trigger.interval_s:
        return Finding(
            check, subject, "missing", f"{ends}, the next one begins after {trigger.interval_s:,.0f} s", remedy
        )
    return Finding(check, subject, "ok", ends)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
