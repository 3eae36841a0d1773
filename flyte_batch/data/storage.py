"""Where files are: local paths and object stores behind one small set of calls.

pyarrow's file systems do the work. What is added is what a batch job needs: a file that appears whole or not at all,
errors that name the path and the system's reason, and patience with an S3 store that is busy or away for a moment.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote

import pyarrow as pa
from pyarrow import fs as pafs

from flyte_batch.errors import BadInput

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin with a dot are ignored by pyarrow.dataset, Spark, DuckDB globs and by `sources`."""

S3_ATTEMPTS = 7
"""Of a request that S3 answers with "slow down", with an error of its own, or not at all. Between them lie up to 1, 2,
4, 8, 16 and 20 seconds, half of that on average: less than it takes to make a chunk's answers again."""

S3_REQUEST_TIMEOUT_S = 10.0
"""Seconds without a byte until a request to S3 counts as lost; pyarrow's own 3 are too few for a store under load."""

S3_CONNECT_TIMEOUT_S = 5.0

_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_SWITCHES = (
    "allow_bucket_creation",
    "allow_bucket_deletion",
    "allow_delayed_open",
    "anonymous",
    "background_writes",
    "check_directory_existence_before_creation",
    "force_virtual_addressing",
)
_SWITCHED = {"true": True, "1": True, "false": False, "0": False}

# pyarrow puts the text of S3's error where the bytes should go. If it is longer than they are, as it is for a Parquet
# file's first four, the read fails at once, and is not tried again.
_SHORTEST_READ = 4096

# pyarrow's names of the file systems where a file appears when its upload is complete, in place of the old one.
_FILES_APPEAR_WHOLE = frozenset(("s3", "gcs"))

# Errors that the next attempt gets as well; object stores say theirs in the message.
_LASTING = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
)
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|HTTP status (401|403|404)|"
    r"Bucket '.*' not found|[Pp]ermission denied"
)

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
        BadInput: an empty path, a scheme that pyarrow does not know, an option of a URI that it does not know, a
            ``file://`` URI with a host, or credentials inside the URI.
        OSError: the region of an S3 bucket could not be found out for now.
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
    if match[1] == "file":
        if authority not in ("", "localhost"):
            raise BadInput(f"{text} names a host, {authority}: write three slashes, as in file:///mnt/folder")
        # Not by pyarrow, to which a glob's ? begins a query, and a * or [ or space is an error.
        path = unquote(text[match.end() + len(authority) :])
        return Location(pafs.LocalFileSystem(), os.path.abspath(path or "/"))  # noqa: PTH100 - not resolved
    base, mark, query = text.partition("?")
    # A glob's * and [ are no URI characters; the file system needs only the bucket, the path is ours.
    bucket = base[match.end() :].partition("/")[0]
    try:
        if match[1] == "s3":
            filesystem: pafs.FileSystem = _s3(base, bucket, query)
        else:
            filesystem, _ = pafs.FileSystem.from_uri(f"{match[0]}{bucket}{mark}{query}")
    except BadInput:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise BadInput(
            f"can't open {text}: {reason(error)}; give a local path or a file://, s3:// or gs:// URI"
        ) from error
    except OSError as error:
        raise _named(error, "open", text) from error
    return Location(filesystem, base[match.end() :], match[0], mark + query)


def _s3(base: str, bucket: str, query: str) -> pafs.S3FileSystem:
    """The file system of an S3 URI. pyarrow's own way from a URI to one takes no timeouts and no retries."""
    # Up to 10 MB go in one request if the opening of a file is delayed.
    options: dict[str, str | bool] = {"allow_delayed_open": True}
    for name, value in parse_qsl(query):
        if name in _S3_TEXTS:
            options[name] = value
        elif name not in _S3_SWITCHES:
            raise BadInput(
                f"{base} with the option {name!r}: known are {', '.join(_S3_TEXTS + _S3_SWITCHES)}; credentials come "
                "from the environment (AWS_ACCESS_KEY_ID, ...)"
            )
        elif value.lower() not in _SWITCHED:
            raise BadInput(f"{base} with the option {name}={value}: give true or false")
        else:
            options[name] = _SWITCHED[value.lower()]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    if "endpoint_override" not in options and "region" not in options:
        options["region"] = pafs.resolve_s3_region(bucket)
    return _s3_filesystem(tuple(sorted(options.items())))


