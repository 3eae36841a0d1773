"""``flyte batch report``: the report of a run, made again from what it left behind."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from flyte_batch.errors import BadInput

if TYPE_CHECKING:
    from flyte_batch.data.storage import Location
    from flyte_batch.report.run_log import RunLog


@click.command("report")
@click.argument("output")
@click.option("--html", metavar="FILE", help="Write the page there: a path or a URI. By default OUTPUT/_report.html.")
@click.option("--open", "show", is_flag=True, help="Open the page in a browser.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of text.")
def command(output: str, html: str | None, show: bool, as_json: bool) -> None:
    """Make a run's report again: OUTPUT is the folder or URI of its parts, finished or not.

    Where the page can't be written the figures are printed nevertheless, and the exit code is 1.
    """
    from flyte_batch.data import storage
    from flyte_batch.report.answer import summary
    from flyte_batch.report.history import detailed, logs_of, silent_s
    from flyte_batch.report.keeper import PAGE_FILE
    from flyte_batch.report.page import render_page
    from flyte_batch.report.samples import sample_answers

    try:
        folder = storage.locate(output)
        logs = logs_of(folder)
        silent = silent_s(folder)
        about = detailed(logs)
        page = storage.locate(html) if html is not None else folder.child(PAGE_FILE)
        content = render_page(logs, sample_answers(folder, logs[-1])).encode()
    except (BadInput, OSError) as error:
        raise click.ClickException(str(error)) from error
    failed = _write(page, content)
    if as_json:
        click.echo(json.dumps(_figures(logs[-1], about) | {"report": None if failed else page.uri}, indent=1))
    else:
        for line in (*summary(logs[-1], about, silent), *([] if failed else [f"report: {page.uri}"])):
            click.echo(line)
    if failed:
        raise click.ClickException(f"the page was not written: {failed}: name another file with --html")
    if show:
        click.launch(page.uri)


def _write(page: Location, content: bytes) -> str:
    """Write the page; gives why that failed, "" where it did not."""
    from flyte_batch.data import storage

    try:
        storage.write_atomically(page, content)
    except (BadInput, OSError) as error:
        return str(error)
    return ""


def _figures(last: RunLog, log: RunLog) -> dict[str, Any]:
    """The answer for programs: how the last run ended, and the figures of ``log``; times in seconds."""
    from flyte_batch.monitoring import gpu
    from flyte_batch.report.advice import advise
    from flyte_batch.report.answer import knows_times, tokens_done

    energy_j = gpu.energy_j(gpu.gpu_totals(log.gpus))
    return {
        "outcome": last.outcome,
        "error": last.error,
        "rows": log.rows,
        "failures": log.failures,
        "causes": log.causes,
        "prompt_tokens": log.prompt_tokens,
        "response_tokens": log.response_tokens,
        "rows_of_this_run": log.rows_done,
        "tokens_of_this_run": tokens_done(log),
        "seconds": log.seconds if knows_times(log) else None,
        "utilization": log.utilization if log.engines else None,
        "time": asdict(log.time_shares()) if log.engines else None,
        "cost": log.cost if knows_times(log) else None,
        "energy_wh": None if energy_j is None else energy_j / 3600,
        "advice": [asdict(advice) for advice in advise(log)],
    }
