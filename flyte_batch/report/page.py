"""A run's report as HTML: a document of its own, or a fragment for Flyte's report tab.

One file: no network, no script, no font of its own. What is said by a chart is also said by a table. Texts of users
(prompts, answers, errors, settings) are escaped by the templates; what goes in unescaped is made by `charts`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from flyte_batch.report import formats
from flyte_batch.report.advice import Advice, advise, too_short
from flyte_batch.report.answer import Figure, figures, knows_times, sentence, status
from flyte_batch.report.history import detailed
from flyte_batch.report.run_log import EngineLog, RunLog, TimeShares
from flyte_batch.report.samples import SampleAnswer
from flyte_batch.report.sections.chunks import chunk_chart, chunk_tables, chunks_note
from flyte_batch.report.sections.distributions import latency_chart, latency_figures, latency_table, lengths
from flyte_batch.report.sections.earlier import earlier_runs
from flyte_batch.report.sections.elements import Chart, Table
from flyte_batch.report.sections.event_loops import stalls, stalls_by_code
from flyte_batch.report.sections.failures import causes, examples
from flyte_batch.report.sections.gpus import gpus, gpus_note
from flyte_batch.report.sections.over_time import (
    Replica,
    drawn,
    overview_charts,
    replica,
    replicas_table,
    slices_table,
)
from flyte_batch.report.sections.plan import parameters, plan_table, versions
from flyte_batch.report.sections.shares import before_first, shares_chart, shares_table
from flyte_batch.report.timelines import edges, timeline, token_rates


@dataclass(frozen=True)
class Report:
    """What the templates show, in its order: how ``log`` ended, and all else of ``about``."""

    title: str
    log: RunLog
    about: RunLog
    status: str
    sentence: str
    progress: float | None
    figures: Sequence[Figure]
    knows_times: bool
    shares: Chart | None
    shares_table: Table | None
    before_first: str
    advice: Sequence[Advice]
    no_advice: str
    overview: Sequence[Chart]
    overview_table: Table | None
    slice_s: float
    replicas: Sequence[Replica]
    replicas_left_out: int
    replicas_table: Table | None
    lengths: Sequence[tuple[Chart, Table]]
    latency: Chart | None
    latency_figures: Sequence[Figure]
    latency_table: Table | None
    causes: Table | None
    examples: Table | None
    chunks: Chart | None
    chunks_note: str
    slowest: Table | None
    failed_chunks: Table | None
    gpus: Table | None
    gpus_note: str
    stalls: Table | None
    stalls_all: Table | None
    samples: Sequence[SampleAnswer]
    plan: Table
    settings: Table
    versions: Table | None
    earlier: Table | None


def render_page(logs: Sequence[RunLog], samples: Sequence[SampleAnswer] = ()) -> str:
    """The report as a document.

    Args:
        logs: of the runs over one output, at least one; the report is about the last. If that had nothing to do, it
            says so, and shows the last that did something.
        samples: answers to show.
    """
    return _rendered("page.html", logs, samples)


def render_fragment(logs: Sequence[RunLog], samples: Sequence[SampleAnswer] = ()) -> str:
    """The same, to be put into an element of another page; its styles keep to themselves."""
    return _rendered("fragment.html", logs, samples)


def _rendered(template: str, logs: Sequence[RunLog], samples: Sequence[SampleAnswer]) -> str:
    """Text that has an encoding: half a surrogate pair, as an error's message may hold it, is escaped."""
    text = _template(template).render(report=make_report(logs, samples), style=_style(), page=template == "page.html")
    return text.encode(errors="backslashreplace").decode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flyte_batch.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {each.__name__: each for each in (formats.count, formats.percent, formats.seconds, formats.moment, options)}
    )
    return environment


def options(text: str) -> Markup:
    """The text as HTML, its ``--options`` marked as what is typed."""
    return Markup(re.sub(r"(--[a-z][a-z0-9_]*)", r"<code>\1</code>", str(escape(text))))  # noqa: S704


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


@functools.cache
def _style() -> Markup:
    return Markup(resources.files("flyte_batch.report").joinpath("templates/report.css").read_text())  # noqa: S704


def make_report(logs: Sequence[RunLog], samples: Sequence[SampleAnswer]) -> Report:
    """Everything that the templates show."""
    last = logs[-1]
    log = detailed(logs)
    at = edges(log.started, log.ended) if knows_times(log) else ()
    by_process: dict[str, list[EngineLog]] = {}
    for engine in sorted(log.engines.values(), key=lambda each: each.started):
        by_process.setdefault(engine.process, []).append(engine)
    process_shares = {
        process: sum((log.engine_time(each) for each in engines), TimeShares())
        for process, engines in by_process.items()
    }
    shares = sum(process_shares.values(), TimeShares())
    shown = drawn(process_shares)
    overview = timeline(log.engines.values(), at)
    tokens = token_rates(log.chunks, [each.rows_per_s for each in overview], at)
    advice = advise(log)
    slowest, failed = chunk_tables(log)
    return Report(
        title=f"{status(last)}: {last.output.rstrip('/').rpartition('/')[2]}",
        log=last,
        about=log,
        status=status(last),
        sentence=sentence(last, shares if last is log else last.time_shares()),
        progress=last.rows / last.plan.rows if last.outcome == "running" and last.plan.rows else None,
        figures=figures(log, shares),
        knows_times=knows_times(log),
        shares=shares_chart(shares),
        shares_table=shares_table(shares),
        before_first=before_first(log),
        advice=advice,
        no_advice="" if advice else _no_advice(log),
        overview=overview_charts(overview, tokens, at, shares),
        overview_table=slices_table("All replicas over time", overview, at, tokens),
        slice_s=at[1] - at[0] if at else 0.0,
        replicas=[
            replica(index, process, by_process[process], process_shares[process], at)
            for index, process in enumerate(shown)
        ],
        replicas_left_out=len(by_process) - len(shown),
        replicas_table=replicas_table(by_process, process_shares),
        lengths=lengths(log),
        latency=latency_chart(log),
        latency_figures=latency_figures(log),
        latency_table=latency_table(log),
        causes=causes(log),
        examples=examples(log),
        chunks=chunk_chart(log),
        chunks_note=chunks_note(log),
        slowest=slowest,
        failed_chunks=failed,
        gpus=gpus(log),
        gpus_note=gpus_note(log),
        stalls=stalls_by_code(log),
        stalls_all=stalls(log),
        samples=samples,
        plan=plan_table(log),
        settings=parameters(log),
        versions=versions(log),
        earlier=earlier_runs(logs),
    )


def _no_advice(log: RunLog) -> str:
    if not knows_times(log):
        return "What the run left behind does not say where its time went."
    if not log.engines:
        return "Nothing to advise on: no chunk is done yet." if log.outcome == "running" else "Nothing to advise on."
    if too_short(log):
        return "Nothing failed, and engines worked for too short a time to say what to do about it."
    return "Nothing to change: no share of the time is large enough to be worth it."
