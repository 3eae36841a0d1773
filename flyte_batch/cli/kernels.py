"""``flyte batch kernels``: where a model's time goes, from traces of the torch profiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from flyte_batch.errors import BadInput
from flyte_batch.monitoring.kernels import kernel_table, trace_files


@click.command("kernels")
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TRACE...")
def command(traces: Sequence[Path]) -> None:
    """Add up the seconds by class of kernel: a TRACE is a file of the torch profiler (.json, .json.gz) or a folder."""
    try:
        missing = [path for path in traces if not trace_files(path)]
        if missing:
            raise BadInput(f"{missing[0]}: there is no such trace, nor a folder with *.pt.trace.json* in it")
        table = kernel_table(*(file for path in traces for file in trace_files(path)))
    except BadInput as error:
        raise click.ClickException(str(error)) from error
    click.echo(table)
