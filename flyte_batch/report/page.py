"""A run's report as HTML: a document of its own, or a fragment for Flyte's report tab.

One file: no network, no script, no font of its own. What is said by a chart is also said by a table. Texts of users
(prompts, answers, errors, settings) are escaped by the templates; what goes in unescaped is made by `charts`.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from flyte_batch.histograms import LATENCY_BOUNDS, TOKEN_BOUNDS, percentile
from flyte_batch.monitoring import gpu
from flyte_batch.report import charts, formats
from flyte_batch.report.advice import Advice, advise, mean_fill, measured_rows_per_s, replicas_seen, too_short
from flyte_batch.report.answer import Figure, figures, knows_times, sentence, status, tokens_done
from flyte_batch.report.formats import count, cut, moment, number, percent, plural, seconds, size
from flyte_batch.report.history import detailed
from flyte_batch.report.run_log import ChunkEntry, EngineLog, RunLog, TimeShares
from flyte_batch.report.samples import SampleAnswer
from flyte_batch.report.settings import flat
from flyte_batch.report.timelines import Slice, edges, timeline, token_rates

MANY_REPLICAS = 8
"""With more, only the least and the most utilised are drawn."""
OF_MANY = 3
STRAGGLER = 3.0
"""Times the median of the chunks' durations."""
MOST_ROWS = 200
"""Of a table; a run's chunks and stalls can be thousands."""
MOST_BARS = 40
MOST_MARKS = 9
"""Below a histogram."""

KINDS: Mapping[str, str] = {
    "busy": "the device was at work",
    "loading": "from a replica's first chunk until it had an engine",
    "starved": "the device was free, and no records waited",
    "assembling": "the device was free, and records waited for more to fill a batch",
    "blocked": "the device was free, and the event loop was held up",
    "tail": "a replica's last chunk was done, and the run went on elsewhere or was being committed",
}


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others are aligned as numbers unless they are in ``texts``."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    texts: frozenset[int] = frozenset()
    left_out: int = 0


@dataclass(frozen=True)
class Chart:
    """A drawing with its axes; ``marks`` below it are (percent of the width, label, whether narrow screens show it)."""

    title: str
    note: str
    drawing: Markup
    top: str
    marks: Sequence[tuple[float, str, bool]]


@dataclass(frozen=True)
class Replica:
    """One process over time."""

    name: str
    note: str
    charts: Sequence[Chart]
    table: Table


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
        {each.__name__: each for each in (formats.count, formats.percent, formats.seconds, formats.moment)}
    )
    return environment


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
    shown = _shown(process_shares)
    overview = timeline(log.engines.values(), at)
    tokens = token_rates(log.chunks, at)
    advice = advise(log)
    slowest, failed = _chunk_tables(log)
    return Report(
        title=f"{status(last)}: {last.output.rstrip('/').rpartition('/')[2]}",
        log=last,
        about=log,
        status=status(last),
        sentence=sentence(last, shares if last is log else last.time_shares()),
        progress=last.rows / last.plan.rows if last.outcome == "running" and last.plan.rows else None,
        figures=figures(log, shares),
        knows_times=knows_times(log),
        shares=_shares_chart(shares),
        shares_table=_shares_table(shares),
        before_first=_before_first(log),
        advice=advice,
        no_advice="" if advice else _no_advice(log),
        overview=_overview_charts(overview, tokens, at, shares),
        overview_table=_slices_table("All replicas over time", overview, at, tokens),
        slice_s=at[1] - at[0] if at else 0.0,
        replicas=[
            _replica(index, process, by_process[process], process_shares[process], at)
            for index, process in enumerate(shown)
        ],
        replicas_left_out=len(by_process) - len(shown),
        replicas_table=_replicas_table(by_process, process_shares),
        lengths=_lengths(log),
        latency=_latency_chart(log),
        latency_figures=_latency_figures(log),
        latency_table=_histogram_table("Latencies", _latency_buckets(log), "records", seconds),
        causes=_causes(log),
        examples=_examples(log),
        chunks=_chunk_chart(log),
        chunks_note=_chunks_note(log),
        slowest=slowest,
        failed_chunks=failed,
        gpus=_gpus(log),
        gpus_note=_gpus_note(log),
        stalls=_stalls_by_code(log),
        stalls_all=_stalls(log),
        samples=samples,
        plan=_plan(log),
        settings=Table("Parameters", ("Parameter", "Value"), list(flat(log.settings)), frozenset({1})),
        versions=_versions(log),
        earlier=_earlier(logs),
    )


