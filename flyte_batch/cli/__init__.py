"""``flyte batch ...``: commands beside `flyte run`. A module here is a command, loaded when it is asked for.

Registered by the entry point ``flyte.plugins.cli.commands``.
"""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "report": "Make a run's report again from what it left behind.",
    "load": "Find the rate up to which a batcher keeps its service level.",
    "check": "Go through the production checklist of a workflow.",
    "dashboards": "Write the Grafana dashboard and the Prometheus alert rules.",
    "kernels": "Say where a model's time goes, from traces of the torch profiler.",
}


class _Commands(click.Group):
    """A group whose commands are modules of this package, each with a click command ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"flyte_batch.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, name="batch", invoke_without_command=True)
@click.pass_context
def batch(ctx: click.Context) -> None:
    """Batch inference: reports, load tests, checks, dashboards, profiles."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
