"""One engine and batcher per process, whoever asks first: `singleton`, built on async-lru's ``alru_cache``.

A Flyte replica is one process with one event loop that runs many task calls at once. Decorated with
``alru_cache``, an async factory already is a lazy, process-wide singleton with one load for all callers. `singleton`
adds what a replica needs beyond that:

- the load runs in an empty context, so the value does not carry the first caller's `flyte.ctx()` for ever;
- a value that is an async context manager (every batcher is) is entered once loaded and exited when it is dropped;
- a value that died (``is_running`` turned false) is dropped, closed, and only then loaded anew by the next caller: a
  device never holds two;
- with the first load begins the `guard` of the process;
- every event loop has its own values; those of a loop that was closed are closed by the next call, not orphaned;
- a singleton whose module is imported anew, or whose notebook cell is executed again, takes the place of the old one
  with its first call: the old one's values are closed before it loads.

A failed load is not kept: its callers get the error, the next caller tries again. Cancelling one caller leaves the
load to the others; it stops with the last of them, and what it had got by then is closed before the next one begins.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, ParamSpec, TypeVar

from async_lru import alru_cache

from flyte_batch.errors import FlyteBatchError
from flyte_batch.guard import watch
from flyte_batch.monitoring.backends import attach_backends
from flyte_batch.monitoring.events import EngineLoaded, EngineLoading
from flyte_batch.monitoring.hooks import emit
from flyte_batch.replica import this_replica

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_all: list[Singleton[..., Any]] = []
_defined: dict[str, Singleton[..., Any]] = {}
"""The last of each name; those made inside functions have no name of their own."""


class Singleton(Generic[P, T]):
    """An async factory whose value lives once per process, event loop and distinct arguments. Made by `singleton`."""

    def __init__(self, load: Callable[P, Awaitable[T]]) -> None:
        functools.update_wrapper(self, load)
        self._load = load
        self._loops: dict[asyncio.AbstractEventLoop, _Values[T]] = {}
        self._name = f"{load.__module__}.{getattr(load, '__qualname__', '<a callable object>')}"
        self._former: Singleton[..., Any] | None = None
        self._is_replaced = False
        if "<" not in self._name:
            former = _defined.get(self._name)
            # The same code again is no new definition: a loop may make several out of it.
            if former is not None and getattr(former._load, "__code__", None) is not getattr(load, "__code__", None):
                self._former = former
            _defined[self._name] = self
        _all.append(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value for these arguments, which must be hashable; the first caller's call loads it.

        Raises:
            TypeError: an argument is not hashable.
            FlyteBatchError: it was defined anew, and the new one is in use; or the factory raised a CancelledError,
                which is not its callers'.
            Exception: whatever the factory raised; the next call tries again.
        """
        self._require_current()
        values = self._here()
        while self._former is not None:
            former, self._former = self._former, self._former._former
            for theirs in former._give_up():
                values.end(theirs)
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            values.end(self._loops.pop(loop))
        value = await values.get(*args, **kwargs)
        if getattr(value, "is_running", True):
            return value
        await self.discard(value)
        return await values.get(*args, **kwargs)

    async def discard(self, value: T) -> None:
        """Drop a value, for one that does not work any more, and close it; does nothing if it was dropped already."""
        values = self._here()
        if values.drop(value):
            await asyncio.wait([values.close(value)])

    async def aclose(self) -> None:
        """Close every value of the running event loop, one that is being loaded too; the next call loads anew."""
        values = self._here()
        await asyncio.wait([values.end(values)])

    def _require_current(self) -> None:
        if self._is_replaced:
            raise FlyteBatchError(
                f"{self._name} was defined anew, and the new one is in use: a process has only one of them. "
                "Use the new one; a run that was under way with the old one is to be started again"
            )

    def _give_up(self) -> list[_Values[T]]:
        """Leave the place to a new definition; gives the values that this one has to close first.

        Those of a loop that runs on another thread stay there.
        """
        self._is_replaced = True
        _all.remove(self)
        here = asyncio.get_running_loop()
        return [self._loops.pop(loop) for loop in list(self._loops) if loop is here or loop.is_closed()]

    async def _load_current(self, *args: P.args, **kwargs: P.kwargs) -> T:
        self._require_current()  # it may have waited for its turn
        return await self._load(*args, **kwargs)

    def _here(self) -> _Values[T]:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _Values(self._load_current, self._name)
        return self._loops[loop]


