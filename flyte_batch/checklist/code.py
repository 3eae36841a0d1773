"""What a task's code says: the keyword arguments that it, and the functions that it names, pass on."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

_NOT_THEIRS = ("flyte", "flyte_batch", "flyteplugins")
"""Packages whose own code is not looked into."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """A keyword argument in a call.

    Attributes:
        name: of the argument.
        function: the function that passes it.
        value: what it passes, where that is written there; else `COMPUTED`.
    """

    name: str
    function: str
    value: object


COMPUTED = object()


def keywords(function: Callable[..., object] | None) -> list[Keyword]:
    """Those that a function passes, and those of the functions that it names, as far as their source is there."""
    return [each for user in _reachable(function) for each in _keywords_of(user)]


def _reachable(function: object) -> Iterator[FunctionType]:
    seen: set[int] = set()
    todo = [function]
    while todo:
        each = todo.pop()
        each = inspect.unwrap(each) if callable(each) else each
        if not isinstance(each, FunctionType) or id(each) in seen or each.__module__.split(".")[0] in _NOT_THEIRS:
            continue
        seen.add(id(each))
        yield each
        todo += [each.__globals__.get(name) for name in sorted(_names(each.__code__))]


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _keywords_of(function: FunctionType) -> Iterator[Keyword]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg is not None:
                    yield Keyword(keyword.arg, function.__qualname__, _value(keyword.value))


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED
