"""Events as JSON lines, for Loki, CloudWatch, or ``jq``.

Each line is one flat object, because these tools filter by fields at the top and lose what lies in lists. A batch of a
shared batcher serves several actions, so `BatchDone` becomes a line for each caller: all that a run did is found by its
own name, ``{app="solver"} | json | run="r7x2"`` in Loki, ``filter action = "a1"`` in CloudWatch Logs Insights.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, TextIO, get_args

from flyte_batch.errors import MESSAGE_CHARS, BadInput
from flyte_batch.monitoring.events import (
    BatchDone,
    BatchFormed,
    ChunkFailed,
    ChunkReported,
    EngineDied,
    EngineLoaded,
    Event,
    LoopBlocked,
    RecordFailed,
    RecordsSubmitted,
    RunEnded,
    Scope,
)
from flyte_batch.monitoring.scope import process_name

Level = Literal["debug", "info", "warning", "error"]

_LEVELS: tuple[str, ...] = get_args(Level)
_LEVEL_OF: dict[type[Event], Level] = {
    RecordsSubmitted: "debug",
    BatchFormed: "debug",
    BatchDone: "debug",
    RecordFailed: "warning",
    LoopBlocked: "warning",
    ChunkFailed: "error",
    EngineDied: "error",
}
_NOWHERE = Scope()
_encode = json.JSONEncoder(default=dict).encode  # a mapping that is no dict, such as the causes of failures


class JsonLogs:
    """Writes a JSON line an event, and one a caller for `BatchDone`.

    Every line has ``event`` (the class in snake case), ``time`` (RFC 3339, UTC), ``level``, ``run``, ``action``,
    ``chunk``, ``chunk_index``, ``replica`` (host and process id), ``batcher`` and ``batch``; what an event has nothing
    to do with is "" or null. The event's own fields follow under their names. In a line of `BatchDone`, ``records``,
    ``failed`` and ``cost`` are the caller's, so that they add up over lines; the whole batch's are ``batch_records``,
    ``batch_failed`` and ``batch_cost``, the same in each of its lines; the caller's latencies are
    ``latency_mean`` and ``latency_max`` in seconds. A batch that is split and tried again is one line, of nobody, with
    ``records`` 0.

    Prompts, responses and rows are in no event. Messages of errors are: code of yours that quotes rows in its errors
    wants ``message_chars=0``.

    Args:
        stream: takes the lines; by default what ``sys.stderr`` is when an event comes.
        level: leave out what is below: ``info`` does without submitted records and batches, of which there may be
            hundreds a second, ``warning`` is failures only.
        message_chars: cut messages of errors to so many characters; 0 leaves them out.

    Raises:
        BadInput: an option that cannot work.
    """

    def __init__(
        self, stream: TextIO | None = None, *, level: Level = "debug", message_chars: int = MESSAGE_CHARS
    ) -> None:
        if level not in _LEVELS:
            raise BadInput(f"level must be one of {', '.join(_LEVELS)}, got {level!r}")
        if message_chars < 0:
            raise BadInput(f"message_chars must not be negative, got {message_chars}; 0 leaves messages out")
        self._stream = stream
        self._least = _LEVELS.index(level)
        self._message_chars = message_chars
        self._lock = threading.Lock()

    def on_event(self, event: Event) -> None:
        """Write the event's lines, with one call.

        Raises:
            OSError, ValueError: the stream takes nothing: a full disk, a closed file.
        """
        if not self._is_wanted(_level(event)):
            return
        lines = (line for line in self._lines(event) if self._is_wanted(line["level"]))
        text = "".join(_encode(line) + "\n" for line in lines)
        stream = self._stream if self._stream is not None else sys.stderr
        with self._lock:
            stream.write(text)
            stream.flush()

    def _is_wanted(self, level: Level) -> bool:
        return _LEVELS.index(level) >= self._least

    def _lines(self, event: Event) -> Iterator[dict[str, Any]]:
        names = (each.name for each in fields(event))
        own = {name: getattr(event, name) for name in names if name not in ("at", "scope", "shares")}
        message = own.get("message")
        if message is not None:
            own["message"] = message[: self._message_chars]
        head: dict[str, Any] = {
            "event": _snake_case(type(event).__name__),
            "time": _rfc3339(event.at),
            "level": _level(event),
        }
        if not isinstance(event, BatchDone):
            yield head | _whose(getattr(event, "scope", _NOWHERE)) | own
            return
        own |= {"batch_records": event.records, "batch_failed": event.failed, "batch_cost": event.cost}
        for share in event.shares:
            count = sum(number for _, number in share.latencies)
            total = sum(latency * number for latency, number in share.latencies)
            yield (
                head
                | _whose(share.scope)
                | own
                | {
                    "level": "warning" if share.failed else "debug",
                    "records": share.records,
                    "failed": share.failed,
                    "cost": share.cost,
                    "latency_mean": round(total / count, 6) if count else None,
                    "latency_max": round(max((latency for latency, _ in share.latencies), default=0.0), 6),
                }
            )
        if not event.shares:
            yield head | _whose(_NOWHERE) | own | {"records": 0, "failed": 0, "cost": 0}


def _level(event: Event) -> Level:
    if isinstance(event, EngineLoaded | ChunkReported | RunEnded) and event.error:
        return "error"
    if isinstance(event, BatchDone) and (event.failed or event.out_of_memory):
        return "warning"
    return _LEVEL_OF.get(type(event), "info")


@cache
def _snake_case(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _whose(scope: Scope) -> dict[str, Any]:
    return {
        "run": scope.run,
        "action": scope.action,
        "chunk": scope.chunk,
        "chunk_index": scope.chunk_index,
        "replica": process_name(),
        "batcher": "",
        "batch": None,
    }
