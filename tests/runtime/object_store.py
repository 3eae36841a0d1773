"""An S3 store on this machine: moto's server, behind a piece that breaks requests by rule."""

from __future__ import annotations

import fnmatch
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIEnvironment

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
ACCESS_KEY, SECRET_KEY = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"

REFUSALS = {
    "SlowDown": (503, "Please reduce your request rate."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "AccessDenied": (403, "Access Denied"),
}
"""What a store answers instead of doing as it was asked: S3's code, its HTTP status and its message."""

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
    "<RequestId>79104EXAMPLEB723</RequestId><HostId>IOWQ4fDEXAMPLEQM+ey7N9WgVhSnQ6JEXAMPLEZb7hSQDASK+Jd1vEXAMPLEa3Km"
    "</HostId></Error>"
)

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@dataclass(frozen=True)
class Request:
    """One request to the store.

    Attributes:
        method: of HTTP.
        key: of the object; of a listing its prefix.
        port: of the client's end of the connection.
    """

    method: str
    key: str
    port: int


@dataclass
class Fault:
    """A rule that breaks requests.

    Attributes:
        kind: one of `REFUSALS`; ``reset``: the store does as it was asked, and the connection is reset in the middle
            of its answer; ``stall``: nothing happens, and there is no answer.
        methods: of the requests that it is about.
        keys: pattern of their keys.
        every: which of them are broken: all, every second, every third, ...
        times: how many at most; None for no end.
        broken: those that were.
    """

    kind: str
    methods: Sequence[str] = METHODS
    keys: str = "*"
    every: int = 1
    times: int | None = None
    broken: list[Request] = field(default_factory=list)
    _seen: int = 0
    _mended: threading.Event = field(default_factory=threading.Event)
    _struck: threading.Condition = field(default_factory=threading.Condition)

    def mend(self) -> None:
        self._mended.set()

    def wait_for(self, requests: int) -> None:
        """Until so many requests were broken."""
        with self._struck:
            self._struck.wait_for(lambda: len(self.broken) >= requests)

    def wait(self) -> None:
        """Until it is mended."""
        self._mended.wait()

    def breaks(self, request: Request) -> bool:
        if self._mended.is_set() or request.method not in self.methods or not fnmatch.fnmatch(request.key, self.keys):
            return False
        self._seen += 1
        if self._seen % self.every or len(self.broken) == self.times:
            return False
        with self._struck:
            self.broken.append(request)
            self._struck.notify_all()
        return True


class ObjectStore:
    """See the module's text. Use it as a context manager.

    Attributes:
        requests: all so far.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()  # moto has none of its own
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> ObjectStore:
        s3_backends.reset()
        self._s3 = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._s3.create_bucket(BUCKET, "us-east-1")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for fault in self._faults:
            fault.mend()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """The environment variables by which a process finds the store and gets in."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def add(self, fault: Fault) -> Fault:
        """Break requests from now on; the first of several rules that is about a request counts."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def put(self, key: str, content: bytes) -> None:
        with self._lock:
            self._s3.put_object(BUCKET, key, content)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What is there, by key, unseen by the faults."""
        with self._lock:
            keys = self._s3.buckets[BUCKET].keys
            return {key: keys[key].value for key in sorted(keys) if key.startswith(prefix)}

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").removeprefix("/")
        listed = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0]
        request = Request(environ["REQUEST_METHOD"], key or listed, int(environ["REMOTE_PORT"]))
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.breaks(request)), None)
        if fault is not None and fault.kind == "stall":
            fault.wait()
            return _broken_off(environ["werkzeug.socket"], b"")
        if fault is not None and fault.kind != "reset":
            status, message = REFUSALS[fault.kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} {fault.kind}", [("Content-Type", "application/xml")])
            return [_ERROR.format(code=fault.kind, message=message).encode()]
        with self._lock:
            body = b"".join(self._app(environ, start_response))
        return [body] if fault is None else _broken_off(environ["werkzeug.socket"], body)


def _broken_off(connection: socket.socket, body: bytes) -> Iterator[bytes]:
    if body:
        yield body[: len(body) // 2]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no orderly end
    connection.close()


class _Handler(WSGIRequestHandler):
    """Keeps connections open between requests, as S3 does, and quiet."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass
