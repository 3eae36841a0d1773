"""Where files are: local paths and object stores behind one small set of calls.

pyarrow's file systems do the work. What is added is what a batch job needs: a file that appears whole or not at all,
and errors that name the path and the operating system's reason.
"""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from flyte_batch.errors import BadInput

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin with a dot are ignored by pyarrow.dataset, Spark, DuckDB globs and by `sources`."""

# Errors that the next attempt gets as well; object stores say theirs in the message.
_LASTING = frozenset((errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP))
_REFUSED = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|HTTP status (401|403|404)|[Pp]ermission denied")

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Location:
    """A file or folder, with the file system that holds it.

    Attributes:
        fs: the pyarrow file system.
        path: the path inside ``fs``.
        scheme: ``s3://`` and the like; empty for local paths.
        query: a URI's query with its question mark (``?region=...``), which every URI made from this one keeps.
    """

    fs: pafs.FileSystem
    path: str
    scheme: str = ""
    query: str = ""

    @property
    def uri(self) -> str:
        """What `locate` turns back into this location, on any machine that sees the same storage."""
        return f"{self.scheme}{self.path}{self.query}"

    @property
    def is_local(self) -> bool:
        return not self.scheme

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Location:
        return self.at(self.path.rstrip("/").rpartition("/")[0] or "/")

    def at(self, path: str) -> Location:
        """Another path of the same file system."""
        return Location(self.fs, path, self.scheme, self.query)

    def child(self, name: str) -> Location:
        return self.at(f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True)
class Entry:
    """One name in a folder; ``size`` in bytes, ``modified`` in seconds since the epoch where the storage knows it."""

    location: Location
    is_file: bool
    size: int
    modified: float | None

    @property
    def name(self) -> str:
        return self.location.name


def locate(path: str | os.PathLike[str]) -> Location:
    """The location of a local path or a URI (``file://``, ``s3://``, ``gs://``, and what else pyarrow.fs knows).

    Raises:
        BadInput: an empty path, a scheme that pyarrow does not know, or credentials inside the URI.
    """
    text = os.fspath(path)
    if not text.strip():
        raise BadInput("an empty path: give a file, a folder, a glob or a URI")
    match = _SCHEME.match(text)
    if match is None:
        return Location(pafs.LocalFileSystem(), os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - not resolved
    authority = text[match.end() :].partition("/")[0]
    if "@" in authority and ":" in authority.partition("@")[0]:
        # The path travels in task inputs, manifests and messages; a secret in it would too.
        raise BadInput(
            f"a {match[0]} URI with a password in it: pass credentials by the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...)"
        )
    base, mark, query = text.partition("?") if match[1] != "file" else (text, "", "")
    # A glob's * and [ are no URI characters; the file system needs only the bucket, the path is ours.
    try:
        if match[1] == "file":
            return Location(pafs.LocalFileSystem(), pafs.FileSystem.from_uri(text)[1])
        bucket = base[match.end() :].partition("/")[0]
        filesystem, _ = pafs.FileSystem.from_uri(f"{match[0]}{bucket}{mark}{query}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"can't open {text}: {reason(error)}; give a local path or a file://, s3:// or gs:// URI"
        ) from error
    return Location(filesystem, base[match.end() :], match[0], mark + query)


def reason(error: BaseException) -> str:
    """Why the system refused, in one line."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return os.strerror(number)
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def explained(what: str, location: Location) -> Iterator[None]:
    """Turns a lasting refusal to ``what`` (``read``, ``list``, ...) into a `BadInput` naming the path.

    Other OSErrors pass: a broken connection is no bad input, and worth a retry.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"no such file or folder: {location}") from error
    except OSError as error:
        if not (error.errno in _LASTING or _REFUSED.search(str(error))):
            raise
        raise BadInput(
            f"can't {what} {location}: {reason(error)}; give this process the right to {what} it or choose another path"
        ) from error


def entry(location: Location) -> Entry | None:
    """What is at ``location``; None if nothing is."""
    with explained("look at", location):
        info = location.fs.get_file_info(location.path)
    return None if info.type == pafs.FileType.NotFound else _entry(location, info)


def entries(folder: Location, *, recursive: bool = False) -> list[Entry]:
    """What is in ``folder``, sorted by path; empty if the folder is missing."""
    selector = pafs.FileSelector(folder.path, allow_not_found=True, recursive=recursive)
    with explained("list", folder):
        infos = folder.fs.get_file_info(selector)
    rooted = folder.path.startswith("/")  # some file systems answer with a slash that was not asked with
    found = [_entry(folder.at(info.path if rooted else info.path.lstrip("/")), info) for info in infos]
    return sorted(found, key=lambda one: one.location.path)


def _entry(location: Location, info: pafs.FileInfo) -> Entry:
    modified = info.mtime_ns
    return Entry(
        location=location,
        is_file=info.type == pafs.FileType.File,
        size=info.size or 0,
        modified=None if modified is None else modified / 1e9,
    )


def open_file(location: Location) -> pa.NativeFile:
    """A file for reading at any offset."""
    with explained("read", location):
        return location.fs.open_input_file(location.path)


def read_range(file: pa.NativeFile, offset: int, length: int) -> bytes:
    """At most ``length`` bytes from ``offset`` on; fewer where the file ends."""
    return bytes(file.read_at(length, offset))  # type: ignore[call-arg]  # the stubs know no offset


def read_bytes(location: Location) -> bytes:
    """A small file's content.

    Raises:
        FileNotFoundError: there is none.
    """
    with location.fs.open_input_file(location.path) as file:
        return bytes(file.read())


def write_atomically(location: Location, data: bytes) -> None:
    """Makes ``data`` the content of ``location``; a reader sees the old content, or all of the new, never a part.

    The bytes go to a unique temporary name in the same folder, then take the final name in one step. On local file
    systems they are flushed to the disk first, so that the promise also holds for a power failure.

    Raises:
        OSError: the system refused (disk full, no permission); nothing of the attempt is left behind.
    """
    temporary = location.parent.child(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        if location.is_local:
            _write_local(temporary.path, data)
            os.replace(temporary.path, location.path)  # noqa: PTH105
            _sync_folder(location.parent.path)
        else:
            with location.fs.open_output_stream(temporary.path) as stream:
                stream.write(data)
            location.fs.move(temporary.path, location.path)
    except BaseException:
        with suppress(OSError):
            delete(temporary)
        raise


def _write_local(path: str, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:  # noqa: PTH123
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it was given
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    # Not every file system can sync a folder (some network mounts); then the rename is as durable as it gets.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete(location: Location) -> None:
    """Deletes a file; one that is gone already (another driver was faster) is fine."""
    with suppress(FileNotFoundError):
        location.fs.delete_file(location.path)


def make_writable_folder(folder: Location) -> None:
    """Creates ``folder`` if it is missing and proves, by writing and deleting a small file, that it takes files.

    Raises:
        BadInput: names the folder and the system's reason.
    """
    remedy = "choose another output folder or change its permissions"
    found = entry(folder)
    if found is not None and found.is_file:
        raise BadInput(f"the output {folder} is a file: choose a folder")
    probe = folder.child(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        folder.fs.create_dir(folder.path, recursive=True)
        write_atomically(probe, b"flyte_batch writes here\n")
        delete(probe)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"can't write to the output folder {folder}: {reason(error)}; {remedy}") from error


def delete_stale_temporaries(found: list[Entry], *, older_than_s: float, now_s: float | None = None) -> int:
    """Deletes what killed writers left among ``found``, and returns how many files that were.

    A file counts as left behind when nobody has written to it for ``older_than_s`` seconds: a part is written in
    seconds, so a writer of another run that is still at work is never disturbed. Age is the one sign that holds across
    machines, containers and object stores, where process ids mean nothing.
    """
    now = time.time() if now_s is None else now_s
    stale = [
        one
        for one in found
        if one.is_file
        and one.name.startswith(TEMPORARY_PREFIX)
        and one.modified is not None
        and now - one.modified > older_than_s
    ]
    for one in stale:
        with suppress(OSError):
            delete(one.location)
    return len(stale)
