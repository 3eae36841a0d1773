from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flyte
import pytest

from flyte_batch.fingerprint import fingerprint

BASE = """
import re
from functools import lru_cache, wraps
import flyte_batch as fb
TEMPLATE = "{question}"
PROMPT = fb.PromptTemplate("{question}", system="be brief")
SAMPLING = fb.SamplingParameters(max_tokens=5)
PATTERN = re.compile("a+")
STOPS = ["x", "y"]
TABLE = {"one": {1, 2}}
def helper(x):
    return x + 1
class Base:
    def inherited(self):
        return 10
class Rule(Base):
    limit = 3
    names = ["n"]
    def __init__(self, factor=7):
        self.factor = factor
    def apply(self, x):
        return x * 2
    @property
    def doubled(self):
        return 20
    @classmethod
    def made(cls):
        return 30
RULE = Rule(8)
def twice(fn):
    @wraps(fn)
    def wrapper(*args):
        return fn(*args), 40
    return wrapper
@lru_cache
def cached(x):
    return helper(x)
@twice
def decorated(x):
    return x - 50
def ask(row, k=1):
    "A docstring."
    # a comment
    return TEMPLATE, PROMPT, SAMPLING, PATTERN, STOPS, TABLE, [helper(x) for x in row], RULE, cached(k), decorated(k)
"""


def load(text: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"__name__": "user_module"}
    exec(text, names)  # noqa: S102 - the test's own text
    return names["ask"]


def test_a_comment_a_docstring_or_a_blank_line_changes_nothing() -> None:
    changed = BASE.replace("    # a comment\n", "\n\n    # other\n").replace("A docstring.", "Another one.")
    assert fingerprint(load(BASE)) == fingerprint(load(changed))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('TEMPLATE = "{question}"', 'TEMPLATE = "{other}"'), ("be brief", "be long"), ("max_tokens=5", "max_tokens=6"),
        ('"a+"', '"b+"'), ('["x", "y"]', '["x"]'), ("{1, 2}", "{1, 3}"), ("x + 1", "x + 2"), ("return 10", "return 11"),
        ("limit = 3", "limit = 4"), ('["n"]', '["m"]'), ("factor=7", "factor=6"), ("x * 2", "x * 3"),
        ("return 20", "return 21"), ("return 30", "return 31"), ("Rule(8)", "Rule(9)"), (", 40", ", 41"),
        ("return helper(x)", "return helper(x) - 1"), ("x - 50", "x - 51"), ("k=1", "k=2"), ("cached(k)", "cached(0)"),
    ],
)  # fmt: skip
def test_whatever_a_function_uses_of_its_module_counts(old: str, new: str) -> None:
    assert BASE.count(old) == 1
    assert fingerprint(load(BASE)) != fingerprint(load(BASE.replace(old, new)))


def test_a_callable_object_and_a_bound_method_count_with_their_state() -> None:
    class Ask:
        def __init__(self, prompt: str) -> None:
            self.prompt = prompt

        def __call__(self) -> str:
            return self.prompt

    assert fingerprint(Ask("a")) == fingerprint(Ask("a")) != fingerprint(Ask("b"))
    assert fingerprint(Ask("a").__call__) != fingerprint(Ask("b").__call__)


def test_a_variable_that_is_assigned_later_does_no_harm() -> None:
    def ask() -> str:
        return later

    assert fingerprint(ask)
    later = "now"
    assert ask() == "now"


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
        "print(fingerprint(importlib.import_module('workflows.generate').infer_chunk));"
        "print(fingerprint(lambda row, stops={'a', 'b', 'c'}, *, also=frozenset('xyz'): row))"
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