# -- Time ---------------------------------------------------------------------------


def _kinds(shares: TimeShares) -> list[tuple[str, float]]:
    return [(kind, getattr(shares, kind)) for kind in KINDS]


def _shares_chart(shares: TimeShares) -> Chart | None:
    if shares.total <= 0:
        return None
    parts = _kinds(shares)
    told = ", ".join(f"{kind} {percent(value / shares.total)}" for kind, value in parts if value > 0)
    drawing = charts.stacked(
        parts,
        ident="fb-shares",
        title="Where the seconds of all engines went",
        description=f"One bar, from left to right: {told}.",
    )
    marks, left = [], 0.0
    for kind, value in parts:
        share = value / shares.total
        if share >= 0.08:
            marks.append((100 * left, f"{kind} {percent(share)}", share >= 0.25))
        left += share
    return Chart("", "", drawing, "", marks)


def _shares_table(shares: TimeShares) -> Table | None:
    if shares.total <= 0:
        return None
    rows: list[list[str | Markup]] = [
        [_swatch(kind), seconds(value), percent(value / shares.total), KINDS[kind]] for kind, value in _kinds(shares)
    ]
    rows.append(["together", seconds(shares.total), "100%", "all engines, each from its first chunk to the run's end"])
    return Table("Where the time went", ("Part", "Seconds", "Share", "What it is"), rows, frozenset({3}))


def _swatch(kind: str) -> Markup:
    return Markup('<span class="fb-kind"><span class="fb-swatch fb-{}" aria-hidden="true"></span>{}</span>').format(
        kind, kind
    )


def _before_first(log: RunLog) -> str:
    if not log.engines or not knows_times(log):
        return ""
    first = min(engine.started for engine in log.engines.values())
    return (
        f"Before the first replica began, {seconds(max(0.0, first - log.started))} went by: opening the source, "
        "planning, waiting for a replica. They are not in the bar."
    )


def _no_advice(log: RunLog) -> str:
    if not knows_times(log):
        return "What the run left behind does not say where its time went."
    if not log.engines:
        return "Nothing to advise on: no chunk is done yet." if log.outcome == "running" else "Nothing to advise on."
    if too_short(log):
        return "Nothing failed, and engines worked for too short a time to say what to do about it."
    return "Nothing to change: no share of the time is large enough to be worth it."


# -- Over time ------------------------------------------------------------------------


def _shown(process_shares: Mapping[str, TimeShares]) -> list[str]:
    """The processes to draw: all, or the least and the most utilised."""
    if len(process_shares) <= MANY_REPLICAS:
        return list(process_shares)
    ranked = sorted(process_shares, key=lambda process: process_shares[process].utilization)
    return [*ranked[:OF_MANY], *ranked[-OF_MANY:]]


def _time_marks(at: Sequence[float]) -> list[tuple[float, str, bool]]:
    length = at[-1] - at[0] if at else 0.0
    return [(0.0, "0 s", True), (50.0, seconds(length / 2), False), (100.0, seconds(length), True)]


def _steps(
    ident: str,
    name: str,
    whose: str,
    values: Sequence[float | None],
    at: Sequence[float],
    say: Callable[[float], str],
    top: float | None = None,
    mean: str = "",
) -> Chart:
    """A line over the slices; ``mean`` is said of it where the mean of the slices would not be that of the run."""
    known = [value for value in values if value is not None]
    end = top if top is not None else charts.nice_top(known)
    mean = mean or (say(statistics.fmean(known)) if known else "")
    told = f"From {say(min(known))} to {say(max(known))}, mean {mean}." if known else "Nothing was measured."
    drawing = charts.steps(values, end, ident=ident, title=f"{name}, {whose}", description=told)
    note = f"mean {mean}" if known else "none"
    return Chart(name, note, drawing, say(end), _time_marks(at))


def _mean_utilization(shares: TimeShares) -> str:
    return f"{percent(shares.utilization)}, loading and tail included"


