"""The logs of the runs over an output: which are kept, and what there is to read where there is none."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from flyte_batch.errors import BadInput
from flyte_batch.planning.overheads import USUAL_ROWS_PER_S
from flyte_batch.report.formats import count, plural
from flyte_batch.report.run_log import ChunkEntry, Plan, RunLog, logs_from_json, logs_to_json

if TYPE_CHECKING:
    from flyte_batch.data.manifest import Manifest, RunRecord
    from flyte_batch.data.parts import PartInfo
    from flyte_batch.data.storage import Entry, Location

logger = logging.getLogger(__name__)

LOG_FILE = "_report.json"

MOST_RUNS = 20
"""Over one output; of all but the last that did something less is kept."""

SILENT_S = 120.0
"""A run that wrote no log for so long is not taken to be running any more."""

_FOOTERS_AT_ONCE = 16


def other_logs(folder: Location, data: bytes, own: RunLog) -> list[RunLog]:
    """The logs of other runs over an output, the last ones, all but the last that did something cut to their sums.

    Runs of other drivers that work on the output at the same time are among them.

    Args:
        folder: the output.
        data: what its `LOG_FILE` holds; if that can't be understood, it is a warning.
        own: of the run that asks.
    """
    try:
        logs = logs_from_json(data)
    except ValueError as error:
        logger.warning("what earlier runs left in %s is not kept: %s", folder.child(LOG_FILE), error)
        return []
    others = [log for log in logs if _identity(log) != _identity(own)][-(MOST_RUNS - 1) :]
    whole = _busy(others)
    kept = [log if log is whole else _sums(log) for log in others]
    # What was not written since then is killed; another driver's log is written every some seconds.
    since = max(own.started, own.ended - SILENT_S)
    return [_over(log) if log.ended < since else log for log in kept]


def _identity(log: RunLog) -> tuple[float, str, str]:
    """What no two runs over one output have in common."""
    return log.started, log.run, log.action


def detailed(logs: Sequence[RunLog]) -> RunLog:
    """The run to tell of: the last one; if that found nothing to do, the last that did something.

    But one whose rows are not all of the output's, or more than these, does not tell what there is now.
    """
    last, busy = logs[-1], _busy(logs)
    if last.outcome != "done" or busy is None or busy.rows != last.plan.rows:
        return last
    return busy


def _busy(logs: Sequence[RunLog]) -> RunLog | None:
    """The last run that heard of a chunk."""
    return next((log for log in reversed(logs) if log.chunks), None)


def _sums(log: RunLog) -> RunLog:
    """The log with one chunk for each engine, which has the sums of its chunks."""
    chunks: dict[str, ChunkEntry] = {}
    for each in log.chunks:
        if not each.error:
            known = chunks.get(each.batcher, ChunkEntry(each.index, 0, 0, 0, 0, each.batcher, each.started, each.ended))
            chunks[each.batcher] = replace(
                known,
                rows=known.rows + each.rows,
                failures=known.failures + each.failures,
                prompt_tokens=known.prompt_tokens + each.prompt_tokens,
                response_tokens=known.response_tokens + each.response_tokens,
                ended=each.ended,
            )
    engines = {
        batcher: replace(engine, samples=[*engine.samples[:1], *engine.samples[1:][-1:]])
        for batcher, engine in log.engines.items()
    }
    return replace(log, chunks=list(chunks.values()), engines=engines, examples=[], stalls=[])


def logs_of(folder: Location) -> list[RunLog]:
    """The logs of the runs over an output, the last one last; made from the parts where there are none.

    A log that can't be understood is a warning, and the parts are read.

    Raises:
        BadInput: the folder is no output, or may not be read.
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data import storage

    found = storage.entry(folder)
    if found is None or found.is_file:
        raise BadInput(f"{folder} is {'a file, no folder' if found else 'not there'}: give the --output of a run")
    location = folder.child(LOG_FILE)
    try:
        data = storage.read_bytes(location)
    except FileNotFoundError:
        return [log_of_parts(folder)]
    try:
        *earlier, last = logs_from_json(data)
    except ValueError as error:
        logger.warning("%s can't be understood (%s); the report is made from the parts", location, error)
        return [log_of_parts(folder)]
    if silent_s(folder) > SILENT_S:
        last = _over(last)
    if last.outcome != "done":
        return [*map(_over, earlier), _with_parts(last, folder)]
    if _is_finished(folder):
        return [*map(_over, earlier), last]
    logger.warning("a later run began on %s, and has written no log; the report is made from the parts", folder)
    return [*map(_over, earlier), last, log_of_parts(folder)]


