"""What is seen of a load while it goes on."""

from __future__ import annotations

import io
from typing import Any

import pytest

from flyte_batch.load.underway import Underway
from flyte_batch.load.view import LoadView
from flyte_batch.progress import VARIABLE


@pytest.fixture(autouse=True)
def _no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def after(elapsed_s: float, **changes: Any) -> Underway:
    """Of a load of 5 + 20 s at 8 requests a second."""
    known: dict[str, Any] = {
        "rate_per_s": 8.0, "warm_up_s": 5.0, "seconds": 20.0, "elapsed_s": elapsed_s, "requests": 40, "in_flight": 3,
        "failed": 2, "p50_ms": 14.1254, "p99_ms": 1258.9,
    }  # fmt: skip
    return Underway(**known | changes)


def test_lines_say_what_begins_and_every_five_seconds_how_it_goes() -> None:
    out = io.StringIO()
    with LoadView(out) as view:
        for elapsed_s in (0, 0.5, 4.9, 9.9, 14.0, 25.5):
            warming = {"p50_ms": None, "p99_ms": None} if elapsed_s < 5 else {}
            view.hear(after(elapsed_s, **warming))
        view.hear(after(0, rate_per_s=16.0))
        view.hear(after(4.99, rate_per_s=16.0))
        view.hear(after(5, rate_per_s=16.0))
        view.hear(after(5.1, rate_per_s=12.0))  # the one before was heard of for the last time when it began, say
    how = "40 requests, 3 under way, 2 failed; p50 up to 14.1 ms, p99 up to 1.26 s so far"
    assert out.getvalue().splitlines() == [
        "8 requests/s for 25 s ...",
        f"8 requests/s, 15 s left; {how}",
        f"8 requests/s, waiting for the last answers; {how}",
        "16 requests/s for 25 s ...",
        f"16 requests/s, 20 s left; {how}",
        "12 requests/s for 25 s ...",
    ]


def test_of_a_long_warm_up_it_is_said_that_it_is_one() -> None:
    out = io.StringIO()
    with LoadView(out) as view:
        view.hear(after(0, warm_up_s=60.0))
        view.hear(after(30, warm_up_s=60.0, p50_ms=None, p99_ms=None))
    assert out.getvalue().splitlines()[1:] == [
        "8 requests/s, warming up, 50 s left; 40 requests, 3 under way, 2 failed; nothing measured yet"
    ]


def test_a_live_view_goes_when_the_load_is_over_and_off_says_nothing() -> None:
    pyte = pytest.importorskip("pyte")
    out, silent = io.StringIO(), io.StringIO()
    with LoadView(silent, "off") as view:
        view.hear(after(0))
        view.hear(after(10))
    assert silent.getvalue() == ""
    with LoadView(out, "live") as view:
        view.hear(after(15))
        view._display.say("a row")
    for text in ("8 requests/s", "10 s left", "40 requests, 3 under way, 2 failed", "p99 up to 1.26 s so far"):
        assert text in out.getvalue()
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    assert [line.rstrip() for line in screen.display if line.strip()] == ["a row"]
