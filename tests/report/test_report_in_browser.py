"""The page in a real browser: at phone width and on a desk, in light and dark, by keyboard, read aloud, printed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flyte.report import Report

from flyte_batch.monitoring.details import Example, Stall
from flyte_batch.report.page import render_fragment, render_page
from flyte_batch.report.run_log import ChunkEntry, RunLog
from flyte_batch.report.samples import SampleAnswer
from tests.report.logs import STARTED, gpu_use, make_log, make_plan, with_failures, with_stalls

playwright = pytest.importorskip("playwright.sync_api", reason="the extra monitoring-tests is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra monitoring-tests is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

A4_WIDTH = 703
"""Pixels of CSS between the margins of a printed page."""
LONG = "wrörd" * 200
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
SAMPLES = [
    SampleAnswer(0, {"question": "How many apples are left?\n\tThink.", "x" * 300: LONG}, LONG + HOSTILE, None),
    SampleAnswer(1, {"question": HOSTILE}, None, f"BadRecord: {LONG}"),
]


def full_log(**changes: Any) -> RunLog:
    """Every section is there, with texts that are long and hostile."""
    plan = make_plan(price_per_hour=1.8, rows_reused=500, rows=8_500)
    log = make_log(busy=50, starved=40, plan=plan, gpus=(gpu_use(), gpu_use("GPU-2")), **changes)
    log = with_stalls(with_failures(log, BadRecord=400, BadResponse=3), (f"clean ({LONG}.py:3)", 1.5))
    log.output, log.source = f"s3://bucket/{LONG}", f"s3://bucket/{LONG}"
    log.settings = {"prompt": HOSTILE + LONG, LONG: {"inner": [LONG]}}
    log.examples.append(Example(8, "BadRecord", LONG + HOSTILE))
    log.stalls.append((f"replica-{LONG}", Stall(STARTED + 50, 2.0, LONG)))
    log.chunks.append(ChunkEntry(90, 100, 2, 1, 1, "batcher-0", STARTED + 10, STARTED + 110))
    log.chunks.append(ChunkEntry(91, 100, 0, 0, 0, error=f"EngineDead: {LONG}"))
    return log


def parts_log() -> RunLog:
    log = make_log(replicas=0, started=0.0, ended=0.0, outcome="unfinished", plan=make_plan(rows=100, chunks=2))
    log.count(100, 5, 2_000, 900, {"BadRecord": 5}, {24: 95}, {12: 95})
    return log


LOGS: dict[str, Callable[[], list[RunLog]]] = {
    "done": lambda: [full_log(outcome="cancelled", error=LONG), full_log()],
    "failed": lambda: [full_log(outcome="failed", error=f"ChunkFailed: {HOSTILE} {LONG}", died=["a", "b"])],
    "running": lambda: [full_log(outcome="running")],
    "many": lambda: [make_log(replicas=120, chunks=2)],
    "parts": lambda: [parts_log()],
    "nothing": lambda: [make_log(replicas=0, outcome="running")],
}


@pytest.fixture(autouse=True)
def _close_singletons() -> None:
    """In place of the one of conftest.py, which is asynchronous: Playwright has the thread's event loop."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # The page under test is ours; containers lack what the sandbox needs.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, and what it said and asked for."""

    def __init__(self, browser: Any, html: str, folder: Path, width: int = 1280, scheme: str = "light") -> None:
        file = folder / "page.html"
        file.write_text(html)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.route(
            "**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort()
        )
        self.page.goto(file.as_uri())
        self.home = file.as_uri()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def open_details(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")

    @property
    def width(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, "light") for name in LOGS] + [("done", "dark"), ("failed", "dark"), ("running", "dark")]
)
def test_it_fits_asks_for_nothing_and_has_nothing_to_complain_of(
    name: str, scheme: str, browser: Any, tmp_path: Path
) -> None:
    with Opened(browser, render_page(LOGS[name](), SAMPLES), tmp_path, scheme=scheme) as opened:
        for width in (1280, 768, 360, 320):
            opened.page.set_viewport_size({"width": width, "height": 800})
            assert opened.width <= width
        opened.open_details()
        assert opened.width <= width
        assert opened.page.evaluate("window.hacked") is None
        assert opened.said == []
        assert opened.asked == [opened.home]
        colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 19, 24)")


def test_on_a_phone_the_time_table_is_whole_and_options_are_not_broken(browser: Any, tmp_path: Path) -> None:
    log = with_failures(make_log(busy=50, starved=40), MissingValue=400)
    with Opened(browser, render_page([log]), tmp_path, 360) as opened:
        scroll = opened.page.locator("section[aria-labelledby=fb-time] .fb-scroll")
        assert scroll.evaluate("each => each.scrollWidth - each.clientWidth") == 0
        options = opened.page.locator(".fb-action code")
        assert options.all_text_contents() == ["--retry_failures"]
        assert options.evaluate("each => each.getClientRects().length") == 1


