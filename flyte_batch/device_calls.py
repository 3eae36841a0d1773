"""When a device was at work on what it was given: said where that is known, not where the event loop hears of it.

The end of an ``async`` call is heard of when the event loop has time for it. Code that holds the loop meanwhile makes
an idle device look busy, unless the call says itself when the device was done: by `device_at_work` around the
computation, on whatever thread, or by `device_worked` with times that another process told.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator


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


@contextlib.contextmanager
def device_at_work() -> Iterator[None]:
    """The device is at work on the current call: around the computation, in its context, on any thread.

    ``asyncio.to_thread`` takes the context along, ``loop.run_in_executor`` does not.
    """
    began = time.monotonic()
    try:
        yield
    finally:
        device_worked(began, time.monotonic())
