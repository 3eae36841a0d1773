"""Whose work it is, and which process does it.

The scope travels in a context variable, which batchers read from the context of each caller: what a shared batcher
does for a record is said to be its caller's.
"""

from __future__ import annotations

import contextvars
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from flyte_batch.monitoring.events import Scope

_current: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("flyte_batch_scope", default=None)
_rows: contextvars.ContextVar[Sequence[int] | None] = contextvars.ContextVar("flyte_batch_rows", default=None)


def _no_action() -> tuple[str, str]:
    return "", ""


action_source: Callable[[], tuple[str, str]] = _no_action
"""Gives the names of run and action that the calling code is part of; set by what imports Flyte."""


def _no_context(**texts: str) -> AbstractContextManager[None]:
    return nullcontext()


action_context: Callable[..., AbstractContextManager[None]] = _no_context
"""Has the actions that the calling code starts know these texts; set by what imports Flyte."""

trace_source: Callable[[], object] = lambda: None  # noqa: E731
"""Gives the span that the calling code is part of; set by a tracing backend."""


def new_scope(chunk: str = "", chunk_index: int | None = None) -> Scope:
    """A scope of the calling code's action and span."""
    run, action = action_source()
    return Scope(run, action, chunk, chunk_index, trace_source())


@contextmanager
def scope_entered(scope: Scope) -> Iterator[None]:
    """What is submitted inside belongs to ``scope``."""
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)


def scope_of(context: contextvars.Context) -> Scope:
    """The scope of a caller, whose context nobody is in now."""
    scope = context.get(_current)
    return scope if scope is not None else context.run(new_scope)


@contextmanager
def rows_entered(rows: Sequence[int]) -> Iterator[None]:
    """The records of a call of a batcher's ``map`` inside are made of these rows of the source, in this order."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def row_of(context: contextvars.Context, ticket: object) -> int | None:
    """The row that a caller's record is made of, by its place in the call; None where nobody said so."""
    rows = context.get(_rows)
    return rows[ticket] if rows is not None and isinstance(ticket, int) else None


def process_name() -> str:
    """``host-pid``: tells replicas apart; a container's host name is its pod's."""
    return f"{socket.gethostname()}-{os.getpid()}"
