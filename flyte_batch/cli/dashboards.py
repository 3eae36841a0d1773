"""``flyte batch dashboards``: the Grafana dashboard, the alert rules and the list of metrics as files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from flyte_batch.errors import BadInput
from flyte_batch.monitoring.alerts import Thresholds, rules
from flyte_batch.monitoring.grafana import dashboard
from flyte_batch.monitoring.metrics import page

F = TypeVar("F", bound=Callable[..., object])


def _threshold_options(function: F) -> F:
    for each in reversed(fields(Thresholds)):
        function = click.option(
            f"--{each.name}",
            type=type(each.default),
            default=each.default,
            show_default=True,
            help=f"Alerts: {each.metadata['help']}",
        )(function)
    return function


@click.command("dashboards")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for dashboard.json, alerts.yml and metrics.md.",
)
@_threshold_options
def command(output: Path, **thresholds: Any) -> None:
    """Write the Grafana dashboard and the Prometheus alert rules, with a list of the metrics that they use."""
    try:
        files = {"dashboard.json": dashboard(), "alerts.yml": rules(Thresholds(**thresholds)), "metrics.md": page()}
    except BadInput as error:
        raise click.UsageError(str(error)) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(output), error.strerror) from error
    for name in files:
        click.echo(output / name)
