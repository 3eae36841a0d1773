"""One engine and batcher per process, whoever asks first: `singleton`, built on async-lru's ``alru_cache``.

A Flyte replica is one process with one event loop that runs many task calls at once. Decorated with
``alru_cache``, an async factory already is a lazy, process-wide singleton with one load for all callers. `singleton`
adds what a replica needs beyond that:

- the load runs in an empty context, so the value does not carry the first caller's `flyte.ctx()` for ever;
- a value that is an async context manager (every batcher is) is entered once loaded and exited when it is dropped;
- a value that died (``is_running`` turned false) is dropped and loaded anew by the next caller;
- when the event loop changes (a test, a second ``asyncio.run``), the old loop's values are closed, not orphaned.

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
from typing import Any, Generic, ParamSpec, TypeVar, cast

from async_lru import alru_cache

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_all: list[Singleton[..., Any]] = []


class Singleton(Generic[P, T]):
    """An async factory whose value lives once per process and distinct arguments. Made by `singleton`."""

    def __init__(self, load: Callable[P, Awaitable[T]]) -> None:
        functools.update_wrapper(self, load)
        self._load_value = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._values: dict[Hashable, T] = {}
        self._cached = alru_cache(maxsize=None)(self._load)
        _all.append(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value for these arguments, which must be hashable; the first caller's call loads it.

        Raises:
            TypeError: an argument is not hashable.
            Exception: whatever the factory raised; the next call tries again.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            stale, self._values = self._values, {}
            self._loop = loop
            # A fresh cache: alru_cache would notice the new loop too, but only to warn and forget the values.
            self._cached = alru_cache(maxsize=None)(self._load)
            for value in stale.values():
                await _close(value)
        value = await self._cached(*args, **kwargs)
        if getattr(value, "is_running", True):
            return value
        await self.discard(value)
        return await self._cached(*args, **kwargs)

    async def discard(self, value: T) -> None:
        """Drop a value, for one that does not work any more, and close it; does nothing if it was dropped already."""
        for key, known in list(self._values.items()):
            if known is value:
                del self._values[key]
                args, kwargs = cast("tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]", key)
                self._cached.cache_invalidate(*args, **dict(kwargs))
                await _close(value)

    async def aclose(self) -> None:
        """Close every value; the next call loads anew."""
        values, self._values = self._values, {}
        self._cached.cache_clear()
        for value in values.values():
            await _close(value)

    async def _load(self, *args: P.args, **kwargs: P.kwargs) -> T:
        async def load() -> T:
            value = await self._load_value(*args, **kwargs)
            return await value.__aenter__() if isinstance(value, AbstractAsyncContextManager) else value

        # Its own task, for its context: what the value starts must not inherit the first caller's.
        value = await asyncio.get_running_loop().create_task(load(), context=contextvars.Context())
        self._values[(args, tuple(kwargs.items()))] = value
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
    """Close the values of every singleton of this process: for the end of a program, and between tests."""
    for each in _all:
        await each.aclose()


async def _close(value: object) -> None:
    try:
        if isinstance(value, AbstractAsyncContextManager):
            await value.__aexit__(None, None, None)
    except Exception:
        logger.warning("closing %r failed; going on without it", value, exc_info=True)
