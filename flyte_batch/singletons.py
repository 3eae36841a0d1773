"""One engine and batcher per process, whoever asks first: `singleton`, built on async-lru's ``alru_cache``.

A Flyte replica is one process with one event loop that runs many task calls at once. Decorated with
``alru_cache``, an async factory already is a lazy, process-wide singleton with one load for all callers. `singleton`
adds what a replica needs beyond that:

- the load runs in an empty context, so the value does not carry the first caller's `flyte.ctx()` for ever;
- a value that is an async context manager (every batcher is) is entered once loaded and exited when it is dropped;
- a value that died (``is_running`` turned false) is dropped, closed, and only then loaded anew by the next caller: a
  device never holds two;
- every event loop has its own values; those of a loop that was closed are closed by the next call, not orphaned.

A failed load is not kept: its callers get the error, the next caller tries again. Cancelling one caller leaves the
load to the others; it stops with the last of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, ParamSpec, TypeVar

from async_lru import alru_cache

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_all: list[Singleton[..., Any]] = []


class Singleton(Generic[P, T]):
    """An async factory whose value lives once per process, event loop and distinct arguments. Made by `singleton`."""

    def __init__(self, load: Callable[P, Awaitable[T]]) -> None:
        functools.update_wrapper(self, load)
        self._load = load
        self._loops: dict[asyncio.AbstractEventLoop, _Values[T]] = {}
        _all.append(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value for these arguments, which must be hashable; the first caller's call loads it.

        Raises:
            TypeError: an argument is not hashable.
            Exception: whatever the factory raised; the next call tries again.
        """
        values = self._here()
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            for orphan in self._loops.pop(loop).drop_all():
                await values.close(orphan)
        value: T = await values.cached(*args, **kwargs)
        if getattr(value, "is_running", True):
            return value
        await self.discard(value)
        renewed: T = await values.cached(*args, **kwargs)
        return renewed

    async def discard(self, value: T) -> None:
        """Drop a value, for one that does not work any more, and close it; does nothing if it was dropped already."""
        values = self._here()
        if values.drop(value):
            await values.close(value)

    async def aclose(self) -> None:
        """Close every value of the running event loop; the next call loads anew."""
        values = self._here()
        for value in values.drop_all():
            await values.close(value)

    def _here(self) -> _Values[T]:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _Values(self._load)
        return self._loops[loop]


class _Values(Generic[T]):
    """One event loop's values of a singleton."""

    def __init__(self, load: Callable[..., Awaitable[T]]) -> None:
        self._load_value = load
        self._values: dict[Hashable, tuple[T, tuple[Any, ...], dict[str, Any]]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.cached = alru_cache(maxsize=None)(self._load)

    def drop(self, value: T) -> bool:
        for key, (known, args, kwargs) in list(self._values.items()):
            if known is value:
                del self._values[key]
                self.cached.cache_invalidate(*args, **kwargs)
                return True
        return False

    def drop_all(self) -> list[T]:
        values = [value for value, _, _ in self._values.values()]
        self._values.clear()
        self.cached.cache_clear()
        return values

    async def close(self, value: T) -> None:
        """Close a dropped value; nothing is loaded meanwhile. A caller that is cancelled stops only its waiting."""
        task = asyncio.get_running_loop().create_task(_close(value), context=contextvars.Context())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    async def _load(self, *args: Any, **kwargs: Any) -> T:
        # Its own task, for its context: what the value starts must not inherit the first caller's.
        load = self._load_and_enter(*args, **kwargs)
        value = await asyncio.get_running_loop().create_task(load, context=contextvars.Context())
        self._values[(args, tuple(kwargs.items()))] = value, args, kwargs
        return value

    async def _load_and_enter(self, *args: Any, **kwargs: Any) -> T:
        while self._closing:
            await asyncio.wait(self._closing)
        value = await self._load_value(*args, **kwargs)
        if not isinstance(value, AbstractAsyncContextManager):
            return value
        try:
            entered: T = await value.__aenter__()
        except BaseException:
            await _close(value)
            raise
        return entered


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
    for each in _all:
        await each.aclose()


async def _close(value: object) -> None:
    try:
        if isinstance(value, AbstractAsyncContextManager):
            await value.__aexit__(None, None, None)
    except Exception:
        logger.warning("closing %r failed; going on without it", value, exc_info=True)
