"""A device that tests can step: what it was given, and when it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

NEVER_S = 3600.0
"""A batch_timeout_s that a test does not see the end of."""


async def soon(awaitable: Awaitable[T]) -> T:
    """The result, or a failed test instead of a hanging one."""
    return await asyncio.wait_for(awaitable, 20)


async def settle() -> None:
    """Let every task go on until it waits for something that only the test can bring about."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Go round the loop until the condition holds: for what a thread or the clock brings about."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Device:
    """A process_fn that answers ``("done", record)``, notes its batches, and can be held at work.

    Args:
        answer: what to do with a batch instead; it may raise.
    """

    def __init__(self, answer: Callable[[list[Any]], Any] | None = None) -> None:
        self.batches: list[list[Any]] = []
        self.answer = answer or (lambda records: [("done", record) for record in records])
        self.most_at_once = 0
        self._at_work = 0
        self._gate = asyncio.Event()
        self._gate.set()
        self._entered = asyncio.Event()

    @property
    def seen(self) -> list[Any]:
        """All records that reached it, in order."""
        return [record for batch in self.batches for record in batch]

    def hold(self) -> None:
        """Stay at work on the next batch until `release`."""
        self._gate.clear()
        self._entered.clear()

    def release(self) -> None:
        self._gate.set()

    async def at_work(self) -> None:
        """Wait until it is on a batch."""
        await soon(self._entered.wait())

    async def __call__(self, records: list[Any]) -> Any:
        self.batches.append(list(records))
        self._at_work += 1
        self.most_at_once = max(self.most_at_once, self._at_work)
        self._entered.set()
        try:
            # Bounded, so that a test that fails while it holds the device does not hang in stop().
            async with asyncio.timeout(10):
                await self._gate.wait()
            return self.answer(records)
        finally:
            self._at_work -= 1
