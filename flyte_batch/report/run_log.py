"""What a driver knows of its run: what was planned, what the replicas told, and where their time went.

The log is made of counts and times, bounded whatever the number of rows, and lies as ``_report.json`` beside the parts:
a report can be made again from it. Its sums are those of the parts' footers, so chunks that an earlier run committed
count in them; times are of this run only.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from flyte_batch.errors import counted_as
from flyte_batch.histograms import added
from flyte_batch.monitoring.details import ChunkDetails, EngineLife, Example, Sample, Stall
from flyte_batch.monitoring.gpu import GpuUse, merged

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from flyte_batch.data.parts import PartInfo

MOST_SAMPLES = 600
"""Of one engine; beyond twice that every second one goes."""
MOST_SAMPLES_OF_ALL = 20_000
"""Shared by the engines, so that the log of hundreds of replicas is a file of a few MB."""
FEWEST_SAMPLES = 20
"""Of one engine, however many there are."""
MOST_EXAMPLES = 5
"""Failed rows of each cause in the log's ``causes``, whose messages say different things."""
MOST_STALLS = 200
DOUBTFUL = 0.02
"""Share of the engines' time; with more in doubt a utilisation is one at most."""
MOST_OF_ANYTHING = 1e15
"""A number in a file that is larger is none of ours: no run has so many tokens, joules, bytes or seconds."""


Outcome = Literal["running", "done", "failed", "cancelled", "unfinished"]


@dataclass(frozen=True)
class Plan:
    """What a run was to be.

    Attributes:
        rows: of the whole output.
        chunks: of the whole output.
        chunk_rows: rows per chunk.
        rows_reused: those of ``rows`` that an earlier run committed.
        chunks_reused: those of ``chunks`` that an earlier run committed.
        replicas: most at once.
        concurrency: chunks that one takes at once.
        batch_rows: records in a full batch.
        rows_per_s: what one replica was told or assumed to answer a second.
        price_per_hour: of one replica, in any currency; None where it was not given.
    """

    rows: int
    chunks: int
    chunk_rows: int
    rows_reused: int
    chunks_reused: int
    replicas: int
    concurrency: int
    batch_rows: int
    rows_per_s: float
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A chunk that this run did, or that failed in it; times are Unix times, None for failed ones."""

    index: int
    rows: int
    failures: int
    prompt_tokens: int
    response_tokens: int
    batcher: str = ""
    started: float | None = None
    ended: float | None = None
    error: str = ""

    def to_list(self) -> list[object]:
        """The fields in their order, as JSON holds them."""
        counts = [self.index, self.rows, self.failures, self.prompt_tokens, self.response_tokens]
        return [*counts, self.batcher, self.started, self.ended, self.error]


@dataclass
class EngineLog:
    """One life of one engine on one replica, as the chunks that it answered tell it.

    Attributes:
        batcher: names that life.
        process: the replica's process: a host and a process id.
        engine: its class.
        started: Unix time when the first of its chunks began.
        loaded: Unix time when the first of its chunks had an engine.
        ended: Unix time when the last of its chunks was committed, or had lost it.
        samples: in the order of time.
        rows: answered.
        tokens: of prompts and responses.
        is_told: whether its calls say when their device was at work: see `EngineLife`.
    """

    batcher: str
    process: str
    engine: str
    started: float
    loaded: float
    ended: float
    samples: list[Sample] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    is_told: bool = False

    def add(self, life: EngineLife, most_samples: int = MOST_SAMPLES) -> None:
        """Take in what it did for a chunk."""
        self.started = min(self.started, life.started)
        self.loaded = min(self.loaded, life.loaded)
        if life.ended >= self.ended:
            self.ended, self.is_told = life.ended, life.is_told
        self.rows += life.rows
        self.tokens += life.tokens
        for sample in life.samples:
            at = bisect.bisect_left(self.samples, sample.at, key=lambda known: known.at)
            if at == len(self.samples) or self.samples[at].at != sample.at:
                self.samples.insert(at, sample)
        while len(self.samples) > 2 * most_samples:
            del self.samples[1:-1:2]


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Where the seconds of engines went; together they are all of them.

    Attributes:
        busy: the device was at work.
        loading: from the start of the first chunk until it had an engine: reading rows and the model's load.
        starved: the device was free, and no records waited.
        assembling: the device was free, and records waited for more to fill a batch.
        blocked: the device was free, and the event loop was held up: it had not heard yet that a batch was done, or
            stood still.
        tail: the engine's last chunk was done, and the run went on elsewhere, or was being committed.
        stood: those of ``busy`` in which the event loop stood still, of engines that do not say when they were at work.
        doubtful: those of ``stood`` in which other code than the engine's held the loop: the engine, of whose end
            nobody heard, and which got nothing new, may have stood still, too.
    """

    busy: float = 0.0
    loading: float = 0.0
    starved: float = 0.0
    assembling: float = 0.0
    blocked: float = 0.0
    tail: float = 0.0
    stood: float = 0.0
    doubtful: float = 0.0

    def __add__(self, other: TimeShares) -> TimeShares:
        return TimeShares(
            self.busy + other.busy,
            self.loading + other.loading,
            self.starved + other.starved,
            self.assembling + other.assembling,
            self.blocked + other.blocked,
            self.tail + other.tail,
            self.stood + other.stood,
            self.doubtful + other.doubtful,
        )

    @property
    def total(self) -> float:
        return self.busy + self.loading + self.starved + self.assembling + self.blocked + self.tail

    @property
    def utilization(self) -> float:
        """Share (0-1) of the seconds in which devices were at work; 0 without any."""
        return min(1.0, max(0.0, self.busy / self.total)) if self.total > 0 else 0.0

    @property
    def is_upper_bound(self) -> bool:
        """Whether so much of ``busy`` is in doubt that `utilization` is one at most."""
        return self.doubtful > DOUBTFUL * self.total


