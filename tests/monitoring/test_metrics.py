"""The definitions keep Prometheus' conventions and promises of few series."""

from __future__ import annotations

import re

import pytest

from flyte_batch.monitoring import metrics
from flyte_batch.monitoring.metrics import METRICS, Metric

by_name = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)

UNITS = {"ratio", "seconds", "bytes", "watts", "joules", "celsius"}


def test_names_are_unique() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) > 30


@by_name
def test_a_name_follows_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"flyte_batch_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    stem = metric.name.removesuffix("_total")
    assert not metric.unit or stem.endswith(f"_{metric.unit}")
    assert metric.unit or stem.rpartition("_")[2] not in UNITS


@by_name
def test_a_help_is_a_sentence(metric: Metric) -> None:
    assert re.fullmatch(r"[A-Z].*\.", metric.help)


@by_name
def test_no_label_names_what_there_are_ever_more_of(metric: Metric) -> None:
    assert set(metric.labels) <= {
        "caller", "cause", "engine", "gpu", "kind", "name", "outcome", "python", "stage", "state", "version"
    }  # fmt: skip


@by_name
def test_only_a_histogram_has_buckets_and_they_rise(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert len(metric.buckets) <= 20


def test_the_bounds_of_service_levels_are_bounds_of_buckets() -> None:
    assert {0.5, 2} <= set(metrics.RECORD_LATENCY.buckets)


def test_the_page_lists_every_metric_once_with_its_labels() -> None:
    lines = metrics.page().splitlines()
    rows = lines[lines.index("|---|---|---|---|") + 1 :]
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS, strict=True):
        name, kind, labels, text = (cell.strip() for cell in row.strip("|").split("|"))
        assert (name.strip("`"), kind, text) == (metric.name, metric.kind, metric.help)
        assert labels == ", ".join(metric.labels)
