"""What a function computes, as a hash: a changed prompt, constant or helper makes a run a different one.

The hash covers a function's bytecode and constants, its defaults and closure, and, recursively, the functions, classes
and plain constants of *the same module* that it names. Comments, formatting and line numbers do not count. Another
Python minor version may compile differently and then counts as a change: finished chunks are done again, never
mistaken. Code in other modules is not followed; give what matters there as a setting.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from functools import partial
from typing import Any

_PLAIN = (str, bytes, int, float, bool, type(None), tuple, frozenset)


def fingerprint(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits; equal for equal behaviour within one module and Python version."""
    digest = hashlib.sha256()
    _add(function, digest.update, set())
    return digest.hexdigest()[:16]


def _add(value: object, update: Callable[[bytes], None], seen: set[int]) -> None:
    if id(value) in seen:
        return
    if isinstance(value, _PLAIN):
        update(
            f"{type(value).__name__}:{sorted(map(repr, value)) if isinstance(value, frozenset) else value!r};".encode()
        )
        return
    seen.add(id(value))
    if isinstance(value, partial):
        for part in (value.func, *value.args, *(x for item in sorted(value.keywords.items()) for x in item)):
            _add(part, update, seen)
        return
    wrapped = getattr(value, "func", None) or getattr(value, "__wrapped__", None)  # a Flyte task, a decorated function
    if callable(wrapped):
        _add(wrapped, update, seen)
    elif isinstance(value, types.MethodType):
        _add(value.__func__, update, seen)
    elif isinstance(value, types.FunctionType):
        _add_code(value.__code__, update)
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            _add(default, update, seen)
        for cell in value.__closure__ or ():
            _add(cell.cell_contents, update, seen)
        for name in sorted(_names(value.__code__)):
            if name in value.__globals__:
                named = value.__globals__[name]
                if isinstance(named, _PLAIN) or getattr(named, "__module__", None) == value.__module__:
                    update(name.encode())
                    _add(named, update, seen)
    elif isinstance(value, type):
        for name, member in sorted(vars(value).items()):
            if callable(member) or (isinstance(member, _PLAIN) and not name.startswith("__")):
                update(name.encode())
                _add(member, update, seen)
    elif type(value).__repr__ is not object.__repr__:  # an object's default repr holds its address
        update(repr(value).encode())


def _add_code(code: types.CodeType, update: Callable[[bytes], None]) -> None:
    update(code.co_code)
    update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(constant, update)
        else:
            _add(constant, update, set())


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