@functools.cache
def _s3_filesystem(options: tuple[tuple[str, str | bool], ...]) -> pafs.S3FileSystem:
    # One for all files: its connections stay open, and so do the credentials that it fetched.
    return pafs.S3FileSystem(
        **dict(options),  # type: ignore[arg-type]
        request_timeout=S3_REQUEST_TIMEOUT_S,
        connect_timeout=S3_CONNECT_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )


def reason(error: BaseException) -> str:
    """Why the system refused, in one line."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return os.strerror(number)
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def explained(what: str, location: Location) -> Iterator[None]:
    """Turns a lasting refusal to ``what`` (``read``, ``list``, ...) into a `BadInput` naming the path.

    Other errors stay of their class, because a broken connection is no bad input and worth a retry, and get the path.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"no such file or folder: {location}") from error
    except OSError as error:
        raise _named(error, what, location) from error


def _named(error: OSError, what: str, location: Location | str) -> BadInput | OSError:
    """The error with the path in it: pyarrow names a key at best, and Python nothing once a file is open."""
    text = f"can't {what} {location}: {reason(error)}"
    if error.errno in _LASTING or _REFUSED.search(str(error)):
        return BadInput(f"{text}; give this process the right to {what} it or choose another path")
    return OSError(text) if error.errno is None else OSError(error.errno, text)


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
    start = max(0, min(offset, file.size() - _SHORTEST_READ))
    length += offset - start
    data = file.read_at(max(length, _SHORTEST_READ), start)  # type: ignore[call-arg]  # the stubs know no offset
    return bytes(data[offset - start : length])


def read_bytes(location: Location) -> bytes:
    """A small file's content.

    Raises:
        FileNotFoundError: there is none.
        BadInput: it may not be read.
        OSError: any other trouble; names the path.
    """
    try:
        with location.fs.open_input_file(location.path) as file:
            return bytes(file.read())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _named(error, "read", location) from error


def write_atomically(location: Location, data: bytes) -> None:
    """Makes ``data`` the content of ``location``; a reader sees the old content, or all of the new, never a part.

    On S3 and Google's store the upload does that by itself. Elsewhere the bytes go to a unique temporary name in the
    same folder, then take the final name in one step; on local file systems they are flushed to the disk first, so that
    the promise also holds for a power failure. A link's target is what gets the content. What is there and no regular
    file, a device or a pipe, stays what it is, and is written to as it is.

    Raises:
        BadInput: this process may not write there, or the folder is gone.
        OSError: any other trouble (disk full, a store that is away); names the path. Nothing visible is left behind.
    """
    with explained("write", location):
        _write(location, data)


def _write(location: Location, data: bytes) -> None:
    if location.fs.type_name in _FILES_APPEAR_WHOLE:
        # No "with": left by an exception, it would close the stream, and what was uploaded so far would be the file.
        stream = location.fs.open_output_stream(location.path)
        stream.write(data)
        stream.close()
        return
    if location.is_local:
        location = location.at(os.path.realpath(location.path))
        target = Path(location.path)
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
            return
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
        with suppress(OSError, BadInput):
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
    """Deletes a file; one that is gone already (another driver was faster) is fine.

    Raises:
        BadInput: it may not be deleted.
        OSError: any other trouble; names the path.
    """
    with explained("delete", location), suppress(FileNotFoundError):
        location.fs.delete_file(location.path)


def make_writable_folder(folder: Location) -> None:
    """Creates ``folder`` if it is missing and proves, by writing and deleting a small file, that it takes files.

    Raises:
        BadInput: names the folder and the system's reason.
    """
    remedy = "choose another output folder, or see to its permissions and its free space"
    found = entry(folder)
    if found is not None and found.is_file:
        raise BadInput(f"the output {folder} is a file: choose a folder")
    probe = folder.child(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        folder.fs.create_dir(folder.path, recursive=True)
        _write(probe, b"flyte_batch writes here\n")
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
        with suppress(OSError, BadInput):
            delete(one.location)
    return len(stale)
