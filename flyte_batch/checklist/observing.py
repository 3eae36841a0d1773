"""Monitoring and error tracking: whether anybody can see what a run does, and hears of it when it fails."""

from __future__ import annotations

from collections.abc import Iterator

from flyte_batch.checklist.code import keywords
from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.workflow import REQUIRED, Environment, Task, Trigger, Workflow
from flyte_batch.errors import BadInput
from flyte_batch.monitoring import backends

_PACKAGES = {
    "prometheus": ["prometheus-client"],
    "push": ["prometheus-client"],
    "otel": ["flyteplugins-otel", "opentelemetry-exporter-otlp-proto-http"],
}
"""What a backend imports."""

_LOOPBACK = ("127.", "localhost", "::1", "[::1]")
_REACHABLE = 'monitoring=["prometheus:0.0.0.0:9464"], "push:http://GATEWAY" or "otel"'


def check_monitoring(workflow: Workflow) -> Iterator[Finding]:
    drivers = {task.environment for task in workflow.drivers}
    pools = workflow.replicas
    for each in workflow.environments:
        if each in pools or each.name in drivers:
            yield _backends(each)
            yield _image(each)
    for each in pools:
        yield _reachable(each)
    yield from _reports(workflow)
    yield from _links(workflow)


def _named(environment: Environment) -> list[str]:
    return backends.named(environment.env_vars.get(backends.VARIABLE, ""))


def _backends(environment: Environment) -> Finding:
    check, names = "monitoring.backends", _named(environment)
    if not names:
        remedy = 'give the environment monitoring=["logs", "prometheus:0.0.0.0:9464"], or what you have'
        return Finding(check, environment.name, "missing", "no backend is named: nobody hears of its events", remedy)
    try:
        return Finding(check, environment.name, "ok", backends.check_backends(names))
    except BadInput as error:
        return Finding(check, environment.name, "missing", str(error), "correct the name")


def _image(environment: Environment) -> Finding:
    check, image = "monitoring.packages", environment.image
    needed = {package for name in _named(environment) for package in _PACKAGES.get(name.partition(":")[0], [])}
    if environment.pool is not None and "gpu" in environment.resources:
        needed.add("nvidia-ml-py")
    if not needed:
        return Finding(check, environment.name, "not applicable", "neither a backend nor a GPU needs one")
    installed = " ".join(image.requirements).lower().replace("_", "-")
    if "flyte-batch[" in installed and "monitoring" in installed:
        return Finding(check, environment.name, "ok", "flyte-batch with the extra monitoring")
    lacking = [name for name in sorted(needed) if name not in installed]
    if not lacking:
        return Finding(check, environment.name, "ok", ", ".join(sorted(needed)))
    if image.opaque:
        return Finding(check, environment.name, "could not tell", f"{', '.join(lacking)}: {image.opaque}")
    remedy = "install them in the image: without its package a backend is off, and a GPU tells nothing"
    return Finding(check, environment.name, "missing", f"not in the image: {', '.join(lacking)}", remedy)


def _reachable(environment: Environment) -> Finding:
    """Whether metrics get out of the container."""
    check, names = "monitoring.reachable", _named(environment)
    if not names:
        return Finding(check, environment.name, "not applicable", "no backend is named")
    kinds = {name.partition(":")[0]: name for name in names}
    if "push" in kinds:
        return Finding(check, environment.name, "ok", f"pushed: {kinds['push']}")
    if "prometheus" in kinds:
        host, _, _ = kinds["prometheus"].partition(":")[2].rpartition(":")
        if host and not host.startswith(_LOOPBACK):
            return Finding(check, environment.name, "ok", f"scraped at {kinds['prometheus'].partition(':')[2]}")
    if "otel" in kinds:
        target = next(
            (environment.env_vars[name] for name in backends.METRICS_ENDPOINTS if environment.env_vars.get(name)), ""
        )
        if target:
            return Finding(check, environment.name, "ok", f"sent to {target}")
        evidence = "otel: where its exporter sends to is not said in the environment's variables"
        return Finding(check, environment.name, "could not tell", evidence)
    if "prometheus" in kinds:
        evidence = "prometheus listens on loopback only, which nobody outside the container reaches"
        return Finding(check, environment.name, "missing", evidence, _REACHABLE)
    return Finding(check, environment.name, "missing", f"no metrics: {', '.join(names)} gives none", _REACHABLE)


