"""A load test's progress: a live view where there is a terminal, lines where there is none, nothing when told so."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from flyte_batch.load.underway import Underway
from flyte_batch.progress.display import Display, ProgressMode
from flyte_batch.report.formats import latency, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LINES = 5.0


class LoadView:
    """Shows loads while it is entered: each in a live view, or by a line when it begins and every
    `SECONDS_BETWEEN_LINES` after.

    Args:
        out: where to; standard output by default, because Flyte shows a task's standard output as its log.
        mode: as for `Display`.

    Raises:
        BadInput: there is no such mode.
    """

    def __init__(self, out: TextIO | None = None, mode: ProgressMode | None = None) -> None:
        self._display = Display(self._frame, mode=mode, out=out, leaves_last_frame=False)
        self._known: Underway | None = None
        self._printed_s = 0.0

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.stop()

    def hear(self, underway: Underway) -> None:
        """Show it: the ``on_progress`` of a load."""
        known, self._known = self._known, underway
        begins = known is None or underway.rate_per_s != known.rate_per_s or underway.elapsed_s < known.elapsed_s
        if not self._display.is_plain:
            return
        if begins:
            self._printed_s = 0.0
            planned_s = underway.warm_up_s + underway.seconds
            self._display.say(f"{underway.rate_per_s:g} requests/s for {planned_s:g} s ...")
        elif underway.elapsed_s - self._printed_s >= SECONDS_BETWEEN_LINES:
            self._printed_s = underway.elapsed_s
            phase = "warming up, " if underway.is_warming_up else ""
            when = f"{underway.rate_per_s:g} requests/s, {phase}{_left(underway)}"
            self._display.say(f"{when}; {_requests(underway)}; {_latency(underway)}")

    def _frame(self, width: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        known = self._known
        if known is None:
            return ""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        total_s = known.warm_up_s + known.seconds
        time = Table.grid(padding=(0, 2, 0, 0))
        time.add_row(ProgressBar(total_s, min(known.elapsed_s, total_s), width=min(40, width // 2)), _left(known))
        grid.add_row("load", f"{known.rate_per_s:g} requests/s{', warming up' if known.is_warming_up else ''}")
        grid.add_row("time", time)
        grid.add_row("requests", Text(_requests(known), style="red" if known.failed else ""))
        grid.add_row("latency", _latency(known))
        return grid


def _left(underway: Underway) -> str:
    return f"{seconds(underway.left_s)} left" if underway.left_s else "waiting for the last answers"


def _requests(underway: Underway) -> str:
    return f"{underway.requests:,} requests, {underway.in_flight:,} under way, {underway.failed:,} failed"


def _latency(underway: Underway) -> str:
    if underway.p50_ms is None or underway.p99_ms is None:
        return "nothing measured yet"
    return f"p50 up to {latency(underway.p50_ms / 1000)}, p99 up to {latency(underway.p99_ms / 1000)} so far"
