"""When a device was at work on what it was given: said where that is known, not where the event loop hears of it.

The end of an ``async`` call is heard of when the event loop has time for it. Code that holds the loop meanwhile makes
an idle device look busy, unless the call says itself when the device was done: by `device_at_work` around the
computation, on whatever thread, or by `device_worked` with times that another process told.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time


class DeviceCall:
    """One call of a ``process_fn``, or of an engine's ``generate``, that a batcher made.

    Args:
        made: when, on ``time.monotonic``'s clock.

    Attributes:
        made: when it was made.
        began: when the device began with it; None if nobody said.
        ended: when it was done; None if nobody said.
        spell: when the device began with it and was done, as far as is known once it is back; None until then.
    """

    __slots__ = ("began", "ended", "made", "spell")

    def __init__(self, made: float) -> None:
        self.made = made
        self.began: float | None = None
        self.ended: float | None = None
        self.spell: tuple[float, float] | None = None

    def worked(self, began: float, ended: float) -> None:
        """From the first beginning that was said to the last end."""
        self.began = began if self.began is None else min(began, self.began)
        self.ended = ended if self.ended is None else max(ended, self.ended)


current_call: contextvars.ContextVar[DeviceCall | None] = contextvars.ContextVar("current_call", default=None)
"""Inside a call that a batcher made: that call."""


def device_worked(began: float, ended: float) -> None:
    """Say from when to when the device was at work on the call that this is said in; outside of one nobody listens.

    For engines whose device is elsewhere and tells its times. Said several times, the call is taken to last from the
    first beginning to the last end.

    Args:
        began: seconds on ``time.monotonic``'s clock, which the processes of a machine share on Linux.
        ended: the same.
    """
    call = current_call.get()
    if call is not None:
        call.worked(began, ended)


class DeviceAtWork:
    """What `device_at_work` gives."""

    __slots__ = ("_began", "_turns")

    def __enter__(self) -> None:
        self._turns: list[None] = []
        with contextlib.suppress(RuntimeError):  # no event loop on this thread
            asyncio.get_running_loop().call_soon(self._turns.append, None)
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if not self._turns:
            device_worked(self._began, time.monotonic())


def device_at_work() -> DeviceAtWork:
    """The device is at work on the current call: for ``with``, around the computation, in the call's context.

    On any thread: ``asyncio.to_thread`` takes the context along, ``loop.run_in_executor`` does not. Around an ``await``
    it says nothing: that ends when the event loop has time for it, and when the device was done is the question.
    """
    return DeviceAtWork()
