"""Keeps a run's report current while the run goes on, and complete when it ends.

Nothing here may cost the run anything: rendering and writing happen on a thread, at most `MOST_SHARE` of the time, and
whatever fails is one warning.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from flyte_batch.monitoring import clock
from flyte_batch.report.history import LOG_FILE, other_logs
from flyte_batch.report.run_log import RunLog, logs_to_json

if TYPE_CHECKING:
    from flyte_batch.data.storage import Location
    from flyte_batch.report.samples import SampleAnswer

T = TypeVar("T")

logger = logging.getLogger(__name__)

PAGE_FILE = "_report.html"

EVERY_S = 10.0
FIRST_S = 3.0
MOST_SHARE = 0.05
"""Of the time, for rendering, writing and publishing."""
PATIENCE_S = 5.0
"""Longest that the end of a run waits for its report."""

Publish = Callable[[str], Awaitable[None]]
"""Shows a fragment of HTML in place of the one before."""

publisher: Publish | None = None
"""For keepers that are given none; set by what imports Flyte."""


class ReportKeeper:
    """Writes ``_report.json`` and publishes the report while the body of ``async with`` runs, and once more at its end.

    With the last one comes ``_report.html``. The log says how the run ended when the body is left.

    Args:
        log: of the run; read between the turns of the event loop, its ``ended`` set to the time while it runs.
        folder: the output.
        publish: shows a fragment of HTML; by default `publisher`.
        every_s: seconds between two reports, the first of them sooner.
        first_s: seconds until the first one.
        patience_s: longest that leaving the body takes.
    """

    def __init__(
        self,
        log: RunLog,
        folder: Location,
        publish: Publish | None = None,
        *,
        every_s: float = EVERY_S,
        first_s: float = FIRST_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._log = log
        self._publish = publish or publisher
        self._every_s = every_s
        self._first_s = min(first_s, every_s)
        self._patience_s = patience_s
        self._files = _Files(folder)
        self._warned = False
        self._rounds: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._rounds = asyncio.create_task(self._keep(), name="flyte-batch-report")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.wait([self._rounds])
        try:
            async with asyncio.timeout(self._patience_s):
                await self._report(last=True)
        except TimeoutError:
            self._warn(f"it was not written within {self._patience_s:g} s")

    @property
    def has_page(self) -> bool:
        """Whether the page of the run is in the output."""
        return self._files.has_page

    async def _keep(self) -> None:
        wait = self._first_s
        while True:
            await asyncio.sleep(wait)
            started = time.monotonic()
            await self._report()
            took = time.monotonic() - started
            wait = pause_s(self._every_s, took)

    async def _report(self, last: bool = False) -> None:
        """Write and publish what is known now; what fails is one warning."""
        try:
            if self._log.outcome == "running":
                self._log.ended = clock.now()
            fragment = await _on_thread(self._files.write, _snapshot(self._log), self._publish is not None, last)
            if self._publish is not None and fragment:
                await self._publish(fragment)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("the run's report is not up to date: %s", why)


def pause_s(every_s: float, took_s: float) -> float:
    """Seconds until the next report, if the last one took so long."""
    return max(every_s, took_s * (1 / MOST_SHARE - 1))


class _Files:
    """The files of an output's report; used on threads, of which one that was given up may still be at work."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._written = 0.0
        self._content = b""
        self._others: list[RunLog] = []
        self._samples: Sequence[SampleAnswer] = ()
        self.has_page = False

    def write(self, log: RunLog, published: bool, last: bool) -> str:
        """Write the log, and with the last one the page; gives the fragment where that is to be published."""
        from flyte_batch.data import storage
        from flyte_batch.report.page import render_fragment, render_page
        from flyte_batch.report.samples import SAMPLES, sample_answers

        with self._lock:
            if log.ended < self._written:  # a later log was written meanwhile
                return ""
            self._written = log.ended
            location = self._folder.child(LOG_FILE)
            with suppress(FileNotFoundError):
                content = storage.read_bytes(location)
                if content != self._content:  # an earlier run's, or another driver works on this output, too
                    self._others = other_logs(self._folder, content, log)
            logs = [*self._others, log]
            self._content = logs_to_json(logs)
            storage.write_atomically(location, self._content)
            if last or (published and len(self._samples) < SAMPLES):  # the last: a retry may have replaced some
                self._samples = sample_answers(self._folder, log)
            if last:
                page = render_page(logs, self._samples)
                storage.write_atomically(self._folder.child(PAGE_FILE), page.encode())
                self.has_page = True
            return render_fragment(logs, self._samples) if published else ""


def _snapshot(log: RunLog) -> RunLog:
    """A copy that does not change while a thread reads it."""
    engines = {batcher: replace(engine, samples=list(engine.samples)) for batcher, engine in log.engines.items()}
    copies = {each.name: _copy(getattr(log, each.name)) for each in fields(log)}
    return replace(log, **{**copies, "engines": engines})


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict) else value


async def _on_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call on a thread for which the interpreter's end waits `PATIENCE_S` at most: a store that is away may hold it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def tell(set_outcome: Callable[[Any], None], outcome: object) -> None:
        try:
            loop.call_soon_threadsafe(settle, set_outcome, outcome)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def work() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)

    thread = threading.Thread(target=work, name="flyte-batch-report", daemon=True)

    def wait() -> None:
        if thread.is_alive():
            thread.join(PATIENCE_S)

    atexit.register(wait)  # the run may be on a thread of Flyte's, which ends with the interpreter
    try:
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, as by Ctrl-C, and starts no thread any more
            return function(*arguments)
        return await future
    finally:
        atexit.unregister(wait)
