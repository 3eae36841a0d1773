"""Open-loop load: requests arrive when they arrive, whether the service keeps up or not.

A closed loop, in which each of so many callers waits for an answer before it asks again, slows down with the service
and so hides its worst moments. Here arrivals are a Poisson process, which is how many independent callers come, and a
latency counts from the moment at which the request was *due*. A service that stands still for a second is met by all
requests of that second, and each says so: no coordinated omission (Gil Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flyte_batch import histograms
from flyte_batch.batching.checks import finite_number, whole_number
from flyte_batch.errors import BadInput, DeadlineExceeded, QueueFull
from flyte_batch.histograms import LATENCY_BOUNDS, bound
from flyte_batch.load.levels import Objective, ServiceLevel, latency_objective, percentile, share_objective
from flyte_batch.load.underway import Underway, telling
from flyte_batch.pipeline import GONE

UNAVAILABLE = (QueueFull, *GONE)
"""Errors that say that there was nobody to answer; all others are errors of the answer."""
TOO_MANY_IN_FLIGHT = "TooManyInFlight"
"""In `LoadResult.unavailable`: requests that were not made, because so many waited already."""


@runtime_checkable
class Submitter(Protocol):
    """A batcher: what takes a record and gives a future of its result."""

    async def submit(self, record: Any) -> asyncio.Future[Any]: ...


Ask = Callable[[Any], Awaitable[Any]]
"""Takes a record to its result, or raises."""


@dataclass(frozen=True)
class Latencies:
    """Milliseconds from when requests were due until they were answered or given up; None where there was none.

    Attributes:
        requests: those that were answered, and those that got no answer in time, which count with the time that they
            were waited for. What failed at once is not here: failing fast must not look like answering fast.
        p50_ms: half of them took no longer.
        p90_ms: 90% took no longer.
        p95_ms: 95% took no longer.
        p99_ms: 99% took no longer.
        max_ms: the longest.
    """

    requests: int
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None

    @classmethod
    def of(cls, ordered_ms: Sequence[float]) -> Latencies:
        """Args: ordered_ms: ascending."""
        if not ordered_ms:
            return cls(0)
        return cls(len(ordered_ms), *(percentile(ordered_ms, share) for share in (0.5, 0.9, 0.95, 0.99, 1)))


@dataclass(frozen=True)
class LoadResult:
    """What became of the requests of one load. ``requests == ok + sum(errors) + sum(unavailable)``.

    Attributes:
        rate_per_s: requests a second that were asked for.
        offered_per_s: requests a second that were due: ``rate_per_s``, as chance had it.
        seconds: in which requests were due.
        requests: due in that time.
        distinct_records: records among them.
        ok: answered, however late.
        errors: by class of the exception: the service took the request and failed it, did not answer within
            ``timeout_s`` (``TimeoutError``), gave it up itself (`DeadlineExceeded`), or could not use it
            (`BadRecord`; it takes no time of the device, so the load was lighter than it says).
        unavailable: by class: nobody was there to answer. The queue was full (`QueueFull`), the engine was dead, died
            on the request or was not running (`EngineDead`, `BatcherDied`, `BatcherNotRunning`), or so many were in
            flight that the request was not made (``TooManyInFlight``).
        latencies: from when requests were due.
        late_p99_ms: of when requests were made, after they were due: 99% were not later. The event loop, which a
            replica's batcher shares, had no time for them; it is part of their latency.
        late_max_ms: the latest.
        objectives: those of the `ServiceLevel`: p50, p99, errors, availability.
    """

    rate_per_s: float
    offered_per_s: float
    seconds: float
    requests: int
    distinct_records: int
    ok: int
    errors: dict[str, int]
    unavailable: dict[str, int]
    latencies: Latencies
    late_p99_ms: float
    late_max_ms: float
    objectives: tuple[Objective, ...]

    @property
    def is_kept(self) -> bool:
        """Whether every objective was kept."""
        return all(objective.is_kept for objective in self.objectives)

    @property
    def is_shown(self) -> bool:
        """Whether there were requests enough to say so."""
        return all(objective.is_shown for objective in self.objectives)

    @property
    def broken(self) -> tuple[Objective, ...]:
        """The objectives that were not kept."""
        return tuple(objective for objective in self.objectives if not objective.is_kept)

    @property
    def why(self) -> str:
        """Which objectives were broken, with figures; empty if all were kept."""
        if self.is_kept:
            return ""
        causes = [str(objective) for objective in self.broken]
        for kind, counted in (("errors", self.errors), ("unavailable", self.unavailable)):
            if counted:
                causes.append(f"{kind}: " + ", ".join(f"{count:,} {name}" for name, count in counted.items()))
        if self.is_generator_late:
            causes.append(
                f"arrivals ran late (p99 {self.late_p99_ms:,.0f} ms): the event loop that makes them was busy, so this "
                "may be its limit, not the engine's"
            )
        return "; ".join(causes)

    def __str__(self) -> str:
        measured = ", ".join(str(objective) for objective in self.objectives)
        return f"{self.rate_per_s:g} requests/s, {self.requests:,} requests: {measured if self.is_kept else self.why}"

    @property
    def is_generator_late(self) -> bool:
        """Whether arrivals ran so late, by a tenth of the median that is allowed, that it blurs what was measured."""
        return self.late_p99_ms > self.objectives[0].limit / 10

    @property
    def error_rate(self) -> float:
        """Share of the requests."""
        return sum(self.errors.values()) / self.requests if self.requests else 0.0

    @property
    def availability(self) -> float:
        """Share of the requests that found the service there."""
        return 1 - sum(self.unavailable.values()) / self.requests if self.requests else 0.0


def arrival_times(rate_per_s: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """When requests are due, in seconds from the start: a Poisson process."""
    at = rng.expovariate(rate_per_s)
    while at < seconds:
        yield at
        at += rng.expovariate(rate_per_s)


async def run_load(
    target: Submitter | Ask,
    records: Sequence[Any],
    rate_per_s: float,
    seconds: float,
    *,
    seed: int = 0,
    timeout_s: float = 10.0,
    warm_up_s: float = 0.0,
    max_in_flight: int = 10_000,
    level: ServiceLevel | None = None,
    on_progress: Callable[[Underway], object] | None = None,
) -> LoadResult:
    """Make requests for some time, wait for all of them, and say what became of them.

    Args:
        target: a started batcher, or an async function of a record.
        records: what to ask. They come in a shuffled order, and again from the beginning when all have had their turn.
            The more of them differ the better: an engine that caches prompts answers one that it knows faster.
        rate_per_s: mean requests a second.
        seconds: time to measure, after the warm-up.
        seed: the same seed gives the same arrivals and the same records.
        timeout_s: seconds after which a request is given up, counted from when it was due; above the objectives'.
        warm_up_s: seconds of the same load before, that are not counted.
        max_in_flight: of more requests at once none is made; each counts as unavailable.
        level: the objectives.
        on_progress: hears of the load when it begins and every half second, on the event loop: let it be quick.

    Cancelling it cancels the requests that are under way, and waits until they are gone.

    Raises:
        TypeError, BadInput: an option that cannot work; the message names it and the remedy.
    """
    level = level or ServiceLevel()
    if not records:
        raise BadInput("there are no records to ask: give at least one")
    check_rate("rate_per_s", rate_per_s)
    check_times(seconds, warm_up_s, timeout_s, level)
    whole_number("max_in_flight", max_in_flight, at_least=1, remedy="give the most requests at once")
    ask = asker(target)
    rng = random.Random(seed)  # noqa: S311
    order = rng.sample(range(len(records)), len(records))
    loop = asyncio.get_running_loop()
    warming, measured = _Tally(), _Tally()
    asked: set[int] = set()
    in_flight = 0

    def ended(_: object) -> None:
        nonlocal in_flight
        in_flight -= 1

    start = loop.time()

    def look() -> Underway:
        elapsed_s = loop.time() - start
        tally = warming if elapsed_s < warm_up_s else measured
        return Underway(
            rate_per_s, warm_up_s, seconds, elapsed_s, len(tally.late_s), in_flight, tally.failed,
            *(measured.upper_ms(share) for share in (0.5, 0.99)),
        )  # fmt: skip

    with telling(on_progress, look):
        async with asyncio.TaskGroup() as group:
            for number, at in enumerate(arrival_times(rate_per_s, warm_up_s + seconds, rng)):
                due = start + at
                await asyncio.sleep(max(0.0, due - loop.time()))
                place = order[number % len(order)]
                tally = warming if at < warm_up_s else measured
                tally.late_s.append(max(0.0, loop.time() - due))
                if tally is measured:
                    asked.add(place)
                if in_flight == max_in_flight:
                    tally.unavailable[TOO_MANY_IN_FLIGHT] += 1
                    continue
                in_flight += 1
                group.create_task(tally.observe(ask, records[place], due, timeout_s)).add_done_callback(ended)
    return measured.result(rate_per_s, seconds, len(asked), level)


def check_rate(name: str, rate_per_s: float) -> None:
    """
    Raises:
        TypeError, BadInput: it is no rate.
    """
    finite_number(name, rate_per_s, above=0, remedy="give requests a second")


def check_times(seconds: float, warm_up_s: float, timeout_s: float, level: ServiceLevel) -> None:
    """
    Raises:
        TypeError, BadInput: one cannot work for that service level.
    """
    finite_number("seconds", seconds, above=0, remedy="give the seconds to measure")
    finite_number("warm_up_s", warm_up_s, remedy="0 counts everything from the start")
    finite_number("timeout_s", timeout_s, above=0, remedy="give seconds, some times the p99 that is wanted")
    if timeout_s * 1000 <= level.p99_ms:
        raise BadInput(
            f"timeout_s ({timeout_s:g}) must be above the p99 that is wanted ({level.p99_ms:g} ms): what is given up "
            "sooner can't be told from what keeps it"
        )


def asker(target: Submitter | Ask) -> Ask:
    """The async function that asks ``target``: itself, or a batcher's submit and its future."""
    if not isinstance(target, Submitter):
        return target

    async def ask(record: Any) -> Any:
        return await (await target.submit(record))

    return ask


