"""The answer: how a run went, in a sentence and a few figures."""

from __future__ import annotations

from dataclasses import dataclass

from flyte_batch.monitoring import gpu
from flyte_batch.report.advice import replicas_seen
from flyte_batch.report.formats import count, cut, money, number, percent, plural, seconds
from flyte_batch.report.run_log import RunLog, TimeShares

ENOUGH_TO_ESTIMATE = 0.2
"""Share of a run's rows before which the time that is left is not told: the first ones hold the model's load."""

MOST_OF_AN_ERROR = 1_000
"""Characters, in the text."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the answer.

    Attributes:
        name: what it is.
        value: with its unit.
        note: what it is made of.
    """

    name: str
    value: str
    note: str = ""


def knows_times(log: RunLog) -> bool:
    """Whether the log is of a run; one that was made from parts alone knows only what these hold."""
    return log.started > 0


def seconds_left(log: RunLog) -> float | None:
    """Until a running run's end, by its speed so far; None where that says too little."""
    to_do = log.plan.rows - log.plan.rows_reused
    if log.outcome != "running" or log.seconds <= 0 or log.rows_done < ENOUGH_TO_ESTIMATE * to_do or not log.rows_done:
        return None
    last = max((chunk.ended for chunk in log.chunks if chunk.ended is not None), default=log.ended)
    took = max(0.0, last - log.started) or log.seconds  # since then there may be much that no chunk has told
    return max(0.0, (to_do - log.rows_done) * took / log.rows_done - (log.ended - log.started - took))


def status(log: RunLog) -> str:
    """In a word or two."""
    unfinished = "Broken off" if knows_times(log) else "Unfinished"
    return {"running": "Running", "done": "Done", "failed": "Failed", "cancelled": "Cancelled"}.get(
        log.outcome, unfinished
    )


def sentence(log: RunLog, shares: TimeShares) -> str:
    """What came of the run; ``shares`` are its `RunLog.time_shares`."""
    answered, of_rows = log.rows - log.failures, log.plan.rows
    failed = f"; {plural(log.failures, 'row')} failed" if log.failures else "; none failed"
    if not knows_times(log):
        rest = "" if log.outcome == "done" else ", and the output is not finished"
        return f"{count(answered)} of {plural(log.rows, 'row')} in the parts have a response{failed}{rest}."
    earlier = f", {count(log.plan.rows_reused)} of them by earlier runs" if log.plan.rows_reused else ""
    if log.outcome == "running":
        left = seconds_left(log)
        later = f"about {seconds(left)} left" if left is not None else "too early to say how long it will take"
        share = percent(log.rows / of_rows) if of_rows else "0%"
        so_far = f"{count(log.rows)} of {plural(of_rows, 'row')} done ({share}) after {elapsed(log)}{earlier}"
        return f"{so_far}{failed}; {later}."
    if log.outcome != "done":
        word = "No word any more" if log.outcome == "unfinished" else status(log)
        kept = (
            f"with {count(log.rows)} of {plural(of_rows, 'row')} done{earlier}, which are kept"
            if log.rows
            else "with no row done"
        )
        return f"{word} after {elapsed(log)}, {kept}."
    if not log.rows_done:
        return f"Nothing was left to do: earlier runs had done all {plural(log.rows, 'row')}{failed}."
    replicas = plural(replicas_seen(log), "replica")
    there_already = ""
    if log.plan.rows_reused:
        answered, of_rows = log.rows_done - failures_done(log), log.rows_done
        there_already = f"; {plural(log.plan.rows_reused, 'row')} {_were(log.plan.rows_reused)} there already"
        failed = f"; {count(log.failures)} of all {plural(log.rows, 'row')} failed" if log.failures else failed
    return (
        f"{count(answered)} of {plural(of_rows, 'row')} answered in {seconds(log.seconds)} by {replicas}, "
        f"busy {utilization(shares)} of the time{there_already}{failed}."
    )


def elapsed(log: RunLog) -> str:
    """From the run's start to its end, as far as its log knows."""
    return ("at least " if log.rows_untold else "") + seconds(log.seconds)


def utilization(shares: TimeShares) -> str:
    """As a percentage, or one at most where event loops stood still for long while engines seemed to be at work."""
    return ("at most " if shares.is_upper_bound else "") + percent(shares.utilization)


def _were(rows: int) -> str:
    return "was" if rows == 1 else "were"


