"""A folder of parts, from the first to the manifest: what is done, what is stale, and when it is finished.

At every moment, whatever is killed, the folder either has no manifest, or one that lists parts that are there:

1. `Output.open` checks the folder and writes ``_run.json``
2. `Output.resume` finds the parts that need not be made again, and takes back a manifest that the plan outdates
3. workers write parts, each in one step, in any order, as often as they like
4. `Output.commit` checks every part, deletes what the plan has no use for, and writes ``_manifest.json``

Two drivers with the same plan on one folder do the same work twice and leave the same output. With different plans the
one that commits last wins; the other is told which parts are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from flyte_batch.data import manifest as manifests
from flyte_batch.data import storage
from flyte_batch.data.chunks import FAMILY_CHARS, Chunk
from flyte_batch.data.manifest import MANIFEST_FILE, RUN_FILE, Manifest, RunRecord
from flyte_batch.data.parquet import conform
from flyte_batch.data.parts import PartInfo, read_part_info
from flyte_batch.data.sources import Source
from flyte_batch.data.storage import Location
from flyte_batch.errors import BadInput, ChunkFailed, RunError

STALE_AFTER_S = 3600.0
"""A temporary file that nobody wrote to for this long belongs to a killed writer."""

_PART_NAME = re.compile(r"part-\d{12,}-[0-9a-f]{16}\.parquet")
_DATA_SUFFIXES = (".parquet", ".pq")
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Output:
    """An output folder that belongs to one run; see `Output.open`.

    Attributes:
        location: the folder.
        source: what the run infers.
        run: what ``_run.json`` says.
    """

    location: Location
    source: Source
    run: RunRecord

    @classmethod
    def open(cls, path: str, settings: Mapping[str, object], source: Source, *, overwrite: bool = False) -> Output:
        """Prepares a folder for a run, new or resumed.

        Args:
            path: local path or URI; created if missing.
            settings: as for `flyte_batch.data.chunks.plan_chunks`. They are written to the folder, so keep secrets out.
            source: what will be inferred.
            overwrite: replace an output that was made with other settings or from another source. Its manifest goes
                now, its parts when the new run commits. It means nothing for an output of the same settings: that is
                resumed, so that a retried driver doesn't start over.

        Raises:
            BadInput: the folder can't be written to, holds another run's output or Parquet files that are not ours, or
                is the source's own folder.
        """
        location = storage.locate(path)
        for file in source.files:
            if file.location.parent.uri == location.uri:
                raise BadInput(f"the output {location} is the folder of the source: choose another --output")
        storage.make_writable_folder(location)
        for found in storage.entries(location):
            name = found.name
            if found.is_file and name.lower().endswith(_DATA_SUFFIXES) and not _is_hidden(name) and not is_part(name):
                raise BadInput(
                    f"the output {location} holds {name}, which flyte_batch did not write; readers of the folder would "
                    "take it for a result: choose an empty folder or move that file"
                )
        run = manifests.record(settings, source)
        previous = manifests.read_run(location)
        finished = manifests.read_manifest(location)
        if previous is None and finished is not None:
            rows = finished.parts[0].rows if finished.parts else None
            previous = RunRecord(finished.settings, finished.source, rows)
        if finished is None and not any(is_part(found.name) for found in storage.entries(location)):
            previous = None  # begun, but nothing came of it: nobody loses anything
        changed = manifests.differences(previous, run) if previous else []
        if changed and not overwrite:
            raise BadInput(
                f"the output {location} was made by another run ({'; '.join(changed)}): "
                "choose another --output, or replace it with --overwrite"
            )
        if changed:
            # Before the new record is there: a manifest must never stand beside the record of another run.
            storage.delete(location.child(MANIFEST_FILE))
        elif previous is not None:
            run = replace(previous, settings=run.settings, source=run.source)
        if previous != run:
            storage.write_atomically(location.child(RUN_FILE), run.to_json())
        return cls(location, source, run)

    @property
    def chunk_rows(self) -> int | None:
        """Rows per chunk that the folder was begun with; None for a new run. Cut otherwise, nothing can be reused."""
        return self.run.chunk_rows

    @property
    def path(self) -> str:
        """Absolute path or URI, for `plan_chunks`."""
        return self.location.uri

    def finished(self, chunks: Sequence[Chunk]) -> dict[str, PartInfo]:
        """The whole and right parts of these chunks, by chunk id, in the chunks' order; changes nothing.

        What is missing, cut off, foreign, or of other content is left out: that chunk is to be made again.
        """
        names = {found.name for found in storage.entries(self.location) if found.is_file}
        present = [chunk for chunk in chunks if chunk.part in names]
        if not present:
            return {}
        with ThreadPoolExecutor(min(_FOOTERS_AT_ONCE, len(present))) as threads:
            infos = list(threads.map(lambda chunk: read_part_info(self.location.child(chunk.part), chunk), present))
        return {info.chunk_id: info for info in infos if info is not None}

    def resume(
        self,
        chunks: Sequence[Chunk],
        *,
        chunk_rows: int | None = None,
        retry_failures: bool = False,
        may_shrink: bool = True,
    ) -> dict[str, PartInfo]:
        """Begins the work on a plan: as `finished`, and takes back a manifest that this plan makes untrue.

        Args:
            chunks: the plan.
            chunk_rows: the size that it was made with, for the next run to find.
            retry_failures: leave out parts that hold failed rows, so that they are made again.
            may_shrink: accept a plan of fewer rows than the finished output holds; the others are lost by its commit.

        Raises:
            BadInput: the plan would lose finished rows, and may not.
        """
        finished, rows = self.manifest(), sum(chunk.rows for chunk in chunks)
        if finished is not None and finished.rows > rows and not may_shrink:
            raise BadInput(
                f"the output {self.location} holds {finished.rows:,} finished rows and this run has only {rows:,}, so "
                "the others would be lost: choose another --output, or give up the others with --overwrite"
            )
        found = self.finished(chunks)
        done = {chunk_id: part for chunk_id, part in found.items() if not (retry_failures and part.failures)}
        record = replace(self.run, retries_failures=len(done) < len(found))
        if chunk_rows is not None:
            record = replace(record, chunk_rows=chunk_rows)
        if chunks:
            record = replace(record, family=chunks[0].id[:FAMILY_CHARS])
        if record != self.run or record.retries_failures:  # which needs the file to be newer than those parts
            storage.write_atomically(self.location.child(RUN_FILE), record.to_json())
        if len(done) < len(chunks) or not self._is_current(chunks):
            self._withdraw_manifest()
        return done

    def commit(self, chunks: Sequence[Chunk]) -> Manifest:
        """Finishes the output: exactly these chunks' parts, then the manifest.

        Deletes parts of earlier plans and, after `STALE_AFTER_S`, what killed writers left. Committing twice is fine.

        Raises:
            ChunkFailed: chunks without a whole part; nothing was changed, and a re-run makes only those.
            RunError: another run, with other settings, took the folder over meanwhile.
        """
        owner = manifests.read_run(self.location)
        if owner is not None and manifests.differences(owner, self.run):
            self.leave(chunks)
            raise RunError(
                f"another run took over the output {self.location} meanwhile "
                f"({'; '.join(manifests.differences(owner, self.run))}): choose another --output"
            )
        manifest = Manifest.of(self.run, self.source, self._all_parts(chunks))
        planned = {chunk.part for chunk in chunks}
        inside = storage.entries(self.location)
        obsolete = [one for one in inside if one.is_file and is_part(one.name) and one.name not in planned]
        if obsolete:
            # No manifest while the folder holds more rows than the manifest will say.
            self._withdraw_manifest()
            for one in obsolete:
                storage.delete(one.location)
        storage.delete_stale_temporaries(inside, older_than_s=STALE_AFTER_S)
        if self.manifest() != manifest:
            storage.write_atomically(self.location.child(MANIFEST_FILE), manifest.to_json())
        try:
            self._all_parts(chunks)
        except ChunkFailed:
            # A driver with another plan deleted them meanwhile.
            self._withdraw_manifest()
            raise
        return manifest

    def leave(self, chunks: Sequence[Chunk]) -> None:
        """Ends the work on a plan that does not commit.

        Its parts stay for the next run, unless another plan has finished the folder or taken it over meanwhile: then
        what that plan has no use for goes, because a reader of the folder would take it for results. A folder that
        can't be read or cleared for now stays as it is: why the work ended is said by whoever ended it.
        """
        with suppress(OSError, BadInput):
            self._clear(chunks)

    def _clear(self, chunks: Sequence[Chunk]) -> None:
        owner, finished = manifests.read_run(self.location), self.manifest()
        if finished is None and (owner is None or not manifests.differences(owner, self.run)):
            return
        kept = set() if finished is None else {part.name for part in finished.parts}
        for chunk in chunks:
            if chunk.part not in kept:
                storage.delete(self.location.child(chunk.part))

    def manifest(self) -> Manifest | None:
        """The manifest, None while the output is unfinished."""
        return manifests.read_manifest(self.location)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """See `read_output`."""
        return read_output(self.path, columns=columns)

    def _all_parts(self, chunks: Sequence[Chunk]) -> tuple[PartInfo, ...]:
        done = self.finished(chunks)
        missing = [chunk for chunk in chunks if chunk.id not in done]
        if missing:
            first = missing[0]
            raise ChunkFailed(
                f"{len(missing)} of {len(chunks)} chunks have no part in {self.location}, the first is chunk "
                f"{first.index} (rows {first.first_row} to {first.first_row + first.rows - 1}): run again to finish"
            )
        return tuple(done[chunk.id] for chunk in chunks)

    def _is_current(self, chunks: Sequence[Chunk]) -> bool:
        manifest = self.manifest()
        return manifest is not None and [part.chunk_id for part in manifest.parts] == [chunk.id for chunk in chunks]

    def _withdraw_manifest(self) -> None:
        storage.delete(self.location.child(MANIFEST_FILE))


def current_parts(record: RunRecord | None, inside: Iterable[storage.Entry]) -> list[storage.Entry]:
    """The parts in a folder that may be those of the run that it belongs to; of the same first row the newest.

    Parts of an earlier run that this one replaces lie there until it commits.
    """
    family = (record.family if record is not None else None) or ""
    newest: dict[str, storage.Entry] = {}
    for each in sorted(inside, key=lambda entry: entry.modified or 0.0):
        if each.is_file and is_part(each.name):
            _, first_row, chunk = each.name.split("-")
            if chunk.startswith(family):
                newest[first_row] = each
    return sorted(newest.values(), key=lambda entry: entry.name)


def left_to_retry(
    record: RunRecord | None, inside: Sequence[storage.Entry], parts: Iterable[PartInfo]
) -> list[PartInfo]:
    """Those of the parts in a folder that its last run was to make again for their failures, and did not so far."""
    if record is None or not record.retries_failures:
        return []
    modified = {each.name: each.modified or 0.0 for each in inside}
    return [part for part in parts if part.failures and modified[part.name] <= modified[RUN_FILE]]


def is_part(name: str) -> bool:
    """Whether a file of this name is a part of some plan."""
    return _PART_NAME.fullmatch(name) is not None


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def iter_output(path: str, *, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A finished output part by part, in source order; memory for one part.

    Args:
        path: the output folder.
        columns: these only; None for all.

    Raises:
        BadInput: no such folder or column.
        RunError: the output is not finished, or a part is missing or damaged.
        OSError: the storage can't be read for now.
    """
    location = storage.locate(path)
    if storage.entry(location) is None:
        raise BadInput(f"no such output folder: {location}")
    manifest = manifests.read_manifest(location)
    if manifest is None:
        raise RunError(f"the output {location} is not finished (it has no {MANIFEST_FILE}): run again to finish it")
    schema = manifest.arrow_schema
    names = schema.names if columns is None else list(columns)
    for name in names:
        if name not in schema.names:
            raise BadInput(f"the output {location} has no column {name!r}; it has {', '.join(schema.names)}")
    wanted = pa.schema([schema.field(name) for name in names])
    for part in manifest.parts:
        file = location.child(part.name)
        info = read_part_info(file)
        if info is None or (info.chunk_id, info.rows) != (part.chunk_id, part.rows):
            raise RunError(f"the part {file} is missing or damaged: run again to make it anew")
        yield conform(_read_part(file, names), wanted)


def _read_part(file: Location, columns: list[str]) -> pa.Table:
    try:
        with storage.open_file(file) as opened:
            return pq.read_table(opened, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        data = storage.read_bytes(file)  # says so if it was the storage: from memory it can only be the part
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"the part {file} is damaged ({storage.reason(error)}): delete it and run again") from error


def read_output(path: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """A finished output as one table in memory, in source order.

    Raises:
        BadInput: no such folder or column.
        RunError: the output is not finished, or a part is missing or damaged.
    """
    return pa.concat_tables(iter_output(path, columns=columns))