def _overview_charts(
    slices: Sequence[Slice], tokens: Sequence[float], at: Sequence[float], shares: TimeShares
) -> list[Chart]:
    if not slices or not any(each.replicas for each in slices):
        return []
    whose = "all replicas"
    mean = _mean_utilization(shares)
    return [
        _steps("fb-all-u", "Utilisation", whose, [each.utilization for each in slices], at, percent, 1.0, mean),
        _steps("fb-all-r", "Rows/s answered", whose, [each.rows_per_s for each in slices], at, number),
        _steps("fb-all-t", "Tokens/s", whose, tokens, at, number),
        _steps("fb-all-n", "Replicas at work", whose, [each.replicas for each in slices], at, number),
    ]


def _replica(
    index: int, process: str, engines: Sequence[EngineLog], shares: TimeShares, at: Sequence[float]
) -> Replica:
    slices = timeline(engines, at)
    ident = f"fb-r{index}"
    lives = plural(len(engines), "engine")
    mean, fill = _mean_utilization(shares), mean_fill(engines)
    rows = plural(sum(engine.rows for engine in engines), "row")
    return Replica(
        name=process,
        note=f"{rows}, busy {percent(shares.utilization)} of {seconds(shares.total)}, {lives}",
        charts=[
            _steps(f"{ident}-u", "Utilisation", process, [each.utilization for each in slices], at, percent, 1.0, mean),
            _steps(f"{ident}-t", "Rows/s answered", process, [each.rows_per_s for each in slices], at, number),
            _steps(f"{ident}-q", "Queue, records", process, [each.queued for each in slices], at, number),
            _steps(
                f"{ident}-f",
                "Batch fill",
                process,
                [each.fill for each in slices],
                at,
                percent,
                1.0,
                "" if fill is None else percent(fill),
            ),
        ],
        table=_slices_table(f"Replica {process} over time", slices, at, None),
    )


def _slices_table(caption: str, slices: Sequence[Slice], at: Sequence[float], tokens: Sequence[float] | None) -> Table:
    def said(value: float | None, say: Callable[[float], str]) -> str:
        return "–" if value is None else say(value)

    rows = [
        [
            f"{number(each.start - at[0])} s",
            said(each.utilization, percent),
            said(each.rows_per_s, number),
            *([number(tokens[index]), count(each.replicas)] if tokens is not None else []),
            said(each.queued, number),
            said(each.fill, percent),
        ]
        for index, each in enumerate(slices)
    ]
    more = ("Tokens/s", "Replicas") if tokens is not None else ()
    return Table(caption, ("From", "Utilisation", "Rows/s answered", *more, "Queue", "Batch fill"), rows)


def _replicas_table(
    by_process: Mapping[str, Sequence[EngineLog]], process_shares: Mapping[str, TimeShares]
) -> Table | None:
    if not by_process:
        return None
    rows = []
    for process in sorted(by_process, key=lambda each: process_shares[each].utilization):
        engines, shares = by_process[process], process_shares[process]
        rows.append(
            [
                process,
                ", ".join(dict.fromkeys(engine.engine for engine in engines)),
                count(sum(engine.rows for engine in engines)),
                count(sum(engine.tokens for engine in engines)),
                percent(shares.utilization),
                *(seconds(value) for _, value in _kinds(shares)),
            ]
        )
    headings = ("Replica", "Engine", "Rows", "Tokens", "Utilisation", *KINDS)
    return _table("Replicas, the least utilised first", headings, rows, frozenset({1}))


# -- Distributions ------------------------------------------------------------------------


Bucket = tuple[float, float, int]
"""Lower bound (not in it), upper bound (in it), number."""


def _buckets(histogram: Mapping[float, int], bounds: Sequence[float]) -> list[Bucket]:
    """All buckets from the first to the last with something in it."""
    used = [index for index, bound in enumerate(bounds) if histogram.get(bound)]
    if not used:
        return []
    return [
        (bounds[index - 1] if index else -1.0, bounds[index], histogram.get(bounds[index], 0))
        for index in range(used[0], used[-1] + 1)
    ]