async def ask_alone(ask: Ask, record: Any, timeout_s: float) -> None:
    """Make one request, to know that there is somebody, and that nothing is left to do before it.

    Raises:
        DeadlineExceeded: it was not answered in time.
        Exception: what it raised.
    """
    try:
        async with asyncio.timeout(timeout_s) as patience:
            await ask(record)
    except TimeoutError as error:
        if not patience.expired():
            raise
        raise DeadlineExceeded(
            f"a request alone was not answered in {timeout_s:g} s: give more (timeout_s), or see what holds the engine"
        ) from error


class _Tally:
    """Requests as they end."""

    def __init__(self) -> None:
        self.late_s: list[float] = []
        self.latencies_s: list[float] = []
        self.ok = 0
        self.errors: Counter[str] = Counter()
        self.unavailable: Counter[str] = Counter()
        self._buckets: Counter[float] = Counter()

    @property
    def failed(self) -> int:
        """Requests that were not answered, for whatever reason."""
        return self.errors.total() + self.unavailable.total()

    def upper_ms(self, share: float) -> float | None:
        """What so many took at most, by buckets: milliseconds. Costs what came since it was last asked for."""
        for latency_s in self.latencies_s[self._buckets.total() :]:
            self._buckets[bound(latency_s, LATENCY_BOUNDS)] += 1
        upper_s = histograms.percentile(self._buckets, share)
        return None if upper_s is None else 1000 * upper_s

    async def observe(self, ask: Ask, record: Any, due: float, timeout_s: float) -> None:
        """Make a request and see what becomes of it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(due + timeout_s) as patience:
                await ask(record)
        except UNAVAILABLE as error:
            self.unavailable[type(error).__name__] += 1
        except Exception as error:
            self.errors[type(error).__name__] += 1
            if patience.expired():
                self.latencies_s.append(loop.time() - due)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self.errors[type(error).__name__] += 1  # the service cancelled its own answer
        else:
            self.ok += 1
            self.latencies_s.append(loop.time() - due)

    def result(self, rate_per_s: float, seconds: float, distinct_records: int, level: ServiceLevel) -> LoadResult:
        requests = len(self.late_s)
        ordered_ms = [1000 * each for each in sorted(self.latencies_s)]
        late_ms = [1000 * each for each in sorted(self.late_s)]
        return LoadResult(
            rate_per_s=rate_per_s,
            offered_per_s=requests / seconds,
            seconds=seconds,
            requests=requests,
            distinct_records=distinct_records,
            ok=self.ok,
            errors=dict(sorted(self.errors.items())),
            unavailable=dict(sorted(self.unavailable.items())),
            latencies=Latencies.of(ordered_ms),
            late_p99_ms=percentile(late_ms, 0.99) if late_ms else 0.0,
            late_max_ms=late_ms[-1] if late_ms else 0.0,
            objectives=(
                latency_objective("p50", 0.5, level.p50_ms, ordered_ms),
                latency_objective("p99", 0.99, level.p99_ms, ordered_ms),
                share_objective("errors", level.max_error_rate, self.errors.total(), requests),
                share_objective("availability", level.min_availability, self.unavailable.total(), requests),
            ),
        )
