"""Models put where replicas load them fast: `prefetch` copies one to a shared folder or into an object store.

A copy is complete or absent. The list of its files comes first (`flyte_batch.engines.stored`), the file without which
no engine loads it comes last, and each file appears whole. So a copy that broke off is refused by whoever would load
it, and the same call again does the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flyte_batch.engines.hub import HubModel
from flyte_batch.engines.stored import LIST_NAME, ModelList, StoredFile
from flyte_batch.errors import BadInput

if TYPE_CHECKING:
    from flyte_batch.data.storage import Entry, Location

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 4
STALE_AFTER_S = 3600.0
"""What nobody has written to for so long was left behind by a process that was killed."""

# What the engines read of a repository; where it holds no safetensors, the older formats.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.safetensors", "model.bin")
_OLDER_WEIGHTS = ("pytorch_model*.bin", "*.gguf")
_WEIGHTS = re.compile(r"[^/]+\.safetensors|pytorch_model[^/]*\.bin|[^/]+\.gguf|model\.bin")


@dataclass(frozen=True)
class PrefetchedModel:
    """A whole copy of a model.

    Attributes:
        location: what to name as the model: a folder's path, or its URI.
        source: where it came from; of a Hugging Face model with its commit.
        files: files of the model.
        size: bytes of all of them.
        copied: files that this call copied; the others were there.
    """

    location: str
    source: str
    files: int
    size: int
    copied: int


async def prefetch(model: str | os.PathLike[str], folder: str | os.PathLike[str]) -> PrefetchedModel:
    """Copy a model to where replicas load it fast: a shared folder, or a bucket that vLLM streams from.

    Safe to repeat, and to run twice at once: what is there is not copied again. A file that was cut is copied anew. A
    download from Hugging Face passes through its cache on this machine's disk, and goes on from what that holds.

    Args:
        model: a folder, the URI of one (``s3://...``), or a Hugging Face id, ``owner/name`` or ``owner/name@revision``.
            Of a folder all files are copied whose names do not begin with a dot, of a Hugging Face model those that the
            engines read. It must not change meanwhile.
        folder: a path, or a ``file://``, ``s3://`` or ``gs://`` URI; new, or begun by a prefetch of the same model.

    Raises:
        BadInput: there is no model there, the folder holds something else, or one of them may not be accessed.
        EngineError: Hugging Face cannot be reached now.
        OSError: copying broke off (connection, full disk). What was copied stays: the same call does the rest.
    """
    stop = threading.Event()
    try:
        return await asyncio.to_thread(_prefetch, os.fspath(model), os.fspath(folder), stop)
    finally:
        stop.set()  # a thread can't be cancelled: this one looks before every piece


def _prefetch(model: str, folder: str, stop: threading.Event) -> PrefetchedModel:
    from flyte_batch.data.storage import delete_stale_temporaries, entries, locate

    target = locate(folder)
    there = _files(target)
    begun = _read_list(target)  # in this order: where another call has just put a file, its list is there
    if begun is None and there:
        raise BadInput(f"{folder} holds files that no prefetch put there ({min(there)}): choose a new folder")
    # What came from Hugging Face is named by its commit: asked for by that, there is nothing to look up.
    if begun is not None and HubModel.parse(model) and begun.source == model and not begun.lacking(_sizes(there)):
        return _result(target, begun, copied=0)
    source, name = _open(model)
    files = _files(source)
    listed = _read_list(source)
    if listed is not None:
        listed.require_whole(_sizes(files), model)
    _require_model(files, model)
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="prefetch") as pool:
        wanted = ModelList(name, dict(zip(files, pool.map(_stored_file, files.values()), strict=True)))
        _begin(target, wanted)
        delete_stale_temporaries(entries(target, recursive=True), older_than_s=STALE_AFTER_S)
        last = files.pop("model.bin" if "model.bin" in files else "config.json")
        copies = [pool.submit(_copy, found, target.child(each), stop) for each, found in files.items()]
        try:
            copied = sum(copy.result() for copy in copies)
        except BaseException:
            stop.set()
            raise
    _begin(target, wanted)  # nobody put another model there meanwhile
    for each, found in files.items():  # nor did another call take a file away, whose upload broke off
        copied += _copy(found, target.child(each), stop)
    copied += _copy(last, target.child(last.name), stop)
    return _result(target, wanted, copied)


def _open(model: str) -> tuple[Location, str]:
    """Where a model's files are, downloaded if they are Hugging Face's, and how to name where they came from."""
    from flyte_batch.data.storage import locate

    path = Path(model).expanduser()
    if "://" in model or path.is_dir():
        source = locate(model)
        return source, source.uri
    hub = None if path.exists() else HubModel.parse(model)
    if hub is None:
        what = "is a file" if path.exists() else "is not there, and is no Hugging Face id (owner/name)"
        raise BadInput(f"the model {model} {what}: name the folder that holds it")
    downloaded = hub.download(_HUB_FILES)
    if not any(_WEIGHTS.fullmatch(each.name) for each in downloaded.iterdir()):
        downloaded = hub.download((*_HUB_FILES, *_OLDER_WEIGHTS))
    return locate(downloaded), f"{hub.id}@{downloaded.name}"


def _require_model(files: Mapping[str, Entry], model: str) -> None:
    if not any(_WEIGHTS.fullmatch(name) for name in files) or not {"config.json", "model.bin"} & files.keys():
        raise BadInput(
            f"there is no model in {model}: looked for config.json and *.safetensors, or for CTranslate2's model.bin"
        )


def _begin(target: Location, wanted: ModelList) -> None:
    """Put the list of files into a new folder, or make sure that the folder's list is the same."""
    from flyte_batch.data.storage import explained, write_atomically

    begun = _read_list(target)
    if begun is not None:
        if begun.files != wanted.files:
            raise BadInput(
                f"{target} holds another model, or another version of it ({begun.source}): choose a new folder"
            )
        return
    with explained("write to", target):
        if target.is_local:
            target.fs.create_dir(target.path, recursive=True)
        write_atomically(target.child(LIST_NAME), wanted.to_json().encode())


def _copy(found: Entry, target: Location, stop: threading.Event) -> bool:
    """Copy a file, unless it is there by now; whether it was copied."""
    from flyte_batch.data.copying import copy_file
    from flyte_batch.data.storage import entry

    there = entry(target)
    if there is not None and there.size == found.size:
        return False
    logger.info("copying %s to %s (%d bytes)", found.location, target, found.size)
    copy_file(found.location, target, found.size, stop)
    return True


def _stored_file(found: Entry) -> StoredFile:
    if not found.location.is_local:
        return StoredFile(found.size, f"modified {found.modified}")
    with Path(found.location.path).open("rb") as file:
        return StoredFile(found.size, f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}")


def _files(folder: Location) -> dict[str, Entry]:
    """The files below a folder by their path in it, those left out whose path has a name that begins with a dot."""
    from flyte_batch.data.storage import entries

    start = len(folder.path.rstrip("/")) + 1
    found = {each.location.path[start:]: each for each in entries(folder, recursive=True) if each.is_file}
    return {name: each for name, each in found.items() if not any(part.startswith(".") for part in name.split("/"))}


def _sizes(files: Mapping[str, Entry]) -> dict[str, int]:
    return {name: found.size for name, found in files.items()}


def _read_list(folder: Location) -> ModelList | None:
    from flyte_batch.data.storage import explained, read_bytes

    with explained("read", folder):
        try:
            return ModelList.parse(read_bytes(folder.child(LIST_NAME)))
        except FileNotFoundError:
            return None


def _result(target: Location, stored: ModelList, copied: int) -> PrefetchedModel:
    size = sum(file.size for file in stored.files.values())
    return PrefetchedModel(target.uri, stored.source, len(stored.files), size, copied)
