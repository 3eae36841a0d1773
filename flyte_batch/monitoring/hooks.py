"""Who hears of events: `subscribe` a `Hook`, and every event of the process is given to it.

A hook is called where the event happens, mostly on the event loop, sometimes on a thread (`LoopBlocked`): it must be
quick, and leave slow work to a thread of its own; one that is slow again and again is named. Whatever it raises is
logged once and goes no further, a ``CancelledError`` included; only ``KeyboardInterrupt`` and ``SystemExit``, with
which signals end a process, do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from flyte_batch.monitoring.events import Event

SLOW_S = 0.1
"""A hook that takes so long `SLOW_TIMES` times is named: a process that was stopped for a while is no hook's fault."""
SLOW_TIMES = 3

logger = logging.getLogger(__name__)


class Hook(Protocol):
    """Takes events."""

    def on_event(self, event: Event) -> None:
        """Something happened."""
        ...


class Stats(Protocol):
    """What hooks read of a `flyte_batch.BatchStats`; counts and seconds since the batcher's start."""

    @property
    def total_completed(self) -> int: ...
    @property
    def total_failed(self) -> int: ...
    @property
    def total_lost(self) -> int: ...
    @property
    def total_submitted(self) -> int: ...
    @property
    def total_abandoned(self) -> int: ...
    @property
    def total_expired(self) -> int: ...
    @property
    def total_batches(self) -> int: ...
    @property
    def total_fill(self) -> float: ...
    @property
    def out_of_memory(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def busy_time_s(self) -> float: ...
    @property
    def starved_time_s(self) -> float: ...
    @property
    def assembling_time_s(self) -> float: ...
    @property
    def late_time_s(self) -> float: ...


class Batcher(Protocol):
    """What a hook may ask of a live batcher.

    Attributes:
        id: as in its events.
        engine_name: class of the engine, of the batcher where it owns none.
        stats: of this moment.
        stats_source: gives `stats`, the queue left out, without keeping the batcher or its engine alive.
        is_running: whether it takes records.
    """

    @property
    def id(self) -> str: ...

    @property
    def engine_name(self) -> str: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def stats_source(self) -> Callable[[], Stats]: ...

    @property
    def is_running(self) -> bool: ...

    def tell(self) -> None:
        """Tell hooks now of all that came back; call it on the batcher's event loop."""
        ...


_hooks: tuple[Hook, ...] = ()
_lock = threading.Lock()
_failed: set[int] = set()
_slow: Counter[int] = Counter()
_batchers: WeakSet[Batcher] = WeakSet()


def subscribe(hook: Hook) -> Callable[[], None]:
    """Give every event from now on to ``hook``.

    Returns:
        Ends that; calling it twice is fine.
    """
    global _hooks
    with _lock:
        _hooks = (*_hooks, hook)

    def unsubscribe() -> None:
        global _hooks
        with _lock:
            _hooks = tuple(each for each in _hooks if each is not hook)
            _failed.discard(id(hook))
            del _slow[id(hook)]

    return unsubscribe


def is_anybody_listening() -> bool:
    """Whether an event is worth making."""
    return bool(_hooks)


def emit(event: Event) -> None:
    """Give an event to every hook."""
    for hook in _hooks:
        started = time.perf_counter()
        try:
            hook.on_event(event)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            if id(hook) not in _failed:
                _failed.add(id(hook))
                logger.warning(
                    "the monitoring hook %s failed on %s, and is asked again for the next event; further failures of "
                    "it are not logged",
                    type(hook).__qualname__,
                    type(event).__name__,
                    exc_info=True,
                )
        took = time.perf_counter() - started
        if took > SLOW_S:
            _slow[id(hook)] += 1
            if _slow[id(hook)] == SLOW_TIMES:
                logger.warning(
                    "the monitoring hook %s took %.2f s for %s, and what it was called from waited, not for the first "
                    "time: let a thread of its own do what takes long; it is named once",
                    type(hook).__qualname__,
                    took,
                    type(event).__name__,
                )


def register_batcher(batcher: Batcher) -> None:
    """Let hooks find a batcher for as long as it is alive."""
    with _lock:
        _batchers.add(batcher)


def live_batchers() -> list[Batcher]:
    """The batchers of this process that are alive: what a scrape asks for queues and utilisation."""
    with _lock:
        return list(_batchers)
