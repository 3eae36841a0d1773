"""The checklist."""

from __future__ import annotations

from flyte_batch.checklist.deploying import check_images, check_schedule, check_secrets
from flyte_batch.checklist.evidence import Evidence, check_cost, check_load_test
from flyte_batch.checklist.findings import Finding
from flyte_batch.checklist.observing import check_errors, check_monitoring
from flyte_batch.checklist.replicas import check_autoscaling, check_limits
from flyte_batch.checklist.workflow import Workflow


def go_through(workflow: Workflow, evidence: Evidence) -> list[Finding]:
    """Every check, in the checklist's order."""
    return [
        *check_autoscaling(workflow),
        *check_limits(workflow),
        *check_monitoring(workflow),
        *check_errors(workflow),
        *check_load_test(workflow, evidence),
        *check_cost(workflow, evidence),
        *check_images(workflow),
        *check_secrets(workflow),
        *check_schedule(workflow),
    ]
