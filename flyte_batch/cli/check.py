"""``flyte batch check``: the production checklist of a workflow."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import flyte

from flyte_batch.checklist.all_checks import go_through
from flyte_batch.checklist.evidence import Evidence
from flyte_batch.checklist.findings import Finding, Status, accept
from flyte_batch.checklist.workflow import Workflow, describe
from flyte_batch.errors import BadInput
from flyte_batch.load.report import read_report
from flyte_batch.report.history import LOG_FILE, logs_of
from flyte_batch.report.run_log import RunLog

MISSING, NOT_LOADED = 1, 2
"""Exit codes."""

_COLOURS: dict[Status, str] = {"ok": "green", "missing": "red", "could not tell": "yellow", "accepted": "cyan"}


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--load_test", help="The file of flyte batch load --output, as evidence.")
@click.option("--run", "run_output", help="The output of an earlier run, as evidence of speed and price.")
@click.option("--model", help="The model that production runs use, where the workflow's default is another one.")
@click.option("--rows", type=int, help="Rows of a production run.")
@click.option("--rows_per_s", type=float, help="Rows that one replica answers a second.")
@click.option("--price_per_hour", type=float, help="Of one replica, in any currency.")
@click.option(
    "--accept", "accepted", multiple=True, metavar="CHECK[:SUBJECT]=WHY", help="A reason for what is missing."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    file: Path,
    load_test: str | None,
    run_output: str | None,
    model: str | None,
    rows: int | None,
    rows_per_s: float | None,
    price_per_hour: float | None,
    accepted: Sequence[str],
    as_json: bool,
) -> None:
    """Go through the production checklist of a workflow file, and say what is missing.

    Autoscaling, limits, monitoring, error tracking, load test, cost projection, deployment. The exit code is 1 if
    something is missing, 2 if the file or a file of evidence can't be loaded.
    """
    try:
        evidence = Evidence(
            load_test=read_report(load_test) if load_test is not None else None,
            run=_read_run(run_output) if run_output is not None else None,
            model=model,
            rows=rows,
            rows_per_s=rows_per_s,
            price_per_hour=price_per_hour,
        )
        workflow = _load(file)
        findings = accept(go_through(workflow, evidence), _reasons(accepted))
    except (BadInput, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(NOT_LOADED) from error
    if as_json:
        counts = Counter(finding.status for finding in findings)
        content = {"workflow": workflow.path, "counts": counts, "checks": [asdict(each) for each in findings]}
        click.echo(json.dumps(content, indent=2))
    else:
        _print(workflow, findings)
    raise SystemExit(MISSING if any(each.status == "missing" for each in findings) else 0)


def _reasons(accepted: Sequence[str]) -> dict[str, str]:
    reasons = {}
    for each in accepted:
        name, equals, why = each.partition("=")
        if not equals or not why.strip():
            raise BadInput(f"--accept {each!r} gives no reason: write CHECK=WHY or CHECK:SUBJECT=WHY")
        reasons[name.strip()] = why.strip()
    return reasons


def _read_run(output: str) -> RunLog:
    """The newest run over an output that answered rows.

    Raises:
        BadInput: it is no output, or no such run left a log there.
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data.storage import locate

    done = [log for log in logs_of(locate(output)) if log.rows_done]
    if not done:
        raise BadInput(f"--run {output}: no run over it that left its log ({LOG_FILE}) answered a row: give another's")
    return done[-1]


def _load(file: Path) -> Workflow:
    """Import a workflow file as `flyte run` does, and describe what it declares.

    Raises:
        BadInput: there is no such file, it can't be imported, or declares no environment.
    """
    if not file.is_file():
        raise BadInput(f"there is no file {file}: give the path of a workflow, such as workflows/generate.py")
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is no part of the list
        module = _import(file)
    values = list(vars(module).values())
    environments = [each for each in values if isinstance(each, flyte.TaskEnvironment)]
    entries = [each for each in values if isinstance(getattr(each, "parent_env_name", None), str)]
    environments += [parent for task in entries if (parent := task.parent_env and task.parent_env()) is not None]
    if not environments:
        raise BadInput(f"{file} declares no flyte.TaskEnvironment: give the file that `flyte run` takes")
    return describe(str(file), environments, entries)


def _import(file: Path) -> ModuleType:
    for folder in (Path.cwd(), file.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file} is no Python file: give the one that `flyte run` takes")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        hint = "run this in the folder where `flyte run` finds it, or install it"
        raise BadInput(f"{file} can't be loaded: {type(error).__name__}: {error}: {hint}") from error
    except Exception as error:
        raise BadInput(f"{file} can't be loaded: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise BadInput(f"{file} can't be loaded: it ends the process") from error
    return module


def _print(workflow: Workflow, findings: Sequence[Finding]) -> None:
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    names = ", ".join(each.name for each in workflow.environments)
    _wrapped(f"{workflow.path}: {names}", width, "", "  ")
    for area, found in groupby(findings, key=lambda finding: finding.area):
        click.echo(f"\n{_styled(area.replace('_', ' '), bold=True)}")
        for each in found:
            name = each.check.partition(".")[2]
            label = f"{name}, {each.subject}" if each.subject else name
            mark = _styled(f"{each.status:<14}", fg=_COLOURS.get(each.status))
            _wrapped(f"{label}: {each.evidence}", width, f"  {mark}  ", " " * 18)
            if each.remedy:
                _wrapped(each.remedy, width, " " * 18 + "-> ", " " * 21)
    counts = Counter(each.status for each in findings)
    click.echo("\n" + ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status]))
    lacking = Counter(each.check for each in findings if each.status == "missing")
    if lacking:
        said = ", ".join(f"{check} ({times} times)" if times > 1 else check for check, times in lacking.items())
        _wrapped(f"missing: {said}", width, "", "  ")


def _wrapped(text: str, width: int, first: str, others: str) -> None:
    """``first`` may hold colours, which take no room."""
    room = len(click.unstyle(first))
    lines = textwrap.wrap(text, width, initial_indent=" " * room, subsequent_indent=others, break_on_hyphens=False)
    click.echo("\n".join([first + lines[0][room:], *lines[1:]]))


def _styled(text: str, fg: str | None = None, bold: bool = False) -> str:
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg, bold=bold)