def figures(log: RunLog, shares: TimeShares) -> list[Figure]:
    """The numbers that matter, the most telling first; ``shares`` are the log's `RunLog.time_shares`."""
    share = log.failures / log.rows if log.rows else 0.0
    reused = f", {count(log.plan.rows_reused)} by earlier runs" if log.plan.rows_reused else ""
    rows_note = f"of {count(log.plan.rows)}{reused}" if knows_times(log) else f"in {plural(log.plan.chunks, 'part')}"
    found = [
        Figure("Rows", count(log.rows), rows_note),
        Figure("Failures", count(log.failures), f"{percent(share)} of the rows done"),
    ]
    if knows_times(log):
        note = f"{seconds(shares.busy)} busy of {seconds(shares.total)}"
        if shares.is_upper_bound:
            note += f", {seconds(shares.doubtful)} of these in doubt: the event loop stood still"
        found += [
            Figure("Time", elapsed(log), plural(replicas_seen(log), "replica") if log.engines else ""),
            Figure("Utilisation", utilization(shares) if shares.total else "none", note if shares.total else ""),
        ]
    if knows_times(log) and log.seconds > 0 and log.rows_done:
        tokens = tokens_done(log)
        found += [
            Figure("Rows a second", number(log.rows_done / log.seconds), "committed by this run, loading included"),
            Figure("Tokens a second", number(tokens / log.seconds), "prompts and responses"),
        ]
    tokens_note = f"{count(log.prompt_tokens)} of prompts, {count(log.response_tokens)} of responses"
    if log.plan.rows_reused:
        tokens_note += f"; {count(tokens_done(log))} of them by this run"
    found.append(Figure("Tokens", count(log.prompt_tokens + log.response_tokens), tokens_note))
    lost = sum(bool(chunk.error) for chunk in log.chunks)
    if log.cost is not None and (lost or log.rows_untold) and not log.engines:
        why = "chunks that failed tell no times" if lost else "no chunk had told its times when the log was written"
        found.append(Figure("Cost", "unknown", why))
    elif log.cost is not None:
        note = f"{seconds(log.replica_seconds)} of replicas at {number(log.plan.price_per_hour or 0)} an hour"
        if log.plan.rows_reused:
            note = f"of this run alone: {note}"
        if done := tokens_done(log):
            note += f"; {money(log.cost / done * 1e6)} per million tokens"
        if lost:
            note += f"; what {plural(lost, 'chunk')} that failed took may be missing"
        if log.rows_untold:
            note += f"; what {plural(log.rows_untold, 'row')} took that came after the log was written is missing"
        found.append(Figure("Cost", ("at least " if lost or log.rows_untold else "") + money(log.cost), note))
    energy = gpu.energy_j(gpu.gpu_totals(log.gpus))
    per_million = gpu.wh_per_million_tokens(energy, tokens_done(log))
    if energy is not None and per_million is not None:
        found.append(Figure("Energy", f"{number(energy / 3600)} Wh", f"{number(per_million)} Wh per million tokens"))
    return found


def tokens_done(log: RunLog) -> int:
    """Of prompts and responses, in this run."""
    return sum(chunk.prompt_tokens + chunk.response_tokens for chunk in log.chunks)


def failures_done(log: RunLog) -> int:
    """Rows without a response, in this run."""
    return sum(chunk.failures for chunk in log.chunks if not chunk.error)


def summary(last: RunLog, about: RunLog, silent_s: float) -> list[str]:
    """The answer as at most six lines of text: how ``last`` ended, and why; and the figures of ``about``.

    Args:
        last: the last run.
        about: the one to tell of.
        silent_s: seconds since the last run's log was written.
    """
    lines = {figure.name: figure for figure in figures(about, about.time_shares())}

    def line(*names: str) -> str:
        return "; ".join(
            f"{name.lower()} {lines[name].value}" + (f" ({lines[name].note})" if lines[name].note else "")
            for name in names
            if name in lines
        )

    heard = f" Last heard of {seconds(silent_s)} ago." if last.outcome in ("running", "unfinished") else ""
    why = "".join(each if each.isprintable() else " " for each in last.error)
    found = [
        sentence(last, last.time_shares()) + (heard if knows_times(last) else ""),
        cut(why, MOST_OF_AN_ERROR),
        line("Rows", "Failures"),
        line("Time", "Utilisation"),
        line("Rows a second", "Tokens a second", "Tokens"),
        line("Cost", "Energy"),
    ]
    return [text for text in found if text]
