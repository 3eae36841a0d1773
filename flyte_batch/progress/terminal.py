"""What lines and views are written to."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    """Whether it writes to a terminal itself; what only says so, as a text user interface's capture, does not."""
    try:
        return os.isatty(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return False


class Forgiving(io.TextIOBase):
    """A stream that fails for no reason: a closed terminal, or one that lacks a letter, must not cost a run.

    Args:
        stream: what it writes to; None, which ``sys.stdout`` is in a process without one, takes all and shows nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