def _merged(buckets: Sequence[Bucket], most: int) -> list[Bucket]:
    """As few as ``most``, neighbours taken together."""
    step = max(1, -(-len(buckets) // most))
    groups = [buckets[index : index + step] for index in range(0, len(buckets), step)]
    return [(group[0][0], group[-1][1], sum(each[2] for each in group)) for group in groups]


def _bucket_name(bucket: Bucket, say: Callable[[float], str]) -> str:
    low, high, _ = bucket
    if say is count:  # of whole numbers
        return say(high) if high - low <= 1 else f"{say(low + 1)}–{say(high)}"
    return f"up to {say(high)}"


def _histogram_chart(
    ident: str, title: str, what: str, buckets: Sequence[Bucket], say: Callable[[float], str], note: str
) -> Chart:
    top = charts.nice_top([number_in for _, _, number_in in buckets])
    fullest = max(buckets, key=lambda bucket: bucket[2])
    drawing = charts.bars(
        [number_in for _, _, number_in in buckets],
        top,
        ident=ident,
        title=title,
        description=f"{plural(len(buckets), 'bar')} from {_bucket_name(buckets[0], say)} to "
        f"{_bucket_name(buckets[-1], say)} {what}; most in {_bucket_name(fullest, say)}.",
    )
    last, number_of = len(buckets) - 1, min(len(buckets), MOST_MARKS)
    places = sorted({round(last * rank / max(1, number_of - 1)) for rank in range(number_of)})
    marks = [
        (100 * (index + 0.5) / len(buckets), say(buckets[index][1]), rank % 2 == 0) for rank, index in enumerate(places)
    ]
    return Chart(title, note, drawing, count(top), marks)


def _histogram_table(caption: str, buckets: Sequence[Bucket], what: str, say: Callable[[float], str]) -> Table | None:
    if not buckets:
        return None
    total = sum(number_in for _, _, number_in in buckets)
    rows = [
        [_bucket_name(bucket, say), count(bucket[2]), percent(bucket[2] / total)] for bucket in buckets if bucket[2]
    ]
    return Table(caption, (what.capitalize() if what == "tokens" else "Up to", "Number", "Share"), rows)


def _lengths(log: RunLog) -> list[tuple[Chart, Table]]:
    found = []
    for ident, title, histogram in (
        ("fb-prompts", "Prompt lengths", log.prompt_lengths),
        ("fb-responses", "Response lengths", log.response_lengths),
    ):
        buckets = _buckets(histogram, TOKEN_BOUNDS)
        table = _histogram_table(title, buckets, "tokens", count)
        if table is None:
            continue
        median, long = percentile(histogram, 0.5), percentile(histogram, 0.99)
        note = f"p50 ≤ {count(median or 0)}, p99 ≤ {count(long or 0)} tokens"
        found.append((_histogram_chart(ident, title, "tokens", buckets, count, note), table))
    return found


def _latency_buckets(log: RunLog) -> list[Bucket]:
    return _merged(_buckets(log.latencies, LATENCY_BOUNDS), MOST_BARS)


def _latency_chart(log: RunLog) -> Chart | None:
    buckets = _latency_buckets(log)
    if not buckets:
        return None
    note = plural(sum(log.latencies.values()), "record")
    return _histogram_chart("fb-latency", "Records by latency", "", buckets, seconds, note)


def _latency_figures(log: RunLog) -> list[Figure]:
    found = [(share, percentile(log.latencies, share)) for share in (0.5, 0.9, 0.95, 0.99)]
    return [Figure(f"p{share * 100:.0f}", f"≤ {seconds(value)}") for share, value in found if value is not None]


# -- Failures and chunks --------------------------------------------------------------------


def _causes(log: RunLog) -> Table | None:
    if not log.causes:
        return None
    rows = [
        [cause, count(failed), percent(failed / log.rows) if log.rows else "–"] for cause, failed in log.causes.items()
    ]
    return Table("Failed rows by cause", ("Cause", "Rows", "Of all rows"), rows)


def _examples(log: RunLog) -> Table | None:
    if not log.examples:
        return None
    rows = [[count(each.row), each.cause, each.message] for each in log.examples]
    return Table("Failed rows of this run, for example", ("Row", "Cause", "Message"), rows, frozenset({1, 2}))


def _durations(log: RunLog) -> list[tuple[ChunkEntry, float, float]]:
    """(chunk, start within the run, seconds) of those that were done."""
    return [
        (chunk, chunk.started - log.started, max(0.0, chunk.ended - chunk.started))
        for chunk in log.chunks
        if chunk.started is not None and chunk.ended is not None
    ]


def _straggles(duration: float, median: float) -> bool:
    return duration > STRAGGLER * median and duration > median + 1


def _chunk_chart(log: RunLog) -> Chart | None:
    durations = _durations(log)
    if not durations:
        return None
    median = statistics.median(duration for _, _, duration in durations)
    top = charts.nice_top([duration for _, _, duration in durations])
    drawing = charts.dots(
        [
            (start, duration, "straggler" if _straggles(duration, median) else "usual")
            for _, start, duration in durations
        ],
        log.seconds,
        top,
        ident="fb-chunks",
        title="How long chunks took, by when they began",
        description=f"{plural(len(durations), 'chunk')}; the median was {seconds(median)}, the slowest "
        f"{seconds(max(duration for _, _, duration in durations))}.",
    )
    note = f"median {seconds(median)}; a square took more than {STRAGGLER:g} times that"
    return Chart("Duration, by start", note, drawing, seconds(top), _time_marks((0, log.seconds)))


def _chunks_note(log: RunLog) -> str:
    durations = _durations(log)
    if not durations:
        return ""
    median = statistics.median(duration for _, _, duration in durations)
    stragglers = sum(_straggles(duration, median) for _, _, duration in durations)
    late = (
        f"{plural(stragglers, 'chunk')} took more than {STRAGGLER:g} times the median"
        if stragglers
        else f"none took more than {STRAGGLER:g} times the median"
    )
    return (
        f"{plural(len(durations), 'chunk')} done in this run, {late}. A replica's first chunks hold the model's load; "
        "chunks that share a replica share its time."
    )


def _chunk_tables(log: RunLog) -> tuple[Table | None, Table | None]:
    durations = sorted(_durations(log), key=lambda each: -each[2])
    slowest = None
    if durations:
        median = statistics.median(duration for _, _, duration in durations)
        rows = [
            [
                count(chunk.index),
                count(chunk.rows),
                count(chunk.failures),
                seconds(start),
                seconds(duration),
                f"{number(duration / median)} ×" if median > 0 else "–",
                log.engines[chunk.batcher].process if chunk.batcher in log.engines else "–",
            ]
            for chunk, start, duration in durations
        ]
        headings = ("Chunk", "Rows", "Failures", "Began after", "Took", "Times the median", "Replica")
        slowest = _table("Chunks, the slowest first", headings, rows, {6})
    broken = [[count(chunk.index), count(chunk.rows), chunk.error] for chunk in log.chunks if chunk.error]
    failed = _table("Chunks that failed", ("Chunk", "Rows", "Error"), broken, frozenset({2})) if broken else None
    return slowest, failed


# -- Devices and event loops --------------------------------------------------------------------


def _gpus(log: RunLog) -> Table | None:
    def said(value: float | None, say: Callable[[float], str]) -> str:
        return "unknown" if value is None else say(value)

    rows = []
    for total in gpu.gpu_totals(log.gpus):
        memory = said(total.peak_memory_bytes, size)
        if total.peak_memory_bytes is not None and total.memory_total_bytes:
            memory += f" of {size(total.memory_total_bytes)}"
        rows.append(
            [
                total.name,
                total.uuid,
                said(total.mean_utilization, percent),
                memory,
                said(total.mean_power_w, lambda watts: f"{watts:,.0f} W"),
                said(total.energy_j, lambda joules: f"{number(joules / 3600)} Wh"),
                said(total.max_temperature_c, lambda degrees: f"{degrees:.0f} °C"),
                ", ".join(reason for reason in total.throttle_reasons if reason != "idle") or "none",
            ]
        )
    headings = ("GPU", "UUID", "Kernels ran", "Memory, peak", "Power, mean", "Energy", "Hottest", "Throttled by")
    return _table("GPUs while chunks were answered", headings, rows, frozenset({1, 7})) if rows else None


def _gpus_note(log: RunLog) -> str:
    energy = gpu.energy_j(gpu.gpu_totals(log.gpus))
    per_million = gpu.wh_per_million_tokens(energy, tokens_done(log))
    if energy is None or per_million is None:
        return ""
    return (
        f"{number(energy / 3600)} Wh for {count(tokens_done(log))} tokens of this run: {number(per_million)} Wh per "
        "million tokens."
    )


def _stalls_by_code(log: RunLog) -> Table | None:
    if not log.stalls:
        return None
    codes: dict[str, list[float]] = {}
    for _, stall in log.stalls:
        codes.setdefault(stall.code, []).append(stall.seconds)
    rows = [
        [code, count(len(times)), seconds(sum(times)), seconds(max(times))]
        for code, times in sorted(codes.items(), key=lambda pair: -sum(pair[1]))
    ]
    return _table("Code that held event loops", ("Code", "Times", "Together", "Longest"), rows)


def _stalls(log: RunLog) -> Table | None:
    if not log.stalls:
        return None
    rows = [
        [f"{number(stall.at - log.started)} s", seconds(stall.seconds), process, stall.code]
        for process, stall in sorted(log.stalls, key=lambda pair: pair[1].at)
    ]
    return _table("Each time an event loop stood still", ("Ended after", "Took", "Replica", "Code"), rows, {2, 3})


# -- Plan, parameters, earlier runs ------------------------------------------------------------------


def _plan(log: RunLog) -> Table:
    plan, rate = log.plan, measured_rows_per_s(log)
    to_do = plan.rows - plan.rows_reused
    done = [chunk for chunk in log.chunks if not chunk.error]
    largest = max((chunk.rows for chunk in done), default=None)
    fill, unknown = mean_fill(log.engines.values()), "–"
    expected = to_do / (plan.rows_per_s * plan.replicas)
    rows = [
        ["Rows of the output", count(plan.rows), f"{count(log.rows)} done"],
        ["Rows of earlier runs", count(plan.rows_reused), unknown],
        ["Chunks of this run", count(plan.chunks - plan.chunks_reused), f"{count(len(done))} done"],
        ["Rows per chunk", count(plan.chunk_rows), unknown if largest is None else f"at most {count(largest)}"],
        ["Replicas", f"at most {count(plan.replicas)}", count(replicas_seen(log))],
        ["Chunks at once per replica", count(plan.concurrency), _most_at_once(log)],
        ["Records in a full batch", count(plan.batch_rows), unknown if fill is None else f"{percent(fill)} full"],
        ["Rows/s per replica", number(plan.rows_per_s), unknown if rate is None else number(rate)],
        [
            "Time for the rows to do",
            seconds(expected),
            seconds(log.seconds) if knows_times(log) and log.outcome != "running" else unknown,
        ],
    ]
    if not knows_times(log):  # the parts know how the output was cut, and no more
        rows = [rows[3]]
    return Table("What was planned, and what happened", ("", "Planned", "Happened"), rows)


def _most_at_once(log: RunLog) -> str:
    """The most chunks that one process had under way."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for chunk in log.chunks:
        if chunk.started is not None and chunk.ended is not None and chunk.batcher in log.engines:
            process = changes.setdefault(log.engines[chunk.batcher].process, [])
            process += [(chunk.started, 1), (chunk.ended, -1)]
    most = 0
    for each in changes.values():
        now = 0
        for _, change in sorted(each):
            now += change
            most = max(most, now)
    return count(most) if most else "–"


def _versions(log: RunLog) -> Table | None:
    rows = [[package, version] for package, version in log.versions.items()]
    return Table("Versions, in the driver", ("Package", "Version"), rows, frozenset({1})) if rows else None


def _left_by(log: RunLog, later: RunLog) -> int:
    """Rows that a run did; where it was broken off, those that the next run found, of which its log may not know."""
    found = later.plan.rows_reused - log.plan.rows_reused if log.outcome == "unfinished" else 0
    return max(log.rows_done, found)


def _earlier(logs: Sequence[RunLog]) -> Table | None:
    """Of all but the last."""
    rows: list[list[str | Markup]] = [
        [
            moment(log.started),
            status(log),
            seconds(log.seconds),
            count(_left_by(log, later)),
            percent(log.utilization) if log.engines else "–",
            cut(log.error, 300) or "–",
        ]
        for log, later in itertools.pairwise(logs)
        if knows_times(log)
    ]
    headings = ("Began", "Outcome", "Took", "Rows done", "Utilisation", "Error")
    return Table("Earlier runs over this output", headings, rows, frozenset({1, 5})) if rows else None


def _table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Markup]],
    texts: Iterable[int] = (),
) -> Table:
    """A table of a number of rows that has no bound of its own."""
    return Table(caption, headings, rows[:MOST_ROWS], frozenset(texts), max(0, len(rows) - MOST_ROWS))
