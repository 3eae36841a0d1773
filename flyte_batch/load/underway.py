"""What is known of a load while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SECONDS_BETWEEN_NEWS = 0.5


@dataclass(frozen=True, slots=True)
class Underway:
    """A load at one moment.

    Attributes:
        rate_per_s: requests a second that were asked for.
        warm_up_s: seconds at its start that are not measured.
        seconds: measured after them.
        elapsed_s: since its start.
        requests: due by now; after the warm-up, those since.
        in_flight: those that are not answered yet, of the warm-up or not.
        failed: those of ``requests`` that failed, for whatever reason.
        p50_ms: upper bound, 12% at most above it, of what half of the answers measured by now took no longer than;
            None without any.
        p99_ms: the same of 99% of them.
    """

    rate_per_s: float
    warm_up_s: float
    seconds: float
    elapsed_s: float
    requests: int
    in_flight: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None

    @property
    def is_warming_up(self) -> bool:
        """Whether nothing is measured yet."""
        return self.elapsed_s < self.warm_up_s

    @property
    def left_s(self) -> float:
        """Seconds until the last request is due; answers may take longer."""
        return max(0.0, self.warm_up_s + self.seconds - self.elapsed_s)


@contextlib.contextmanager
def telling(hear: Callable[[Underway], object] | None, look: Callable[[], Underway]) -> Iterator[None]:
    """Tell ``hear`` what ``look`` sees, now and every `SECONDS_BETWEEN_NEWS`; on the running event loop."""
    if hear is None:
        yield
        return

    async def tell() -> None:
        while True:
            hear(look())
            await asyncio.sleep(SECONDS_BETWEEN_NEWS)

    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()
