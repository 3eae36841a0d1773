"""What Flyte knows of the running task: its names, and the report that its UI shows."""

from __future__ import annotations

import flyte
import flyte.report

from flyte_batch.monitoring import scope
from flyte_batch.monitoring.backends import start_tracing
from flyte_batch.report import keeper


def action_names() -> tuple[str, str]:
    """Names of the run and the action that the calling code is part of; empty outside of a task."""
    context = flyte.ctx()
    return (context.action.run_name or "", context.action.name) if context else ("", "")


async def publish(html: str) -> None:
    """Show this in the running task's report; nothing outside of a task.

    Flyte shows it for tasks declared with ``report=True``.
    """
    if flyte.ctx():
        await flyte.report.replace.aio(html)
        await flyte.report.flush.aio()


def connect() -> None:
    """Let events carry the names of Flyte's actions, reports appear in its UI, and tasks have spans if asked for."""
    start_tracing()
    scope.action_source = action_names
    scope.action_context = flyte.custom_context
    keeper.publisher = publish