@dataclass
class RunLog:
    """One run.

    Attributes:
        output: the folder of the parts.
        source: the source's path.
        settings: what determines the answers: model, prompt, parameters, code version.
        plan: what it was to be.
        run: name of the Flyte run, "" outside of one.
        action: name of the Flyte action, "" outside of one.
        started: Unix time.
        ended: Unix time of the last change, or of the end.
        outcome: ``running``, ``done``, ``failed`` or ``cancelled``; ``unfinished`` for a log that was made from
            parts alone, without a manifest: its times are 0.
        error: what ended it, "" if nothing did.
        versions: package -> version, in the driver.
        rows: in committed parts, those of earlier runs included.
        failures: those of ``rows`` without a response.
        prompt_tokens: of ``rows``.
        response_tokens: of ``rows``.
        causes: class of the error -> rows of ``failures``, the most frequent first; beyond
            `flyte_batch.errors.MOST_CAUSES` of them `flyte_batch.errors.OTHER_CAUSES`.
        prompt_lengths: histogram of ``rows`` by tokens, failed ones left out.
        response_lengths: the same of responses.
        latencies: histogram of this run's records: seconds from a batcher's queue to the result.
        examples: failed rows of this run.
        chunks: that this run did, in the order of their ends, and those that failed.
        engines: by batcher.
        stalls: of event loops: (process, stall).
        gpus: what those of the replicas did, one entry a device and replica.
        died: ids of batchers whose death replicas told of, each once.
    """

    output: str
    source: str
    settings: Mapping[str, object]
    plan: Plan
    run: str = ""
    action: str = ""
    started: float = 0.0
    ended: float = 0.0
    outcome: Outcome = "running"
    error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    prompt_lengths: Mapping[float, int] = field(default_factory=dict)
    response_lengths: Mapping[float, int] = field(default_factory=dict)
    latencies: Mapping[float, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    chunks: list[ChunkEntry] = field(default_factory=list)
    engines: dict[str, EngineLog] = field(default_factory=dict)
    stalls: list[tuple[str, Stall]] = field(default_factory=list)
    gpus: tuple[GpuUse, ...] = ()
    died: list[str] = field(default_factory=list)

    # -- Filling it --------------------------------------------------------

    def count(
        self,
        rows: int,
        failures: int,
        prompt_tokens: int,
        response_tokens: int,
        causes: Mapping[str, int],
        prompt_lengths: Mapping[float, int],
        response_lengths: Mapping[float, int],
    ) -> None:
        """Take in a committed part, of this run or an earlier one."""
        self.rows += rows
        self.failures += failures
        self.prompt_tokens += prompt_tokens
        self.response_tokens += response_tokens
        sums, known = Counter(self.causes), set(self.causes)
        for cause, failed in causes.items():
            sums[counted_as(cause, known)] += failed
        self.causes = dict(sums.most_common())
        self.prompt_lengths = added((self.prompt_lengths, prompt_lengths))
        self.response_lengths = added((self.response_lengths, response_lengths))

    def count_part(self, part: PartInfo) -> None:
        """Take in a part that an earlier run committed."""
        lengths = [_with_numbers(each) for each in (part.prompt_lengths, part.response_lengths)]
        self.count(part.rows, part.failures, part.prompt_tokens, part.response_tokens, part.causes, *lengths)

    def add_chunk(self, entry: ChunkEntry, details: ChunkDetails) -> None:
        """Take in a chunk that this run did."""
        self.chunks.append(entry)
        self.count(
            entry.rows,
            entry.failures,
            entry.prompt_tokens,
            entry.response_tokens,
            details.causes,
            details.prompt_lengths,
            details.response_lengths,
        )
        self.latencies = added((self.latencies, details.latencies))
        for example in details.examples:
            alike = [known.gist for known in self.examples if known.cause == example.cause]
            if example.cause in self.causes and len(alike) < MOST_EXAMPLES and example.gist not in alike:
                self.examples.append(example)
        for life in details.lives:
            engine = self.engines.setdefault(
                life.batcher,
                EngineLog(
                    life.batcher,
                    details.process,
                    life.engine,
                    life.started,
                    life.loaded,
                    life.ended,
                ),
            )
            engine.add(life, max(FEWEST_SAMPLES, min(MOST_SAMPLES, MOST_SAMPLES_OF_ALL // len(self.engines))))
        for stall in details.stalls:
            if (details.process, stall) not in self.stalls and len(self.stalls) < MOST_STALLS:
                self.stalls.append((details.process, stall))
        if details.gpus:
            samplers = {use.sampler for use in details.gpus}
            others = tuple(use for use in self.gpus if use.sampler not in samplers)
            own = (use for use in self.gpus if use.sampler in samplers)
            self.gpus = (*others, *merged((*own, *details.gpus)))
        self.died += [batcher for batcher in details.died if batcher not in self.died]

    # -- What follows from it ----------------------------------------------

    @property
    def engine_deaths(self) -> int:
        """Engines that died, as far as it was told."""
        return len(self.died)

    @property
    def seconds(self) -> float:
        """Of this run."""
        return self.ended - self.started

    @property
    def rows_done(self) -> int:
        """In parts that this run committed."""
        return sum(chunk.rows for chunk in self.chunks if not chunk.error)

    @property
    def rows_untold(self) -> int:
        """In parts of this run that came after its log was written last: no times are known of them."""
        return max(0, self.rows - self.plan.rows_reused - self.rows_done)

    @property
    def utilization(self) -> float:
        """Share (0-1) of the time of all engines in which their devices were at work; see `TimeShares`."""
        return self.time_shares().utilization

    def time_shares(self) -> TimeShares:
        """Where the seconds of all engines went."""
        return sum((self.engine_time(each) for each in self.engines.values()), TimeShares())

    def engine_time(self, engine: EngineLog) -> TimeShares:
        """Where an engine's seconds went, from its first chunk to the run's end, or to its successor's first chunk.

        Of a run that is not done nobody knows what the engine did since its last chunk.
        """
        later = [
            each.started
            for each in self.engines.values()
            if each.process == engine.process and each.started > engine.started
        ]
        ends = [*later, self.ended] if self.outcome == "done" else later
        end = max(engine.ended, min(ends, default=engine.ended))
        first = engine.samples[0].at if engine.samples else engine.loaded
        last = engine.samples[-1].at if engine.samples else engine.loaded
        total = TimeShares(loading=max(0.0, first - engine.started), tail=max(0.0, end - last))
        stalls = [stall for process, stall in self.stalls if process == engine.process]
        if not engine.samples:
            return total
        if not stalls:
            return total + _between(engine, engine.samples[0], engine.samples[-1], [])
        found = (_between(engine, *pair, stalls) for pair in itertools.pairwise(engine.samples))
        return total + sum(found, TimeShares())

    @property
    def replica_seconds(self) -> float:
        """Seconds of all replicas, each from its first chunk to the end of the run."""
        first: dict[str, float] = {}
        for engine in self.engines.values():
            first[engine.process] = min(engine.started, first.get(engine.process, engine.started))
        return sum(max(0.0, self.ended - start) for start in first.values())

    @property
    def cost(self) -> float | None:
        """Of `replica_seconds`, in the currency of the price; None where that was not given.

        Containers that start, or stand idle before and after the run, are not in it, nor is the driver.
        """
        price = self.plan.price_per_hour
        return None if price is None else price * self.replica_seconds / 3600

    # -- As a file ---------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        return content | {
            "plan": asdict(self.plan),
            "examples": [asdict(example) for example in self.examples],
            "chunks": [chunk.to_list() for chunk in self.chunks],
            "engines": [
                asdict(replace(engine, samples=[])) | {"samples": [sample.to_list() for sample in engine.samples]}
                for engine in self.engines.values()
            ],
            "stalls": [[process, asdict(stall)] for process, stall in self.stalls],
            "gpus": [asdict(gpu) for gpu in self.gpus],
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> RunLog:
        """What `to_plain` gave; whatever it is, the log's values are of the types that it says they are.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        engines = [
            each | {"samples": [_named(Sample, sample) for sample in each["samples"]]} for each in content["engines"]
        ]
        made = {
            "chunks": [_named(ChunkEntry, each) for each in content["chunks"]],
            "engines": {engine["batcher"]: engine for engine in engines},
        }
        return _checked_log({**content, **made})


def _named(kind: type[Any], values: Iterable[object]) -> dict[str, object]:
    """The values of a dataclass' fields by their names."""
    return dict(zip((each.name for each in fields(kind)), values, strict=False))


def _checked_log(content: Mapping[str, Any]) -> RunLog:
    from pydantic import ValidationError

    try:
        log = _log_type().validate_python(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    plan = log.plan
    if plan.rows < 0 or min(plan.replicas, plan.concurrency, plan.batch_rows) < 1 or plan.rows_per_s <= 0:
        raise ValueError(f"nobody plans that: {plan}")
    if not 0 <= log.failures <= log.rows:
        raise ValueError(f"{log.failures} of {log.rows} rows failed")
    return log


@functools.cache
def _log_type() -> TypeAdapter[RunLog]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunLog)


def _with_numbers(histogram: Mapping[str, int]) -> dict[float, int]:
    return {float(bound): int(number) for bound, number in histogram.items()}


def _between(engine: EngineLog, before: Sample, after: Sample, stalls: list[Stall]) -> TimeShares:
    """Where an engine's seconds between two of its samples went."""
    starved, assembling = after.starved_s - before.starved_s, after.assembling_s - before.assembling_s
    busy, late, idle = after.busy_s - before.busy_s, after.late_s - before.late_s, starved + assembling
    own = _stood(before, after, (each for each in stalls if _is_own(engine, each)))
    stood = _stood(before, after, stalls)
    held = min(max(0.0, stood - late), idle)
    left = 1 - held / idle if idle > 0 else 0.0
    at_work = 0.0 if engine.is_told else max(0.0, min(stood - held, busy))
    return TimeShares(
        busy=busy,
        starved=starved * left,
        assembling=assembling * left,
        blocked=late + held,
        stood=at_work,
        doubtful=max(0.0, at_work - own),
    )


def _stood(before: Sample, after: Sample, stalls: Iterable[Stall]) -> float:
    """Seconds between two samples in which the event loop stood still."""
    return sum(max(0.0, min(after.at, each.at) - max(before.at, each.at - each.seconds)) for each in stalls)


def _is_own(engine: EngineLog, stall: Stall) -> bool:
    """Whether a method of the engine's class held the loop: it computes there, and was at work."""
    return f".{engine.engine}." in f".{stall.code.partition(' ')[0]}"


FORMAT_VERSION = 1


def logs_to_json(logs: Iterable[RunLog]) -> bytes:
    """``_report.json``: the runs over one output, the last one last."""
    content = {"format_version": FORMAT_VERSION, "runs": [log.to_plain() for log in logs]}
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def _sane(number: Callable[[str], float]) -> Callable[[str], float]:
    """Reads numbers, but none with which nobody can reckon."""

    def read(text: str) -> float:
        value = number(text)
        if not abs(value) <= MOST_OF_ANYTHING:
            raise ValueError(f"the number {text[:40]}")
        return value

    return read


def logs_from_json(data: bytes) -> list[RunLog]:
    """What `logs_to_json` gave.

    Raises:
        ValueError: it is something else, or of another format version.
    """
    try:
        content = json.loads(data, parse_int=_sane(int), parse_float=_sane(float), parse_constant=_sane(float))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, this flyte_batch knows {FORMAT_VERSION}")
        return [RunLog.from_plain(each) for each in content["runs"]]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = ascii(str(error))[1:-1]  # may quote the file, and is to be printed on a terminal
        raise ValueError(f"not a log of runs: {type(error).__name__}: {why[:300]}") from error
