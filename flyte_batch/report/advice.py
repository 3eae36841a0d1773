"""What to change, and the numbers that say so. Pure: from a run's log to sentences.

A rule speaks only where its share of the engines' time is worth a line, and only of values that differ from those the
run had. Savings are seconds of engines, at best.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flyte_batch.histograms import percentile
from flyte_batch.planning.chunks import BATCHES_IN_FLIGHT, MAX_CHUNKS, few_at_once, plan_chunk_rows
from flyte_batch.report.formats import count, number, percent, plural, seconds
from flyte_batch.report.run_log import EngineLog, RunLog, TimeShares

SHORTEST_S = 5.0
"""Seconds of engines below which nothing is said of their time."""

STARVED = 0.10
ASSEMBLING = 0.10
BLOCKED = 0.05
LOADING = 0.25
TAIL = 0.15
GOOD_TAIL = 0.05
LOW_FILL = 0.5
BUSY = 0.8
FAILED = 0.01
RATE_OFF = 2.0
SLOW_S = 10.0
SLOW_TIMES = 10.0
LONG_TIMES = 4.0

SLACK = 1.5
"""Times the slots that would just keep a device busy: chunks do not end evenly."""
MOST_CONCURRENCY = 64
RUNS_PER_LOAD = 3
"""A replica should work at least so many times as long as it loads."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to change.

    Attributes:
        title: what was wrong, with its share.
        evidence: the numbers.
        action: what to do.
        saves: seconds of engines that it saves at best; None where it is not about time.
    """

    title: str
    evidence: str
    action: str
    saves: float | None = None


def advise(log: RunLog) -> list[Advice]:
    """What would make the next run better; errors first, then the largest saving. Empty where all is well."""
    found = [advice for rule in _RULES if (advice := rule(log)) is not None]
    shares = log.time_shares()
    if shares.total >= SHORTEST_S and (log.outcome != "running" or log.rows_done >= log.plan.rows / 4):
        few = _few_at_once(log, shares)
        rules = [rule for rule in _TIME_RULES if few is None or rule not in _CURED_BY_MORE_AT_ONCE]
        timed = [advice for time_rule in rules if (advice := time_rule(log, shares)) is not None]
        found += [few] if few is not None else []
        found += sorted(timed, key=lambda advice: -(advice.saves or 0.0))
    return found


def too_short(log: RunLog) -> bool:
    """Whether the engines worked for too short a time to say what to do about it."""
    return log.time_shares().total < SHORTEST_S


def replicas_seen(log: RunLog) -> int:
    """Processes that answered a chunk."""
    return len({engine.process for engine in log.engines.values()})


def measured_rows_per_s(log: RunLog) -> float | None:
    """Rows that one replica answered a second while it had an engine and chunks; None where nothing was answered."""
    working = sum(max(0.0, engine.ended - engine.loaded) for engine in log.engines.values())
    rows = sum(engine.rows for engine in log.engines.values())
    return rows / working if working > 0 and rows else None


# -- Errors -------------------------------------------------------------------


def _engine_deaths(log: RunLog) -> Advice | None:
    if not log.engine_deaths:
        return None
    return Advice(
        f"Engines died {plural(log.engine_deaths, 'time')}",
        "Each death costs a load, and the answers that were under way are made again.",
        "Look for the cause in the replicas' logs. If it is memory: give the engine less of it (vLLM: lower "
        "gpu_memory_utilization or max_model_len), lower the batcher's budget, or give the container more.",
    )


_REMEDIES = {
    "BadRecord": "Mend these rows, or leave them out of the source",
    "MissingValue": "Fill in what these rows lack, or leave them out of the source",
    "PromptTooLong": "Shorten these rows, or leave them out of the source",
    "BadImage": "Mend the images of these rows, or leave them out of the source",
    "BadResponse": "Raise max_tokens, or make the schema easier to fulfil",
    "EngineOutOfMemory": "Lower max_batch_size or target_batch_tokens",
    "DeadlineExceeded": "Raise the records' timeout_s",
}
_SAME = "run the same command again with --retry_failures (in Python: retry_failures=True)"
_ANEW = "run into another output, or with --overwrite (in Python: overwrite=True)"
"""Where parameters or code change: a run refuses to mix their answers with those that are there."""
_OF_CODE = {"BadResponse", "EngineOutOfMemory", "DeadlineExceeded"}
"""Causes whose remedy is a number in the code or a parameter."""


def _failures(log: RunLog) -> Advice | None:
    if not log.causes or log.failures <= FAILED * log.rows:
        return None
    cause, rows = max(log.causes.items(), key=lambda pair: pair[1])
    if cause not in _REMEDIES:
        where = "the example rows below" if log.examples else "the column 'error' of these rows"
        action = f"Look at {where}. If you mend rows, {_SAME}; if you mend the code that they fail in, {_ANEW}."
    else:
        action = f"{_REMEDIES[cause]}; then {_ANEW if cause in _OF_CODE else _SAME}."
    return Advice(
        f"{percent(log.failures / log.rows)} of the rows failed",
        f"{count(rows)} of {plural(log.failures, 'failure')} are of the class {cause}.",
        action,
    )


# -- Time -----------------------------------------------------------------------


def _few_at_once(log: RunLog, shares: TimeShares) -> Advice | None:
    """Whether a replica had fewer rows at once than one batch takes; the driver warned of it."""
    plan = log.plan
    idle = shares.starved + shares.assembling
    few = few_at_once(
        plan.chunk_rows,
        plan.rows - plan.rows_reused,
        replicas=plan.replicas,
        concurrency=plan.concurrency,
        batch_rows=plan.batch_rows,
    )
    if few is None or idle <= STARVED * shares.total:
        return None
    fill = mean_fill(log.engines.values())
    filled = f"; batches left {percent(fill)} full on average" if fill is not None else ""
    return Advice(
        f"Too few rows at once: devices waited {percent(idle / shares.total)} of the time",
        f"{plural(plan.concurrency, 'chunk')} of {plural(plan.chunk_rows, 'row')} give a replica "
        f"{plural(few.rows, 'row')} at once, fewer than the {count(plan.batch_rows)} of a full batch{filled}. Devices "
        f"were free for {seconds(shares.starved)} with no record waiting, for {seconds(shares.assembling)} while "
        "records waited for more.",
        f"Raise chunk_size from {count(plan.chunk_rows)} to {count(few.chunk_rows)}, or the replicas' concurrency from "
        f"{count(plan.concurrency)} to {count(few.concurrency)}.",
        idle,
    )


def _starved(log: RunLog, shares: TimeShares) -> Advice | None:
    share = shares.starved / shares.total
    if share <= STARVED:
        return None
    plan, replicas = log.plan, max(1, replicas_seen(log))
    title = f"Starved {percent(share)} of the time"
    evidence = f"Devices were free for {seconds(shares.starved)} with no record waiting"
    per_replica = len([chunk for chunk in log.chunks if not chunk.error]) / replicas
    saves = shares.starved
    if per_replica > plan.concurrency:
        used = shares.busy / (shares.busy + shares.starved)
        wanted = _slots(plan.concurrency, used)
        if wanted > plan.concurrency:
            return Advice(
                title,
                f"{evidence}: {plural(plan.concurrency, 'chunk')} at once kept one busy for {percent(used)} of the "
                "time between loading and its last chunk.",
                f"Raise the replicas' concurrency from {plan.concurrency} to {wanted}.",
                saves,
            )
    elif plan.concurrency > 1 and plan.chunk_rows > _fewest_chunk_rows(log) and per_replica < plan.concurrency:
        size = max(_fewest_chunk_rows(log), math.floor(plan.chunk_rows * per_replica / plan.concurrency))
        if size < plan.chunk_rows and log.plan.rows / size <= MAX_CHUNKS:
            return Advice(
                title,
                f"{evidence}: a replica had {number(per_replica)} chunks in all, fewer than its {plan.concurrency} "
                "slots.",
                f"Lower chunk_size from {count(plan.chunk_rows)} to {count(size)}.",
                saves,
            )
    return Advice(
        title,
        f"{evidence}, though {plural(plan.concurrency, 'chunk')} of {count(plan.chunk_rows)} rows could be at hand.",
        "Preparing (template, tokeniser) or finishing is slower than the device: give the replicas more CPUs, or make "
        "your prompt and finish functions cheaper.",
        saves,
    )


def _slots(concurrency: int, used: float) -> int:
    """Chunks at once that would keep a device busy which ``concurrency`` of them kept busy for a share of ``used``."""
    most = MOST_CONCURRENCY
    return math.ceil(SLACK * concurrency / used) if used * most > SLACK * concurrency else most


def _fewest_chunk_rows(log: RunLog) -> int:
    """Below that a replica's chunks together hold too few rows to fill batches."""
    return max(1, -(-BATCHES_IN_FLIGHT * log.plan.batch_rows // log.plan.concurrency))


def _assembling(log: RunLog, shares: TimeShares) -> Advice | None:
    share = shares.assembling / shares.total
    if share <= ASSEMBLING:
        return None
    fill = mean_fill(log.engines.values())
    filled = f"; batches left {percent(fill)} full on average" if fill is not None else ""
    return Advice(
        f"Waiting for batches to fill {percent(share)} of the time",
        f"Devices were free for {seconds(shares.assembling)} while records waited for more{filled}.",
        "Lower the batcher's batch_timeout_s: a batch that leaves sooner costs less than a device that waits.",
        shares.assembling,
    )


def _blocked(log: RunLog, shares: TimeShares) -> Advice | None:
    share = (shares.blocked + shares.stood) / shares.total
    if share <= BLOCKED:
        return None
    title = f"Blocked event loops {percent(share)} of the time"
    evidence, saves = _while_blocked(shares), shares.blocked + shares.doubtful
    held: defaultdict[str, float] = defaultdict(float)
    for _, stall in log.stalls:
        held[stall.code] += stall.seconds
    if not held:
        return Advice(
            title,
            f"{evidence}; it never stood still for more than a second.",
            "Much small work on the event loop: move what your code does there to threads (asyncio.to_thread), or give "
            "the replica more CPUs.",
            saves,
        )
    code, longest = max(held.items(), key=lambda item: item[1])
    return Advice(
        title,
        f"{evidence}. It stood still {plural(len(log.stalls), 'time')}, {seconds(longest)} of it in {code}.",
        f"Call what blocks in {code} on a thread: await asyncio.to_thread(...).",
        saves,
    )


def _while_blocked(shares: TimeShares) -> str:
    """What devices did while event loops were held up."""
    own = shares.stood - shares.doubtful
    found = [
        (shares.blocked, f"devices were free for {seconds(shares.blocked)} before the event loop took notice"),
        (shares.doubtful, doubts(shares)),
        (own, f"for {seconds(own)} the engine itself computed on the event loop, and all else waited"),
    ]
    worth_a_word = BLOCKED / 4 * shares.total  # together they are more than BLOCKED, so that one of the three is
    text = "; ".join(each for value, each in found if value > worth_a_word)
    return text[0].upper() + text[1:]


def doubts(shares: TimeShares) -> str:
    """How much of the busy time may be none."""
    return (
        f"of the {seconds(shares.busy)} busy, {seconds(shares.doubtful)} lie in stalls of the event loop: an engine "
        "that answers on the loop may have stood still, too"
    )


def _loading(log: RunLog, shares: TimeShares) -> Advice | None:
    share = shares.loading / shares.total
    if share <= LOADING or log.outcome == "running":
        return None
    seen = replicas_seen(log)
    each = shares.loading / len(log.engines)
    title = f"Loading {percent(share)} of the time"
    evidence = f"{plural(len(log.engines), 'engine')} took {seconds(each)} each until there, and worked for "
    evidence += f"{seconds(shares.busy / len(log.engines))} each."
    fewer = max(1, math.floor(shares.busy / (RUNS_PER_LOAD * each)))
    if fewer < seen and len(log.engines) == seen:
        longer = shares.busy / fewer - shares.busy / seen
        return Advice(
            title,
            evidence,
            f"Fewer replicas for so few rows: {fewer} instead of {seen}. The run takes some {seconds(longer)} longer.",
            (seen - fewer) * each,
        )
    return Advice(
        title,
        evidence,
        "Give a run more rows, keep replicas warm between runs (replicas=(1, ...), a longer idle_ttl), load while the "
        "source is read (--warm_up), or bring the model nearer (prefetch): docs/cold-start.md.",
        shares.loading,
    )


def _tail(log: RunLog, shares: TimeShares) -> Advice | None:
    share = shares.tail / shares.total
    seen = replicas_seen(log)
    if share <= TAIL or seen < 2 or log.outcome == "running":
        return None
    plan = log.plan
    title = f"Idle at the end {percent(share)} of the time"
    evidence = f"Replicas waited {seconds(shares.tail)} for the last chunks of others; a chunk had "
    evidence += f"{count(plan.chunk_rows)} rows."
    fewest = max(_fewest_chunk_rows(log), -(-plan.rows // MAX_CHUNKS))
    size = max(fewest, math.floor(plan.chunk_rows * GOOD_TAIL / share))
    if size < plan.chunk_rows:
        return Advice(
            title,
            evidence,
            f"Lower chunk_size from {count(plan.chunk_rows)} to {count(size)}.",
            shares.tail * (1 - size / plan.chunk_rows),
        )
    fewer = max(1, math.floor(seen * (1 - share)))
    if fewer < seen:
        return Advice(
            title,
            f"{evidence} Smaller ones would not fill batches.",
            f"Fewer replicas for so few rows: {fewer} instead of {seen}.",
            shares.tail * (1 - fewer / seen),
        )
    return None


def mean_fill(engines: Iterable[EngineLog]) -> float | None:
    """How full the batches of engines were, as far as they were sampled; None without any."""
    pairs = [(engine.samples[0], engine.samples[-1]) for engine in engines if engine.samples]
    batches = sum(last.batches - first.batches for first, last in pairs)
    return sum(last.fill - first.fill for first, last in pairs) / batches if batches > 0 else None


def _fill(log: RunLog, shares: TimeShares) -> Advice | None:
    fill, working = mean_fill(log.engines.values()), shares.busy / shares.total
    if fill is None or fill >= LOW_FILL or working <= BUSY:
        return None
    plan = log.plan
    wanted = min(MOST_CONCURRENCY, math.ceil(plan.concurrency / max(fill, 1 / MOST_CONCURRENCY)))
    title = f"Batches {percent(fill)} full"
    evidence = f"Devices were busy {percent(working)} of the time, with batches of less than half of what they may hold"
    per_replica = len([chunk for chunk in log.chunks if not chunk.error]) / max(1, replicas_seen(log))
    if wanted <= plan.concurrency or per_replica < wanted:
        return Advice(title, f"{evidence}.", "Give a run more rows: fuller batches take little longer than these.")
    return Advice(
        title,
        f"{evidence}: {plural(plan.concurrency, 'chunk')} of {count(plan.chunk_rows)} rows do not bring more at once.",
        f"Raise the replicas' concurrency from {plan.concurrency} to {wanted}.",
        shares.busy * (1 - fill) / 2,
    )


def _rate(log: RunLog, shares: TimeShares) -> Advice | None:
    del shares
    measured, plan = measured_rows_per_s(log), log.plan
    if measured is None or plan.rows < 1 or not math.isfinite(plan.rows_per_s) or plan.rows_per_s <= 0:
        return None
    off = max(measured / plan.rows_per_s, plan.rows_per_s / measured)
    said = float(f"{measured:.2g}")
    if off <= RATE_OFF or said == plan.rows_per_s:
        return None
    sizes = [
        plan_chunk_rows(
            plan.rows,
            replicas=plan.replicas,
            concurrency=plan.concurrency,
            batch_rows=plan.batch_rows,
            rows_per_s=rate,
        )
        for rate in (plan.rows_per_s, said)
    ]
    if sizes[0] == sizes[1] or sizes[1] == plan.chunk_rows:
        return None
    return Advice(
        f"Replicas are {number(off)} times as {'fast' if measured > plan.rows_per_s else 'slow'} as planned for",
        f"One answered {number(measured)} rows/s, the plan assumed {number(plan.rows_per_s)}; told so, it "
        f"cuts a new output into chunks of {count(sizes[1])} rows instead of {count(sizes[0])}.",
        f"Pass --rows_per_s {said:g}.",
    )


def _latency(log: RunLog, shares: TimeShares) -> Advice | None:
    del shares
    median, slow = percentile(log.latencies, 0.5), percentile(log.latencies, 0.99)
    if median is None or slow is None or slow <= SLOW_S or slow <= SLOW_TIMES * median:
        return None
    usual, longest = percentile(log.response_lengths, 0.5), percentile(log.response_lengths, 0.99)
    if usual is None or longest is None or longest < LONG_TIMES * usual:
        return None  # they waited for others: records of like length go together
    return Advice(
        f"One record in a hundred took more than {number(slow / median)} times the median",
        f"The median is {seconds(median)}, p99 {seconds(slow)}: the slow ones keep their chunks open.",
        "Look at the longest responses: a lower max_tokens, or a stop text, ends those that repeat themselves.",
    )


_RULES: tuple[Callable[[RunLog], Advice | None], ...] = (_engine_deaths, _failures)
_TIME_RULES: tuple[Callable[[RunLog, TimeShares], Advice | None], ...] = (
    _starved,
    _assembling,
    _blocked,
    _loading,
    _tail,
    _fill,
    _rate,
    _latency,
)
_CURED_BY_MORE_AT_ONCE = (_starved, _assembling, _fill)
