"""The page: its numbers are the log's, its structure is sound, and users' texts stay texts."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyte_batch.histograms import LATENCY_BOUNDS
from flyte_batch.monitoring.details import Example, Sample, Stall
from flyte_batch.report.page import options, render_fragment, render_page
from flyte_batch.report.run_log import ChunkEntry, RunLog, logs_from_json, logs_to_json
from flyte_batch.report.samples import SampleAnswer
from flyte_batch.report.sections.over_time import MANY_REPLICAS, OF_MANY
from flyte_batch.report.sections.shares import KINDS
from tests.report.logs import STARTED, gpu_use, make_log, make_plan, with_failures, with_stalls
from tests.report.parsing import Element, parse

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">'\"&{{ 7 * 7 }}{% raw %}"


def page(*logs: RunLog, samples: list[SampleAnswer] | None = None) -> Element:
    return parse(render_page(logs, samples or []))


def number(text: str) -> float:
    return float(text.replace(",", "").rstrip("%"))


def heading(root: Element) -> str:
    (found,) = root.all("h1")
    return found.text


# -- Truth --------------------------------------------------------------------


def test_the_answer_comes_first_and_has_the_logs_numbers() -> None:
    log = with_failures(make_log(plan=make_plan(price_per_hour=1.8)), BadRecord=40)
    root = page(log)
    assert heading(root) == (
        "7,960 of 8,000 rows answered in 1 min 45 s by 2 replicas, busy 90% of the time; 40 rows failed."
    )
    figures = root.figures()
    assert figures["Rows"] == ("8,000", "of 8,000")
    assert figures["Failures"] == ("40", "0.5% of the rows done")
    assert figures["Time"] == ("1 min 45 s", "2 replicas")
    assert figures["Utilisation"] == ("90%", "3 min busy of 3 min 20 s")
    assert figures["Tokens"] == ("240,000", "160,000 of prompts, 80,000 of responses")
    assert figures["Rows a second"][0] == "76.2"  # 8,000 in 105 s
    assert figures["Tokens a second"][0] == "2,286"
    assert figures["Cost"] == (
        "0.10",
        "3 min 20 s of replicas at 1.8 an hour; 0.42 per million tokens",
    )  # 200 s of 3600 at 1.8
    first_section = root.all("section")[0]
    assert heading(first_section) == heading(root)
    assert first_section.figures() == {name: figures[name] for name in first_section.figures()} != {}


def test_a_resumed_run_tells_what_it_did_and_what_was_there() -> None:
    plan = make_plan(rows=10_000, rows_reused=2_000, price_per_hour=1.8)
    log = make_log(plan=plan)
    log.count(2_000, 6, 1_000, 500, {"BadRecord": 6}, {24: 1_994}, {12: 1_994})
    root = page(log)
    assert heading(root) == (
        "8,000 of 8,000 rows answered in 1 min 45 s by 2 replicas, busy 90% of the time; 2,000 rows were there "
        "already; 6 of all 10,000 rows failed."
    )
    figures = root.figures()
    assert figures["Tokens"] == ("241,500", "161,000 of prompts, 80,500 of responses; 240,000 of them by this run")
    assert figures["Cost"][1].startswith("of this run alone: 3 min 20 s of replicas")
    assert figures["Cost"][1].endswith("; 0.42 per million tokens")


def test_utilisation_and_batch_fill_are_the_same_wherever_they_are_said() -> None:
    log = make_log(busy=60, loading=20, starved=10, assembling=5, late=0, tail=5, fill=0.4)
    sample = log.engines["batcher-0"].samples[-1]  # one more batch, a full one, in the last slice
    log.engines["batcher-0"].samples.append(
        dataclasses.replace(sample, at=sample.at + 1, batches=sample.batches + 1, fill=sample.fill + 1)
    )
    root = page(log)
    utilisation = log.time_shares().utilization
    assert root.figures()["Utilisation"][0] == f"{utilisation:.0%}"
    notes = [each.text for each in root.all("figcaption")]
    assert any(f"Utilisation mean {utilisation:.0%}" in note for note in notes)
    assert any("Batch fill" in note and "mean 41%" in note for note in notes)  # (50 x 0.4 + 1) / 51


def test_squares_are_spoken_of_only_where_there_are_some() -> None:
    log = make_log()
    assert "a square took" not in page(log).text
    log.chunks.append(ChunkEntry(90, 100, 0, 1, 1, "batcher-0", STARTED + 10, STARTED + 90))
    assert "a square took more than 3 times that" in page(log).text


def test_options_in_advice_are_marked_and_the_rest_stays_text() -> None:
    assert options("a <b> & --retry_failures -- z") == ("a &lt;b&gt; &amp; <code>--retry_failures</code> -- z")


def test_where_the_time_went_adds_up_to_all_of_it() -> None:
    log = make_log(busy=60, loading=10, starved=12, assembling=6, late=4, tail=8)
    rows = page(log).table("Where the time went")[1:]
    assert [row[0] for row in rows] == [*KINDS, "together"]
    assert [row[2] for row in rows] == ["60%", "10%", "12%", "6.0%", "4.0%", "8.0%", "100%"]
    assert rows[0][1] == "2 min"
    assert rows[-1][1] == "3 min 20 s"
    text = page(log).by_id("fb-content").text
    assert "Before the first replica began, 5 s went by" in text


def test_tables_of_histograms_hold_every_row() -> None:
    log = make_log(prompt_lengths={0.0: 3, 1.0: 2, 64.0: 1200, 96.0: 7}, latencies=dict.fromkeys(LATENCY_BOUNDS, 3))
    root = page(log)
    prompts = root.table("Prompt lengths")
    assert [row[:2] for row in prompts[1:]] == [["0", "3"], ["1", "2"], ["49–64", "1,200"], ["65–96", "7"]]
    assert sum(number(row[1]) for row in root.table("Response lengths")[1:]) == log.rows
    latencies = root.table("Latencies")[1:]
    assert len(latencies) <= 40
    assert sum(number(row[1]) for row in latencies) == 3 * len(LATENCY_BOUNDS)


def test_percentiles_are_said_to_be_upper_bounds() -> None:
    root = page(make_log(latencies={0.5011872: 90, 1.0: 9, 2.2387211: 1}))
    figures = root.figures()
    assert [figures[name][0] for name in ("p50", "p90", "p95", "p99")] == ["≤ 501 ms", "≤ 501 ms", "≤ 1 s", "≤ 1 s"]
    assert "upper bounds of buckets" in root.text


def test_failures_are_counted_by_cause_with_example_rows() -> None:
    root = page(with_failures(make_log(), BadRecord=30, BadResponse=2))
    assert root.table("Failed rows by cause")[1:] == [["BadRecord", "30", "0.4%"], ["BadResponse", "2", "<0.1%"]]
    examples = root.table("Failed rows of this run, for example")
    assert examples[1:] == [["7", "BadRecord", "why BadRecord"], ["8", "BadResponse", "why BadResponse"]]


def test_timeline_tables_add_up_to_the_rows() -> None:
    log = make_log()
    root = page(log)
    slice_s = log.seconds / 48
    for caption, rows in (("All replicas over time", 8000), ("Replica replica-1 over time", 4000)):
        rates = [row[2] for row in root.table(caption)[1:]]
        assert sum(number(rate) for rate in rates if rate != "–") * slice_s == pytest.approx(rows, rel=0.01)
    tokens = [number(row[3]) for row in root.table("All replicas over time")[1:]]
    assert sum(tokens) * slice_s == pytest.approx(240_000, rel=0.01)


def test_every_chunk_is_in_the_table_the_slowest_first_and_failed_ones_have_their_own() -> None:
    log = make_log(chunks=5)
    log.chunks.append(ChunkEntry(90, 100, 2, 1, 1, "batcher-0", STARTED + 10, STARTED + 110))
    log.chunks.append(ChunkEntry(91, 100, 0, 0, 0, error="EngineDead"))
    root = page(log)
    rows = root.table("Chunks, the slowest first")[1:]
    assert len(rows) == 11
    assert rows[0][:2] == ["90", "100"]
    assert rows[0][3:] == ["10 s", "1 min 40 s", "5.21 ×", "replica-0"]
    assert root.table("Chunks that failed")[1:] == [["91", "100", "EngineDead"]]
    assert "1 chunk took more than 3 times the median" in root.text


def test_what_was_planned_stands_beside_what_happened() -> None:
    log = make_log(plan=make_plan(rows=8_500, rows_reused=500, chunks=85, chunks_reused=5))
    found = {row[0]: row[1:] for row in page(log).table("What was planned, and what happened")[1:]}
    assert found == {
        "Rows of the output": ["8,500", "8,000 done"],
        "Rows of earlier runs": ["500", "–"],
        "Chunks of this run": ["80", "80 done"],
        "Rows per chunk": ["100", "at most 100"],
        "Replicas": ["at most 2", "2"],
        "Chunks at once per replica": ["4", "1"],
        "Records in a full batch": ["64", "90% full"],
        "Rows/s per replica": ["50", "41.7"],  # 4,000 rows in 96 s with an engine
        "Time for the rows to do": ["1 min 20 s", "1 min 45 s"],  # 8,000 rows at 2 x 50
    }


def test_gpus_are_shown_with_what_a_million_tokens_takes() -> None:
    root = page(make_log(gpus=(gpu_use("GPU-1"), gpu_use("GPU-2"))))
    rows = root.table("GPUs while chunks were answered")
    assert rows[1] == [
        "NVIDIA A10G", "GPU-1", "75%", "20 GiB of 24 GiB", "72 W", "2 Wh", "71 °C", "power_cap",
    ]  # fmt: skip
    assert root.figures()["Energy"] == ("4 Wh", "16.7 Wh per million tokens")  # 4 Wh for 240,000 tokens
    assert "4 Wh for 240,000 tokens of this run: 16.7 Wh per million tokens." in root.text


def test_what_is_not_known_of_a_gpu_is_a_dash() -> None:
    silent: dict[str, Any] = {
        "busy_start_s": None, "busy_end_s": None, "energy_source": None, "energy_start_j": None, "energy_end_j": None,
        "peak_memory_bytes": None, "max_temperature_c": None, "throttle_reasons": (),
    }  # fmt: skip
    rows = page(make_log(gpus=(dataclasses.replace(gpu_use(), **silent),))).table("GPUs while chunks were answered")
    assert rows[1] == ["NVIDIA A10G", "GPU-1", "–", "–", "–", "–", "–", "none"]


def test_without_gpus_stalls_or_failures_nothing_is_said_of_them() -> None:
    root = page(make_log())
    assert not {"fb-gpus", "fb-loops", "fb-failures", "fb-samples", "fb-earlier"} & {
        each.attributes.get("id") for each in root.all()
    }


def test_code_that_held_event_loops_is_shown_with_its_time() -> None:
    log = with_stalls(make_log(), ("f (a.py:1)", 1.5), ("g (b.py:2)", 4.0), ("f (a.py:1)", 2.0))
    root = page(log)
    assert root.table("Code that held event loops")[1:] == [
        ["g (b.py:2)", "1", "4 s", "4 s"], ["f (a.py:1)", "2", "3.5 s", "2 s"],
    ]  # fmt: skip
    assert len(root.table("Each time an event loop stood still")) == 4


def test_a_running_run_shows_how_far_it_is_and_as_of_when() -> None:
    root = page(make_log(plan=make_plan(rows=16_000), outcome="running"))
    assert heading(root) == "8,000 of 16,000 rows done (50%) after 1 min 45 s; none failed; about 1 min 41 s left."
    (bar,) = root.all("progress")
    assert bar.attributes["value"] == "0.5000"
    assert "as of 2026-" in root.all("header")[0].text
    assert root.all("time")[0].attributes["datetime"] == "2026-11-18T11:06:40Z"
    early = page(make_log(plan=make_plan(rows=80_000), outcome="running"))
    assert "too early to say how long it will take" in heading(early)


def test_rows_of_earlier_runs_are_told_apart_in_a_run_that_is_not_done() -> None:
    log = make_log(plan=make_plan(rows=16_000, rows_reused=2_000), outcome="running")
    log.count(2_000, 0, 1_000, 500, {}, {24: 2_000}, {12: 2_000})
    done = "10,000 of 16,000 rows done"
    assert heading(page(log)).startswith(f"{done} (62%) after 1 min 45 s, 2,000 of them by earlier runs; none failed")
    log.outcome = "cancelled"
    kept = f"Cancelled after 1 min 45 s, with {done}, 2,000 of them by earlier runs, which are kept."
    assert heading(page(log)) == kept


def test_a_run_that_was_broken_off_is_not_said_to_have_ended() -> None:
    header = page(make_log(outcome="unfinished")).all("header")[0].text
    assert "Broken off" in header
    assert "last heard of 2026-" in header
    assert "ended" not in header
    assert "ended 2026-" in page(make_log()).all("header")[0].text


def test_a_failed_run_shows_its_error_before_its_figures() -> None:
    root = page(make_log(outcome="failed", error="ChunkFailed: 3 of 80 chunks failed"))
    assert heading(root) == "Failed after 1 min 45 s, with 8,000 of 8,000 rows done, which are kept."
    answer = [each.attributes.get("class") or each.tag for each in root.all("section")[0].all("h1", "div", "dl")]
    assert answer.index("fb-error") < answer.index("fb-figures")
    assert root.all("pre")[0].text == "ChunkFailed: 3 of 80 chunks failed"


def test_a_run_that_had_nothing_to_do_says_so() -> None:
    log = make_log(replicas=0, plan=make_plan(rows_reused=8_000, chunks_reused=80))
    log.count(8_000, 3, 160_000, 80_000, {"BadRecord": 3}, {24: 7_997}, {12: 7_997})
    root = page(log)
    assert heading(root) == "Nothing was left to do: earlier runs had done all 8,000 rows; 3 rows failed."
    assert "Nothing to advise on." in root.text


def test_below_a_run_that_had_nothing_to_do_stands_the_one_that_did_it() -> None:
    idle = make_log(replicas=0, started=STARTED + 900, ended=STARTED + 901, plan=make_plan(rows_reused=8_000))
    idle.count(8_000, 0, 160_000, 80_000, {}, {24: 8_000}, {12: 8_000})
    root = page(make_log(), idle, idle)
    assert heading(root) == "Nothing was left to do: earlier runs had done all 8,000 rows; none failed."
    assert "the last run that did something; it began 2026-11-18 11:06:40 UTC" in root.text
    assert root.figures()["Utilisation"] == ("90%", "3 min busy of 3 min 20 s")
    assert root.table("All replicas over time")
    assert len(root.table("Earlier runs over this output")) == 3
    idle.outcome = "running"  # what it will do is not known yet
    root = page(make_log(), idle)
    assert "All replicas over time" not in root.text
    assert "the last run that did something" not in root.text


def test_a_log_made_of_parts_alone_claims_no_times() -> None:
    log = make_log(replicas=0, started=0.0, ended=0.0, outcome="unfinished", plan=make_plan(rows=100, chunks=2))
    log.count(100, 5, 2_000, 900, {"BadRecord": 5}, {24: 95}, {12: 95})
    root = page(log)
    assert (
        heading(root) == "95 of 100 rows in the parts have a response; 5 rows failed, and the output is not finished."
    )
    assert root.figures()["Rows"] == ("100", "in 2 parts")
    assert not root.all("time")
    assert "1970" not in root.text
    assert not {"Time", "Utilisation", "Cost"} & root.figures().keys()
    assert root.table("What was planned, and what happened")[1:] == [["Rows per chunk", "100", "–"]]


def test_many_replicas_show_the_ends_and_list_the_rest() -> None:
    log = make_log(replicas=120, chunks=2)
    for index, engine in enumerate(log.engines.values()):
        first, last = engine.samples
        engine.samples[1] = Sample(
            last.at, *(index, last.at - first.at - index, 0.0, 0.0), *[last.completed, 1, 1, 0, 0]
        )
    root = page(log)
    drawn = [each.text.split()[0] for each in root.all("h3") if each.text.startswith("replica-")]
    assert drawn == ["replica-0", "replica-1", "replica-2", "replica-117", "replica-118", "replica-119"]
    assert len(drawn) == 2 * OF_MANY
    rows = root.table("Replicas, the least utilised first")[1:]
    assert [row[0] for row in rows] == [f"replica-{index}" for index in range(120)]
    assert "120 replicas answered chunks" in root.text
    few = page(make_log(replicas=MANY_REPLICAS))
    assert sum(each.text.startswith("replica-") for each in few.all("h3")) == MANY_REPLICAS


def test_an_earlier_run_that_was_broken_off_did_what_the_next_one_found() -> None:
    killed = make_log(replicas=0, outcome="unfinished", plan=make_plan(rows_reused=100))
    rows = page(killed, make_log(plan=make_plan(rows_reused=868))).table("Earlier runs over this output")
    assert rows[1][1:4] == ["Broken off", "1 min 45 s", "768"]


def test_earlier_runs_are_listed() -> None:
    earlier = make_log(outcome="cancelled", error="CancelledError")
    rows = page(earlier, make_log()).table("Earlier runs over this output")
    assert rows[1] == ["2026-11-18 11:06:40 UTC", "Cancelled", "1 min 45 s", "8,000", "92%", "CancelledError"]


def test_the_page_of_a_log_that_went_through_its_file_is_the_same() -> None:
    log = with_stalls(with_failures(make_log(gpus=(gpu_use(),)), BadRecord=4), ("f (a.py:1)", 1.5))
    assert render_page(logs_from_json(logs_to_json([log]))) == render_page([log])


# -- Structure and safety -------------------------------------------------------


def full_log() -> RunLog:
    log = with_stalls(with_failures(make_log(gpus=(gpu_use(),), error="why"), BadRecord=4), ("f (a.py:1)", 1.5))
    log.chunks.append(ChunkEntry(91, 100, 0, 0, 0, error="EngineDead"))
    return log


SAMPLES = [
    SampleAnswer(0, {"question": "How many?"}, "Seven.", None),
    SampleAnswer(1, {"question": "Why?"}, None, "BadRecord: too long"),
]


@pytest.mark.parametrize("render", [render_page, render_fragment])
def test_headings_have_an_order_ids_are_unique_and_references_lead_somewhere(render: Any) -> None:
    root = parse(render([make_log(outcome="failed"), full_log()], SAMPLES))
    levels = [int(each.tag[1]) for each in root.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [each.attributes["id"] for each in root.all() if "id" in each.attributes]
    assert [ident for ident, times in Counter(ids).items() if times > 1] == []
    for each in root.all():
        for reference in (each.attributes.get("aria-labelledby") or "").split():
            assert reference in ids
        target = each.attributes.get("href") or ""
        if target.startswith("#"):
            assert target[1:] in ids


def test_each_drawing_has_a_name_a_description_and_its_numbers_in_a_table() -> None:
    root = page(full_log(), samples=SAMPLES)
    drawings = root.all("svg")
    assert len(drawings) == 1 + 4 + 2 * 4 + 2 + 1 + 1
    for drawing in drawings:
        title, description = drawing.all("title", "desc")
        assert title.text
        assert description.text
    captions = {each.text for each in root.all("caption")}
    assert {
        "Where the time went", "All replicas over time", "Replica replica-0 over time", "Replica replica-1 over time",
        "Prompt lengths", "Response lengths", "Latencies", "Chunks, the slowest first",
    } <= captions  # fmt: skip
    assert all(row.all("th") for table in root.all("table") for row in table.all("tr"))


def test_nothing_is_fetched_and_nothing_runs() -> None:
    for html in (render_page([full_log()], SAMPLES), render_fragment([full_log()], SAMPLES)):
        root = parse(html)
        assert not root.all("script", "img", "iframe", "object", "embed", "form", "base")
        assert not re.search(r"url\(|@import|https?://", html)
        assert not [name for each in root.all() for name in each.attributes if name.startswith("on")]
        assert all((each.attributes.get("href") or "#").startswith(("#", "data:,")) for each in root.all())
    policy = [each.attributes.get("content") or "" for each in page(make_log()).all("meta")]
    assert any(each.startswith("default-src 'none'") for each in policy)


def test_the_fragment_is_no_document_and_its_styles_keep_to_it() -> None:
    html = render_fragment([full_log()], SAMPLES)
    root = parse(html)
    assert not root.all("html", "head", "body", "main", "meta")
    (style,) = root.all("style")
    depth, selectors, text = 0, [], ""
    for character in style.text:
        if character == "{":
            selectors += [text.strip()] if depth == 0 else []
            depth, text = depth + 1, ""
        elif character in "};":
            depth, text = depth - (character == "}"), ""
        else:
            text += character
    assert depth == 0
    assert selectors == [".fb-report"]
    assert [each.attributes["class"] for each in root.children if isinstance(each, Element) and each.tag == "div"] == [
        "fb-report"
    ]


def test_hostile_texts_are_shown_as_they_are() -> None:
    log = make_log(
        output=f"/data/{HOSTILE}", source=HOSTILE, run=HOSTILE, action=HOSTILE, error=HOSTILE, outcome="failed",
        settings={HOSTILE: HOSTILE, "nested": {"text": HOSTILE}}, versions={HOSTILE: HOSTILE},
        causes={HOSTILE: 3}, failures=3, examples=[Example(1, HOSTILE, HOSTILE)],
        stalls=[(HOSTILE, Stall(STARTED + 10, 2.0, HOSTILE))],
    )  # fmt: skip
    engine = log.engines["batcher-0"]
    engine.process = engine.engine = HOSTILE
    log.chunks.append(ChunkEntry(91, 100, 0, 0, 0, error=HOSTILE))
    samples = [SampleAnswer(0, {HOSTILE: HOSTILE}, HOSTILE, None), SampleAnswer(1, {}, None, HOSTILE)]
    for render in (render_page, render_fragment):
        root = parse(render([log, log], samples))
        assert not root.all("script", "img")
        assert not [name for each in root.all() for name in each.attributes if name.startswith("on")]
        assert root.text.count(HOSTILE) >= 15
        assert "49" not in [each.text.strip() for each in root.all("td", "dd", "pre")]
    assert [each.text for each in root.all("pre")].count(HOSTILE) == 4


NUMBERS = st.integers(0, 10**9)
TIMES = st.floats(0, 1e6)


@settings(max_examples=40, deadline=None)
@given(
    time=st.fixed_dictionaries(dict.fromkeys(("busy", "loading", "starved", "assembling", "late", "tail"), TIMES)),
    replicas=st.integers(0, 12),
    chunks=st.integers(0, 3),
    outcome=st.sampled_from(["running", "done", "failed", "cancelled", "unfinished"]),
    price=st.one_of(st.none(), st.floats(0, 1e4)),
    histogram=st.dictionaries(st.sampled_from([0.0, 1.0, 64.0, 16_777_216.0]), NUMBERS),
    plan=st.fixed_dictionaries({"rows": st.integers(1, 10**9), "chunk_rows": st.integers(1, 10**6)}),
)
def test_any_log_makes_a_page_without_a_broken_number(
    time: dict[str, float], replicas: int, chunks: int, outcome: str, price: float | None,
    histogram: dict[float, int], plan: dict[str, Any],
) -> None:  # fmt: skip
    log = make_log(
        **time, replicas=replicas, chunks=chunks, outcome=outcome, prompt_lengths=histogram,
        plan=make_plan(**plan, price_per_hour=price),
    )  # fmt: skip
    text = page(log).text
    assert not re.search(r"\bnan\b|\binf\b|NaN|None", text)
