"""The two small files beside the parts, and what they say.

``_run.json`` is written first: which source and settings the folder belongs to. ``_manifest.json`` is written last:
which parts make up the finished output, and what they hold. Both are JSON for people and programs; readers of Parquet
folders skip names that begin with an underscore.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa

from flyte_batch.data import storage
from flyte_batch.data.chunks import plain
from flyte_batch.data.parts import PartInfo, most_frequent, part_schema
from flyte_batch.data.sources import Source, decode_schema, encode_schema
from flyte_batch.data.storage import Location
from flyte_batch.errors import BadInput

RUN_FILE = "_run.json"
MANIFEST_FILE = "_manifest.json"
FORMAT_VERSION = 1

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class SourceRecord:
    """What an output remembers of its source.

    Attributes:
        path: absolute path or URI of the file, folder or glob.
        identity: of the whole source, see `flyte_batch.data.sources.Source`.
        files: the identities of its files, by which a moved dataset is known again.
    """

    path: str
    identity: str
    files: tuple[str, ...]

    @classmethod
    def of(cls, source: Source) -> SourceRecord:
        return cls(storage.locate(source.path).uri, source.identity, tuple(file.identity for file in source.files))


@dataclass(frozen=True)
class RunRecord:
    """What ``_run.json`` says: the source and the settings that the folder's parts are made from, and how it is cut.

    ``chunk_rows`` is for the next run: cut otherwise, it could reuse nothing. ``family`` is what the names of its parts
    have in common (`flyte_batch.data.chunks.FAMILY_CHARS`). None before the first plan. ``retries_failures`` says that
    parts with failed rows are to be made again, of which those are left that are no newer than the file.
    """

    settings: Mapping[str, object]
    source: SourceRecord
    chunk_rows: int | None = None
    family: str | None = None
    retries_failures: bool = False

    def to_json(self) -> bytes:
        plan = {"chunk_rows": self.chunk_rows, "family": self.family, "retries_failures": self.retries_failures}
        return _dump({"settings": self.settings, "source": asdict(self.source), **plan})


@dataclass(frozen=True)
class Manifest:
    """What ``_manifest.json`` says: the output is finished, and these parts, in this order, are it.

    Attributes:
        settings: of the run.
        source: what was inferred.
        schema: of every part, serialised, base64.
        parts: in source order.
    """

    settings: Mapping[str, object]
    source: SourceRecord
    schema: str
    parts: tuple[PartInfo, ...]

    @property
    def rows(self) -> int:
        """Rows of all parts, failures included."""
        return sum(part.rows for part in self.parts)

    @property
    def failures(self) -> int:
        """Rows with ``error`` set."""
        return sum(part.failures for part in self.parts)

    @property
    def prompt_tokens(self) -> int:
        return sum(part.prompt_tokens for part in self.parts)

    @property
    def response_tokens(self) -> int:
        return sum(part.response_tokens for part in self.parts)

    @property
    def causes(self) -> dict[str, int]:
        """Class of the error -> failed rows, as in `flyte_batch.data.parts.PartInfo`."""
        causes: Counter[str] = Counter()
        for part in self.parts:
            causes.update(part.causes)
        return most_frequent(causes)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def arrow_schema(self) -> pa.Schema:
        return decode_schema(self.schema)

    @classmethod
    def of(cls, run: RunRecord, source: Source, parts: tuple[PartInfo, ...]) -> Manifest:
        return cls(run.settings, run.source, encode_schema(part_schema(source.schema)), parts)

    def to_json(self) -> bytes:
        totals = {name: getattr(self, name) for name in _TOTALS}
        columns = [{"name": field.name, "type": str(field.type)} for field in self.arrow_schema]
        return _dump(
            {
                "totals": totals,
                "settings": self.settings,
                "source": asdict(self.source),
                "columns": columns,
                "schema": self.schema,
                "parts": [asdict(part) for part in self.parts],
            }
        )


_TOTALS = ("rows", "failures", "causes", "prompt_tokens", "response_tokens", "size")


def _dump(content: Mapping[str, object]) -> bytes:
    return (json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1) + "\n").encode()


def _load(location: Location) -> dict[str, object] | None:
    try:
        content = json.loads(storage.read_bytes(location))
        version = content["format_version"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(location, error) from error
    if version != FORMAT_VERSION:
        raise BadInput(
            f"{location} has format version {version}, this flyte_batch knows {FORMAT_VERSION}: "
            "choose another --output, or the version that wrote it"
        )
    return dict(content)


def _unreadable(location: Location, error: Exception) -> BadInput:
    return BadInput(
        f"{location} can't be understood ({storage.reason(error)}): choose another --output, or delete that file if "
        "the folder is an output of flyte_batch"
    )


def read_run(folder: Location) -> RunRecord | None:
    """What the folder was begun with; None for a folder without ``_run.json``.

    Raises:
        BadInput: the file is not ours, or of another format version.
    """
    location = folder.child(RUN_FILE)
    content = _load(location)
    if content is None:
        return None
    try:
        rows, family = content.get("chunk_rows"), content.get("family")
        return RunRecord(
            _settings(content),
            _source(content),
            rows if isinstance(rows, int) else None,
            family if isinstance(family, str) else None,
            content.get("retries_failures") is True,
        )
    except (KeyError, TypeError) as error:
        raise _unreadable(location, error) from error


def read_manifest(folder: Location) -> Manifest | None:
    """The manifest of a finished output; None for any other folder.

    Raises:
        BadInput: the file is not ours, or of another format version.
    """
    location = folder.child(MANIFEST_FILE)
    content = _load(location)
    if content is None:
        return None
    try:
        parts = tuple(PartInfo(**part) for part in content["parts"])  # type: ignore[attr-defined]
        return Manifest(_settings(content), _source(content), str(content["schema"]), parts)
    except (KeyError, TypeError) as error:
        raise _unreadable(location, error) from error


def _settings(content: dict[str, object]) -> Mapping[str, object]:
    settings = content["settings"]
    if not isinstance(settings, dict):
        raise TypeError("settings is no object")
    return settings


def _source(content: dict[str, object]) -> SourceRecord:
    source = content["source"]
    if not isinstance(source, dict):
        raise TypeError("source is no object")
    return SourceRecord(str(source["path"]), str(source["identity"]), tuple(source["files"]))


def differences(old: RunRecord, new: RunRecord) -> list[str]:
    """What makes ``new`` another run than ``old``, one ``name: old -> new`` each; empty for the same run.

    A source is the same as long as its path is, or any of its files: rows may be appended and files may be added, and a
    dataset may move. A part is only ever reused for the rows that it was made from; this is about whose parts a folder
    holds.
    """
    found = _compare("", old.settings, new.settings)
    if old.source.path != new.source.path and not set(old.source.files) & set(new.source.files):
        found.append(f"source: {old.source.path} -> {new.source.path}")
    return found


def _compare(prefix: str, old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _compare(f"{prefix}{key}.", before, after)
        elif before != after or type(before) is not type(after):
            found.append("{}{}: {} -> {}".format(prefix, key, *_show(before, after)))
    return found


_ABSENT = object()


def _show(before: object, after: object) -> tuple[str, str]:
    """Both values, short enough for a message; of long ones the piece where they begin to differ."""
    old, new = ("(not set)" if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in (before, after))
    if max(len(old), len(new)) <= _SHOWN_CHARACTERS:
        return old, new
    same = next((index for index, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - _SHOWN_CHARACTERS // 3)
    return _cut(old, start), _cut(new, start)


def _cut(text: str, start: int) -> str:
    piece = text[start : start + _SHOWN_CHARACTERS]
    return f"{'...' if start else ''}{piece}{'...' if start + _SHOWN_CHARACTERS < len(text) else ''}"


def record(settings: Mapping[str, object], source: Source) -> RunRecord:
    """The record of a run that is about to begin.

    Raises:
        BadInput: settings that JSON can't hold.
    """
    plain_settings = plain(settings)
    if not isinstance(plain_settings, dict):
        raise BadInput("settings must be a mapping")
    return RunRecord(plain_settings, SourceRecord.of(source))
