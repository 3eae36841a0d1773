from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flyte

from flyte_batch.fingerprint import fingerprint

BASE = """
from functools import lru_cache
TEMPLATE = "{question}"
def helper(x):
    return x + 1
class Rule:
    limit = 3
    def apply(self, x):
        return x * 2
@lru_cache
def cached(x):
    return helper(x)
def ask(row, k=1):
    # a comment
    return TEMPLATE, [helper(x) for x in row], Rule().apply(k), cached(k)
"""


def load(text: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"__name__": "user_module"}
    exec(text, names)  # noqa: S102 - the test's own text
    return names["ask"]


def test_a_comment_or_a_blank_line_changes_nothing() -> None:
    assert fingerprint(load(BASE)) == fingerprint(load(BASE.replace("    # a comment\n", "\n\n    # other\n")))


def test_a_changed_body_constant_helper_class_default_or_decorated_function_changes_it() -> None:
    base = fingerprint(load(BASE))
    for old, new in [
        ("{question}", "{other}"), ("x + 1", "x + 2"), ("limit = 3", "limit = 4"), ("x * 2", "x * 3"), ("k=1", "k=2"),
        ("return helper(x)", "return helper(x) - 1"), ("Rule().apply(k)", "Rule().apply(2)"),
    ]:  # fmt: skip
        assert fingerprint(load(BASE.replace(old, new))) != base, (old, new)


def test_closures_and_partials_count() -> None:
    def make(prompt: str) -> Callable[[], str]:
        return lambda: prompt

    assert fingerprint(make("a")) == fingerprint(make("a")) != fingerprint(make("b"))
    assert fingerprint(partial(max, 1, key=abs)) != fingerprint(partial(max, 2, key=abs))


def test_a_flyte_task_is_what_it_wraps() -> None:
    def make(number: int) -> Any:
        @flyte.TaskEnvironment(name=f"env-{number}").task
        async def task(x: int) -> int:
            return x + number

        return task

    assert fingerprint(make(1)) != fingerprint(make(2))


def test_another_process_gives_the_same() -> None:
    program = (
        "import importlib, sys; from flyte_batch.fingerprint import fingerprint;"
        "print(fingerprint(importlib.import_module('workflows.generate').infer_chunk))"
    )
    root = Path(__file__).parent.parent
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, env={"PYTHONHASHSEED": seed, "DO_NOT_TRACK": "1"},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1
