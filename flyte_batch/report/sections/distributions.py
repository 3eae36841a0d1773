"""How long prompts and responses were, and how long records took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flyte_batch.histograms import LATENCY_BOUNDS, TOKEN_BOUNDS, percentile
from flyte_batch.report import charts
from flyte_batch.report.answer import Figure
from flyte_batch.report.formats import count, latency, percent, plural
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Chart, Table

MOST_BARS = 40
MOST_MARKS = 9
"""Below a histogram."""

Bucket = tuple[float, float, int]
"""Lower bound (not in it), upper bound (in it), number."""


def lengths(log: RunLog) -> list[tuple[Chart, Table]]:
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


def latency_chart(log: RunLog) -> Chart | None:
    buckets = _latency_buckets(log)
    if not buckets:
        return None
    note = plural(sum(log.latencies.values()), "record")
    return _histogram_chart("fb-latency", "Records by latency", "", buckets, latency, note)


def latency_figures(log: RunLog) -> list[Figure]:
    found = [(share, percentile(log.latencies, share)) for share in (0.5, 0.9, 0.95, 0.99)]
    return [Figure(f"p{share * 100:.0f}", f"≤ {latency(value)}") for share, value in found if value is not None]


def latency_table(log: RunLog) -> Table | None:
    return _histogram_table("Latencies", _latency_buckets(log), "records", latency)


def _latency_buckets(log: RunLog) -> list[Bucket]:
    return _merged(_buckets(log.latencies, LATENCY_BOUNDS), MOST_BARS)


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
