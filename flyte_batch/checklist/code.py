"""What a task's code says: the keyword arguments that it, and the functions that it names, pass on."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

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


def names_ours(function: Callable[..., object] | None, names: Set[str]) -> bool:
    """Whether a function, or one that it names, names one of these of flyte_batch: ``fb.run``, or ``run`` imported."""
    return any(_ours(user) & names for user in _reachable(function))


def _ours(function: FunctionType) -> set[str]:
    used = _names(function.__code__)
    found = {name: function.__globals__.get(name) for name in used}
    ours = {
        getattr(value, "__name__", "")
        for value in found.values()
        if isinstance(value, FunctionType | type) and value.__module__.split(".")[0] == "flyte_batch"
    }
    has_module = any(isinstance(value, ModuleType) and value.__name__ == "flyte_batch" for value in found.values())
    return ours | used if has_module or "flyte_batch" in used else ours


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
        todo += _named(each)


def _named(function: FunctionType) -> list[object]:
    """What a function names: globals, and what it takes of the user's own modules among them."""
    names = sorted(_names(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for module in filter(inspect.ismodule, values[:]):
        top, place = module.__name__.split(".")[0], getattr(module, "__file__", None) or ""
        if top not in (*_NOT_THEIRS, *sys.stdlib_module_names) and "site-packages" not in place:
            values += [vars(module)[name] for name in names if name in vars(module)]
    return values


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