class _Values(Generic[T]):
    """One event loop's values of a singleton."""

    def __init__(self, load: Callable[..., Awaitable[T]], name: str) -> None:
        self._load_value = load
        self._name = name
        self._values: dict[Hashable, tuple[T, tuple[Any, ...], dict[str, Any]]] = {}
        self._loading: set[asyncio.Task[T]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._ends = 0  # how often all were closed; part of the cache's keys, so that what is late meets no new entry
        self._cached = alru_cache(maxsize=None)(self._load)

    async def get(self, *args: Any, **kwargs: Any) -> T:
        value: T = await self._cached(self._ends, *args, **kwargs)
        return value

    def drop(self, value: T) -> bool:
        for key, (known, args, kwargs) in list(self._values.items()):
            if known is value:
                del self._values[key]
                self._cached.cache_invalidate(*args, **kwargs)
                return True
        return False

    def close(self, value: T) -> asyncio.Task[None]:
        """Begin to close a dropped value; nothing is loaded meanwhile.

        Its own task, to be waited for by `asyncio.wait`: a CancelledError that closing raises is not the waiter's.
        """
        return self._close_by(_close(value))

    def end(self, values: _Values[T]) -> asyncio.Task[None]:
        """Begin to close all of these values, its own or another's, and those that are being loaded."""
        known = [value for value, _, _ in values._values.values()]
        values._values.clear()
        values._cached.cache_clear()
        values._ends += 1
        here = asyncio.get_running_loop()
        return self._close_by(values._close_all(known, {load for load in values._loading if load.get_loop() is here}))

    async def _close_all(self, known: list[T], loading: set[asyncio.Task[T]]) -> None:
        for value in known:
            await asyncio.wait([self.close(value)])
        for load in loading:
            await asyncio.wait([load])
            await self._close_loaded(load)

    async def _close_loaded(self, load: asyncio.Task[T]) -> None:
        """Close what a load gave that nobody asks for any more; nothing if it failed."""
        if not load.cancelled() and load.exception() is None:
            self.drop(load.result())
            await asyncio.wait([self.close(load.result())])

    async def _abort(self, load: asyncio.Task[T]) -> None:
        load.cancel()
        await asyncio.wait([load])
        await self._close_loaded(load)  # it may have been ready in the same step

    def _close_by(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _load(self, ends: int, *args: Any, **kwargs: Any) -> T:
        if self._ends > ends:  # everything was closed before this began
            return await self.get(*args, **kwargs)
        # Its own task, for its context: what the value starts must not inherit the first caller's. It waits for what
        # is being closed now, not later, because that may wait for this very load.
        work = self._load_and_enter(tuple(self._closing), ends, args, kwargs)
        load = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._loading.add(load)
        load.add_done_callback(self._loading.discard)
        try:
            await asyncio.wait([load])  # not `await load`: a load cancelled from within is no cancellation of ours
        except asyncio.CancelledError:
            self._close_by(self._abort(load))
            raise
        if self._ends > ends:  # everything was closed meanwhile, and what this loaded is next
            return await self.get(*args, **kwargs)
        if load.cancelled():
            raise FlyteBatchError(f"{self._name} raised a CancelledError that was not its callers': see what it awaits")
        return load.result()

    async def _load_and_enter(
        self, closing: tuple[asyncio.Task[None], ...], ends: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> T:
        guard = watch()
        if closing:
            await asyncio.wait(closing)
        attach_backends()
        started = time.monotonic()
        emit(EngineLoading(time.time(), self._name))
        error = ""
        try:
            value = await self._load_value(*args, **kwargs)
            if isinstance(value, AbstractAsyncContextManager):
                try:
                    value = await value.__aenter__()
                except BaseException:
                    await asyncio.wait([self.close(value)])
                    raise
            guard.note_processes()
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            seconds = time.monotonic() - started
            emit(EngineLoaded(time.time(), self._name, seconds, error))
        self._values[(ends, args, tuple(kwargs.items()))] = value, (ends, *args), kwargs
        _warn_if_idle_replicas_end_sooner(self._name, seconds)
        return value


def singleton(load: Callable[P, Awaitable[T]]) -> Singleton[P, T]:
    """Make an async factory a process-wide singleton (see the module's text).

    Example::

        @singleton
        async def solver() -> EngineBatcher:
            return EngineBatcher(await CTranslate2Engine.start("demo"))
    """
    return Singleton(load)


async def close_all() -> None:
    """Close the running loop's values of every singleton: for the end of a program, and between tests."""
    for each in list(_all):
        await each.aclose()


async def _close(value: object) -> None:
    try:
        if isinstance(value, AbstractAsyncContextManager):
            await value.__aexit__(None, None, None)
    except Exception:
        logger.warning("closing %r failed; going on without it", value, exc_info=True)


def _warn_if_idle_replicas_end_sooner(name: str, seconds: float) -> None:
    replica = this_replica()
    if replica is not None and seconds > replica.idle_ttl_s:
        logger.warning(
            "%s took %.0f s to load, and idle replicas of the environment %r end after %.0f s: every run would start "
            "cold. Give replica_environment a longer idle_ttl",
            name,
            seconds,
            replica.environment,
            replica.idle_ttl_s,
        )
