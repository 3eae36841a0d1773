"""Large files, copied piece by piece: a copy appears whole or not at all."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flyte_batch.data.storage import TEMPORARY_PREFIX, Location, delete, entry, open_file

PIECE_BYTES = 16 << 20


class Stopped(Exception):
    """Somebody asked for the end of the work."""


def copy_file(source: Location, target: Location, size: int, stop: threading.Event) -> None:
    """Make ``target`` a copy of ``source``, in the memory of a few pieces.

    On a disk the copy is written under a temporary name. In an object store it is uploaded under its own: an object
    can't be seen before its upload is completed, and S3 refuses to rename one of more than 5 GB.

    Args:
        size: bytes of the source.
        stop: looked at before every piece.

    Raises:
        OSError: it cannot be read or written, or the source is not ``size`` bytes long (any more).
        Stopped: ``stop`` was set.
    """
    if stop.is_set():
        raise Stopped
    if target.is_local:
        _write(source, target, size, stop)
    else:
        _upload(source, target, size, stop)


def _write(source: Location, target: Location, size: int, stop: threading.Event) -> None:
    folder = target.parent
    folder.fs.create_dir(folder.path, recursive=True)
    temporary = folder.child(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(temporary.path, "xb") as file:  # noqa: PTH123
            _copy_pieces(source, size, file.write, stop)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary.path, target.path)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            delete(temporary)
        raise


def _upload(source: Location, target: Location, size: int, stop: threading.Event) -> None:
    stream = target.fs.open_output_stream(target.path)
    try:
        _copy_pieces(source, size, stream.write, stop)
    except BaseException:
        # pyarrow can't abandon an upload: closing completes it with what there is, and so does forgetting it.
        with suppress(OSError):
            stream.close()
            found = entry(target)
            if found is not None and found.size != size:  # another process may have put the whole file there meanwhile
                delete(target)
        raise
    stream.close()


def _copy_pieces(source: Location, size: int, write: Callable[[Any], Any], stop: threading.Event) -> None:
    copied = 0
    with open_file(source) as file:
        while (piece := file.read_buffer(PIECE_BYTES)).size:
            if stop.is_set():
                raise Stopped
            write(piece)
            copied += piece.size
    if copied != size:
        raise OSError(f"{source} is {copied} bytes long and was {size}: it changed while it was copied")