def silent_s(folder: Location) -> float:
    """Seconds since the log of an output's runs was written, as its storage tells; infinite where it does not.

    Raises:
        BadInput: the folder may not be read.
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data import storage

    found = storage.entry(folder.child(LOG_FILE))
    if found is None or found.modified is None:
        return math.inf
    return max(0.0, time.time() - found.modified)


def _over(log: RunLog) -> RunLog:
    """The log, which does not say that its run goes on."""
    return replace(log, outcome="unfinished") if log.outcome == "running" else log


def _with_parts(log: RunLog, folder: Location) -> RunLog:
    """The log, with the sums of the parts where these hold more rows: some may have come since it was written.

    Parts of earlier runs that this one is to make again do not count, as they do not in the log.
    """
    from flyte_batch.data import storage
    from flyte_batch.data.manifest import read_run
    from flyte_batch.data.output import left_to_retry

    run, inside = read_run(folder), storage.entries(folder)
    parts = _parts(folder, run, inside)
    again = left_to_retry(run, inside, parts)
    if again:
        logger.warning(
            "not counted: %s of earlier runs in %s, of which %s failed, that the last run was to do again",
            plural(sum(part.rows for part in again), "row"), folder, count(sum(part.failures for part in again)),
        )  # fmt: skip
        parts = [part for part in parts if part not in again]
    if not log.rows < sum(part.rows for part in parts) <= log.plan.rows:
        return log
    counted = replace(
        log,
        rows=0,
        failures=0,
        prompt_tokens=0,
        response_tokens=0,
        causes={},
        prompt_lengths={},
        response_lengths={},
    )
    for part in parts:
        counted.count_part(part)
    return counted


def _is_finished(folder: Location) -> bool:
    """Whether no run has begun without an end. Warns of parts that are missing, or of another size than they were."""
    from flyte_batch.data import storage
    from flyte_batch.data.manifest import read_manifest, read_run

    try:
        manifest = read_manifest(folder)
    except BadInput as error:
        logger.warning("%s", error)
        return True
    if manifest is None:
        return read_run(folder) is None  # a log that was copied, all alone
    sizes = {entry.name: entry.size for entry in storage.entries(folder)}
    broken = [part.name for part in manifest.parts if sizes.get(part.name) != part.bytes]
    if broken:
        logger.warning(
            "%s of %s in %s can't be read though the report counts them; the first is %s: it is missing, or not of the "
            "size that the manifest says. The run's command makes them again",
            count(len(broken)), plural(len(manifest.parts), "part"), folder, broken[0],
        )  # fmt: skip
    return True


def _parts(folder: Location, run: RunRecord | None, inside: Sequence[Entry]) -> list[PartInfo]:
    """What the parts of the last run in a folder say of themselves; those that can't be read are a warning."""
    from flyte_batch.data.output import current_parts
    from flyte_batch.data.parts import read_part_info

    names = current_parts(run, inside)
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        infos = list(threads.map(lambda entry: read_part_info(entry.location), names))
    broken = [entry.name for entry, info in zip(names, infos, strict=True) if info is None]
    if broken:
        logger.warning(
            "%s of %s in %s can't be read, and are not counted; the first is %s: it is cut off, or no part of a run",
            count(len(broken)), plural(len(names), "part"), folder, broken[0],
        )  # fmt: skip
    return [info for info in infos if info is not None]


def log_of_parts(folder: Location) -> RunLog:
    """What the parts in a folder say of themselves, as the log of a run whose times are not known.

    Raises:
        BadInput: the folder is no output, or may not be read.
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data import storage
    from flyte_batch.data.manifest import read_manifest, read_run

    run, manifest = read_run(folder), read_manifest(folder)
    if manifest is not None:
        _is_finished(folder)
        parts = list(manifest.parts)
    else:
        parts = _parts(folder, run, storage.entries(folder))
    record = run or manifest
    if record is None and not parts:
        raise BadInput(
            f"{folder} is no output of flyte_batch (it holds no part and no manifest): give a run's --output"
        )
    chunk_rows = run.chunk_rows if run is not None else None
    try:
        return _checked(_log_of(folder.uri, record, parts, chunk_rows, is_done=manifest is not None))
    except (TypeError, ValueError, AttributeError) as error:
        why = ascii(str(error))[1:-1]  # may quote a file, and is to be printed on a terminal
        raise BadInput(f"what lies in {folder} was written by no run of flyte_batch: {why[:300]}") from error


def _checked(log: RunLog) -> RunLog:
    """The log, if its values are of the types that it says they are, and nobody's numbers are too large."""
    (checked,) = logs_from_json(logs_to_json([log]))
    return checked


def _log_of(
    output: str, record: RunRecord | Manifest | None, parts: Sequence[PartInfo], chunk_rows: int | None, is_done: bool
) -> RunLog:
    log = RunLog(
        output=output,
        source=record.source.path if record is not None else "",
        settings=record.settings if record is not None else {},
        plan=Plan(
            rows=sum(part.rows for part in parts),
            chunks=len(parts),
            chunk_rows=chunk_rows or max((part.rows for part in parts), default=0),
            rows_reused=0,
            chunks_reused=0,
            replicas=1,
            concurrency=1,
            batch_rows=1,
            rows_per_s=USUAL_ROWS_PER_S,
        ),
        outcome="done" if is_done else "unfinished",
    )
    for part in parts:
        log.count_part(part)
    return log
