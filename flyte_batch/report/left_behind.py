"""What a run left behind, read again: its log, or what the parts alone say."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from flyte_batch.errors import BadInput
from flyte_batch.planning.overheads import USUAL_ROWS_PER_S
from flyte_batch.report.keeper import LOG_FILE
from flyte_batch.report.run_log import Plan, RunLog, logs_from_json

if TYPE_CHECKING:
    from flyte_batch.data.storage import Location

logger = logging.getLogger(__name__)

SILENT_S = 120.0
"""A run that wrote no log for so long is not taken to be running any more."""

_FOOTERS_AT_ONCE = 16


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
        logs = logs_from_json(storage.read_bytes(location))
    except FileNotFoundError:
        logs = []
    except ValueError as error:
        logger.warning("%s can't be understood (%s); the report is made from the parts", location, error)
        logs = []
    if not logs:
        return [log_of_parts(folder)]
    return [*logs[:-1], _ended(logs[-1])]


def _ended(log: RunLog) -> RunLog:
    """The log, which says that its run goes on only if that may be."""
    silent_s = time.time() - log.ended
    return replace(log, outcome="unfinished") if log.outcome == "running" and silent_s > SILENT_S else log


def log_of_parts(folder: Location) -> RunLog:
    """What the parts in a folder say of themselves, as the log of a run whose times are not known.

    Raises:
        BadInput: the folder is no output, or may not be read.
        OSError: the storage can't be read for now.
    """
    from flyte_batch.data import storage
    from flyte_batch.data.manifest import read_manifest, read_run
    from flyte_batch.data.parts import read_part_info

    run, manifest = read_run(folder), read_manifest(folder)
    if manifest is not None:
        parts = list(manifest.parts)
    else:
        names = [entry for entry in storage.entries(folder) if entry.is_file and entry.name.endswith(".parquet")]
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
            infos = threads.map(lambda entry: read_part_info(entry.location), names)
            parts = [info for info in infos if info is not None]
    record = run or manifest
    if record is None and not parts:
        raise BadInput(
            f"{folder} is no output of flyte_batch (it holds no part and no manifest): give a run's --output"
        )
    chunk_rows = run.chunk_rows if run is not None else None
    log = RunLog(
        output=folder.uri,
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
        outcome="unfinished" if manifest is None else "done",
    )
    for part in parts:
        log.count_part(part)
    return log
