"""The checklist."""

from __future__ import annotations

from collections.abc import Iterator

from flyte_batch.checklist.deploying import check_deployment
from flyte_batch.checklist.evidence import Evidence, check_cost, check_load_test
from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.observing import check_errors, check_monitoring, check_notifications
from flyte_batch.checklist.replicas import check_autoscaling, check_limits, check_resources
from flyte_batch.checklist.workflow import Workflow


def go_through(workflow: Workflow, evidence: Evidence) -> list[Finding]:
    """Every check, in the checklist's order; of a file that answers no rows, those that it may lack all the same."""
    if not workflow.answers_rows:
        return [
            *_not_applicable("autoscaling.replicas", "limits.retries"),
            *check_resources(workflow),
            *_not_applicable("monitoring.backends", "error_tracking.max_failure_rate"),
            *check_notifications(workflow),
            *_not_applicable("load_test.level", "cost_projection.bill"),
            *check_deployment(workflow),
        ]
    return [
        *check_autoscaling(workflow),
        *check_limits(workflow),
        *check_monitoring(workflow),
        *check_errors(workflow),
        *check_load_test(workflow, evidence),
        *check_cost(workflow, evidence),
        *check_deployment(workflow),
    ]


def _not_applicable(*checks: str) -> Iterator[Finding]:
    for check in checks:
        yield Finding(check, "", "not applicable", "no task answers rows (fb.run, fb.infer, a batcher)")