def _reports(workflow: Workflow) -> Iterator[Finding]:
    check = "monitoring.report"
    if not workflow.drivers:
        yield Finding(check, "", "could not tell", "no task was found that names a replica's task")
    for task in workflow.drivers:
        if task.report:
            yield Finding(check, task.name, "ok", "its report is shown in Flyte's UI")
        else:
            yield Finding(check, task.name, "missing", "Flyte's UI shows no report of it", "@env.task(report=True)")


def _links(workflow: Workflow) -> Iterator[Finding]:
    check = "monitoring.links"
    has_metrics = any(
        name.startswith(("prometheus", "push")) for each in workflow.environments for name in _named(each)
    )
    for task in workflow.drivers:
        if task.links:
            yield Finding(check, task.name, "ok", ", ".join(task.links))
        elif has_metrics:
            remedy = '@env.task(links=(GrafanaDashboard("https://grafana.example.com"),)): flyte_batch.monitoring.links'
            yield Finding(check, task.name, "missing", "no link from Flyte's UI to a dashboard of the metrics", remedy)
        else:
            yield Finding(check, task.name, "not applicable", "there are no metrics to link to")


def check_errors(workflow: Workflow) -> Iterator[Finding]:
    if not workflow.entries:
        yield Finding(
            "error_tracking.max_failure_rate", "", "could not tell", "the file names no task that runs on its own"
        )
    for task in workflow.entries:
        yield _failure_rate(task)
    yield from check_notifications(workflow)


def check_notifications(workflow: Workflow) -> Iterator[Finding]:
    for task in workflow.entries:
        if not task.triggers:
            evidence = "no trigger starts it: whoever does so sees how it ends"
            yield Finding("error_tracking.notifications", task.name, "not applicable", evidence)
        for trigger in task.triggers:
            yield _notifications(task, trigger)


def _failure_rate(task: Task) -> Finding:
    check, name = "error_tracking.max_failure_rate", "max_failure_rate"
    remedy = "give the task's parameter a default, max_failure_rate: float = 0.01 say, and pass it to fb.run"
    default = task.inputs.get(name)
    passed = [each for each in keywords(task.function) if each.name == name]
    if default is REQUIRED:
        return Finding(check, task.name, "ok", "who starts it has to say")
    if default is not None:
        return Finding(check, task.name, "ok", f"{default} of the rows, if not told otherwise")
    if name in task.inputs or not passed:
        evidence = "half of the rows may fail before a run fails" if passed else "nothing bounds how many rows may fail"
        return Finding(check, task.name, "missing", evidence, remedy)
    value = passed[0].value
    if value is None:
        return Finding(check, task.name, "missing", "half of the rows may fail before a run fails", remedy)
    return Finding(check, task.name, "ok", f"{passed[0].function} passes it")


def _notifications(task: Task, trigger: Trigger) -> Finding:
    check, subject = "error_tracking.notifications", f"{task.name}, trigger {trigger.name}"
    if trigger.phases is None:
        return Finding(check, subject, "ok", "by a rule of the cluster")
    silent = [phase for phase in ("failed", "timed_out") if phase not in trigger.phases]
    if not silent:
        return Finding(check, subject, "ok", f"somebody is told: {', '.join(trigger.phases)}")
    remedy = "give the trigger notifications=notify.Slack(on_phase=(ActionPhase.FAILED, ActionPhase.TIMED_OUT), ...)"
    return Finding(check, subject, "missing", f"nobody is told of a run that {' or '.join(silent)}", remedy)