def test_the_charts_of_a_row_stand_in_a_row(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, render_page([make_log(busy=50, starved=40)]), tmp_path) as opened:
        for grid in opened.page.locator(".fb-grid").all():
            tops = grid.locator(".fb-plot").evaluate_all("plots => plots.map(each => each.getBoundingClientRect().top)")
            assert len(tops) == 4
            assert max(tops) - min(tops) < 1


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("done", 360, "light"),
        ("done", 1280, "dark"),
        ("failed", 360, "dark"),
        ("failed", 1280, "light"),
        ("running", 360, "dark"),
        ("parts", 360, "light"),
        ("nothing", 360, "light"),
    ],
)
def test_axe_finds_no_barrier(name: str, width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    with Opened(browser, render_page(LOGS[name](), SAMPLES), tmp_path, width, scheme) as opened:
        opened.open_details()
        results = axe.Axe().run(opened.page)
        assert results.violations_count == 0, results.generate_report()
        assert any(each["id"] == "color-contrast" for each in results.response["passes"])


def test_screen_readers_are_told_of_landmarks_headings_and_what_each_drawing_shows(
    browser: Any, tmp_path: Path
) -> None:
    with Opened(browser, render_page(LOGS["done"](), SAMPLES), tmp_path) as opened:
        for role in ("banner", "main", "contentinfo"):
            assert opened.page.get_by_role(role).count() == 1, role
        assert opened.page.get_by_role("navigation", name="Sections").count() == 1
        assert opened.page.get_by_role("heading", level=1).count() == 1
        regions = [each.aria_snapshot().splitlines()[0] for each in opened.page.get_by_role("region").all()]
        assert len(set(regions)) == 1 + opened.page.get_by_role("heading", level=2).count()
        drawings = opened.page.get_by_role("img").all()
        assert len(drawings) == 1 + 4 + 2 * 4 + 2 + 1 + 1
        names = [re.findall(r'img "(.+?)"', each.aria_snapshot())[0] for each in drawings]
        assert len(set(names)) == len(names)
        assert names[0] == (
            "Where the seconds of all engines went One bar, from left to right: busy 52%, loading 2.1%, starved 41%, "
            "assembling 2.0%, blocked 1.3%, tail 2.1%."
        )


def test_everything_is_reached_by_keyboard_and_the_focus_is_seen(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, render_page(LOGS["done"](), SAMPLES), tmp_path) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the answer")
        assert skip.evaluate("each => each === document.activeElement && each.getBoundingClientRect().left >= 0")
        page.keyboard.press("Enter")
        assert page.url.endswith("#fb-content")
        wanted = page.locator("a[href], summary, .fb-scroll:visible").count() - 1  # less the skip link, which is behind
        seen: list[str] = []
        for _ in range(wanted):
            page.keyboard.press("Tab")
            focus = page.evaluate(
                "(() => { const each = document.activeElement, style = getComputedStyle(each);"
                " return [each.tagName, style.outlineStyle, parseFloat(style.outlineWidth)] })()"
            )
            assert focus[1:] == ["solid", 2], focus
            seen.append(focus[0])
        assert {"A", "SUMMARY", "DIV"} == set(seen)
        summary = page.locator("summary").first
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator("details").first.get_attribute("open") is not None
        assert page.locator("details table").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints_on_white_without_navigation(scheme: str, browser: Any, tmp_path: Path) -> None:
    with Opened(browser, render_page(LOGS["done"](), SAMPLES), tmp_path, scheme=scheme) as opened:
        pdf = opened.page.pdf(format="A4", print_background=True)
        assert pdf.startswith(b"%PDF-")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
        opened.page.emulate_media(media="print", color_scheme=scheme)
        opened.page.set_viewport_size({"width": A4_WIDTH, "height": 1000})
        assert opened.width <= A4_WIDTH
        assert opened.page.get_by_role("navigation").count() == 0
        style = "getComputedStyle(document.querySelector('.fb-report'))"
        body = "getComputedStyle(document.body)"
        colours = opened.page.evaluate(f"[{body}.backgroundColor, {style}.backgroundColor, {style}.color]")
        assert colours == ["rgb(255, 255, 255)", "rgb(255, 255, 255)", "rgb(26, 31, 38)"]


def flyte_page(*tabs: str) -> str:
    """The page that Flyte makes of a task's report."""
    report = Report("report")
    for index, content in enumerate(tabs):
        report.get_tab("main" if index == 0 else f"tab {index}").replace(content)
    return str(report.get_final_report())


TAB_STYLE = """(() => { const tab = document.querySelector('#flyte-frame-tabs li'), style = getComputedStyle(tab);
    const bar = document.querySelector('#flyte-frame-tabs').getBoundingClientRect();
    return [style.color, style.fontSize, style.listStyleType, style.textAlign, style.fontFamily, bar.height] })()"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_in_flytes_report_it_is_whole_and_leaves_the_rest_alone(
    width: int, scheme: str, browser: Any, tmp_path: Path
) -> None:
    with Opened(browser, flyte_page("<p>plain</p>", "<p>other</p>"), tmp_path, width, scheme) as opened:
        before = opened.page.evaluate(TAB_STYLE)
    html = flyte_page(render_fragment(LOGS["done"](), SAMPLES), "<p>other</p>")
    with Opened(browser, html, tmp_path, width, scheme) as opened:
        page = opened.page
        assert page.evaluate(TAB_STYLE) == before
        overflow = page.evaluate("document.querySelector('.fb-report').getBoundingClientRect().right") - width
        assert overflow <= 0
        assert page.locator(".fb-report h1").is_visible()
        assert page.locator(".fb-advice").evaluate("each => getComputedStyle(each).listStyleType") == "decimal"
        page.get_by_text("tab 1").click()
        assert not page.locator(".fb-report h1").is_visible()
        assert page.get_by_text("other", exact=True).is_visible()
        assert page.evaluate("window.hacked") is None
        assert [each for each in opened.asked if not each.startswith(("file:", "https://fonts.googleapis.com/"))] == []
        page.get_by_text("main", exact=True).click()
        results = axe.Axe().run(page, context=".fb-report")
        assert results.violations_count == 0, results.generate_report()
