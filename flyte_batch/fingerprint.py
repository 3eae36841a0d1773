"""What a function computes, as a hash: a changed prompt, constant or helper makes a run a different one.

The hash covers a function's bytecode and constants, its defaults and closure, and, recursively, what it names in its
own module: functions, classes (with their bases there), constants, containers, dataclasses, compiled patterns, and
objects of the module's own classes with their attributes. Comments, docstrings and line numbers do not count.

What comes from *other* modules counts by name only, and an object of a foreign class (a client, a lock) by its type:
give what matters there as a setting. Another Python minor version may compile differently and then counts as a change:
finished chunks are refused or done again, never mistaken.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
import sys
import types
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
_CODE_HAS_DOCSTRING = 0x4000000  # Python 3.14; before it, a function's first constant is its docstring or None


def fingerprint(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits; equal for equal behaviour within one module and Python minor version.

    Args:
        function: a function, a method, a partial, a callable object or a Flyte task.
    """
    return hashlib.sha256(_Describer(_module_of(function)).describe(function).encode()).hexdigest()[:16]


def _module_of(value: object) -> str | None:
    if isinstance(value, partial):
        return _module_of(value.func)
    inner = _inner(value)
    return _module_of(inner) if inner is not None else getattr(value, "__module__", None)


def _inner(value: object) -> object | None:
    """The function inside a Flyte task or a decorator's object."""
    if isinstance(value, types.FunctionType | types.MethodType | type):
        return None
    found: object | None = getattr(value, "func", None) or getattr(value, "__wrapped__", None)
    return found if callable(found) else None


class _Describer:
    """Turns a value into a text that is the same in every process."""

    def __init__(self, module: str | None) -> None:
        self._module = module
        self._seen: dict[int, object] = {}  # holds the objects, so that an id stays theirs

    def describe(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__}:{value!r}"
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, re.Pattern):
            return f"pattern:{value.pattern!r}:{value.flags}"
        if isinstance(value, types.ModuleType):
            return f"module:{value.__name__}"
        if id(value) in self._seen:
            return "again"
        self._seen[id(value)] = value
        if isinstance(value, tuple | list):
            return f"{type(value).__name__}[{','.join(map(self.describe, value))}]"
        if isinstance(value, set | frozenset):
            return f"set[{','.join(sorted(map(self.describe, value)))}]"
        if isinstance(value, Mapping):
            items = sorted((self.describe(key), self.describe(item)) for key, item in value.items())
            return f"mapping[{items}]"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"method[{self.describe(value.__func__)},{self.describe(value.__self__)}]"
        if isinstance(value, partial):
            return f"partial[{self.describe(value.func)},{self.describe(value.args)},{self.describe(value.keywords)}]"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, property):
            return f"property[{self.describe(value.fget)}]"
        if isinstance(value, staticmethod | classmethod):
            return f"{type(value).__name__}[{self.describe(value.__func__)}]"
        inner = value.func if isinstance(value, cached_property) else _inner(value)
        if inner is not None:
            return f"{type(value).__qualname__}[{self.describe(inner)}]"
        return self._object(value)

    def _function(self, function: types.FunctionType) -> str:
        if function.__module__ != self._module and function.__module__ is not None and not function.__closure__:
            return f"foreign:{function.__module__}.{function.__qualname__}"
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.describe(cell.cell_contents))
            except ValueError:
                cells.append("empty")  # assigned later
        names = sorted(name for name in _names(function.__code__) if name in function.__globals__)
        return "function[" + ";".join(
            (
                self._code(function.__code__),
                self.describe(function.__defaults__),
                self.describe(function.__kwdefaults__),
                *cells,
                *(f"{name}={self.describe(function.__globals__[name])}" for name in names),
            )
        )

    def _class(self, cls: type) -> str:
        if cls.__module__ != self._module:
            return f"foreign:{cls.__module__}.{cls.__qualname__}"
        members = {
            name: member
            for name, member in vars(cls).items()
            if callable(member)
            or isinstance(member, property | staticmethod | classmethod | cached_property)
            or not name.startswith("__")
        }
        return f"class:{cls.__qualname__}[{self.describe(cls.__bases__)},{self.describe(members)}]"

    def _object(self, value: object) -> str:
        kind = self.describe(type(value))
        if dataclasses.is_dataclass(value):
            state: object = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif type(value).__module__ == self._module:
            state = getattr(value, "__dict__", None)
        else:
            state = None
        return f"object[{kind},{self.describe(state)}]"

    def _code(self, code: types.CodeType) -> str:
        constants = list(code.co_consts)
        if sys.version_info >= (3, 14):
            documented = bool(code.co_flags & _CODE_HAS_DOCSTRING)
        else:
            documented = not code.co_name.startswith("<") and bool(constants) and isinstance(constants[0], str)
        if documented:
            constants[0] = None
        inside = (self._code(c) if isinstance(c, types.CodeType) else self._constant(c) for c in constants)
        return f"{code.co_code.hex()},{code.co_names},{code.co_varnames},{','.join(inside)}"

    def _constant(self, value: object) -> str:
        # Constants of code are plain, or tuples and frozensets of plain ones; equal ones may be one object.
        self._seen.pop(id(value), None)
        return self.describe(value)


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
