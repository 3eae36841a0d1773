"""Arithmetic word problems in GSM8K's shape, generated: the demonstration model's own kind of question.

A problem is a question in words; its answer is a short working whose last line is ``#### N``, the convention of
GSM8K (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"). Every answer can therefore be checked
with `final_answer` or `is_right`.

What training saw and what it never saw is decided by code, not by chance (`Split`):

- *Number pairs.* Each step of a problem applies an operation to a pair of numbers. A hash of the operation and the
  pair assigns it to one split for ever; a tenth of all pairs belongs to `Split.TEST`. ``7 + 12`` and ``12 + 7`` are
  one pair, as are the two orders of a product. Pairs that are worked out in one step, such as ``6+5``, ``38-8`` or
  ``8*4``, are the tables that everything else is worked out from; they are all training's.
- *Wordings.* A hash of template, name and thing assigns a fifth of their combinations to `Split.TEST`.

A test problem uses test pairs in *every* step and a test wording; a training problem uses none of either, not even in
the intermediate sums of its working (``35-28=15-8=7`` holds the pair of ``15-8``). The same holds for the
drills (bare sums of things) that training mixes in.
"""

from __future__ import annotations

import enum
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


class Split(enum.StrEnum):
    """Which side of the fixed division of problems: seen in training, or never seen."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and its worked answer; the answer's last line is ``#### N``."""

    question: str
    answer: str

    def to_json(self) -> str:
        """The problem as one line of JSON with the keys ``question`` and ``answer``, as in GSM8K's files."""
        return json.dumps({"question": self.question, "answer": self.answer}, ensure_ascii=False)


NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kara", "Liam",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Umar", "Vera", "Will", "Yara", "Zane",
)  # fmt: skip

THINGS = (
    "apples", "balls", "beads", "books", "cards", "coins", "cookies", "cups", "eggs", "flowers", "hats", "keys",
    "lemons", "marbles", "nuts", "pears", "pens", "plates", "rings", "shells", "spoons", "stamps", "stones", "toys",
)  # fmt: skip

_BOXES = ("bags", "boxes", "baskets", "jars")


class _Operation(enum.StrEnum):
    ADD = "+"
    SUBTRACT = "-"
    MULTIPLY = "*"

    def apply(self, a: int, b: int) -> int:
        if self is _Operation.ADD:
            return a + b
        return a - b if self is _Operation.SUBTRACT else a * b


@dataclass(frozen=True, slots=True)
class _Template:
    """A wording: ``{name}``, ``{thing}`` and ``{box}`` are words, ``{a}``, ``{b}``, ``{c}`` the problem's numbers.

    Each step is the beginning of a sentence, an operation and the two symbols it takes (``x`` is the result of the
    first step).
    """

    question: str
    steps: tuple[tuple[str, _Operation, str, str], ...]


_ADD, _SUB, _MUL = _Operation.ADD, _Operation.SUBTRACT, _Operation.MULTIPLY

TEMPLATES = (
    _Template(
        "{name} has {a} {thing}. Then {name} finds {b} more. How many {thing} does {name} have now?",
        (("With those found there are", _ADD, "a", "b"),),
    ),
    _Template(
        "There are {a} {thing} on the table. {name} puts {b} more {thing} there. How many are there in all?",
        (("On the table there are", _ADD, "a", "b"),),
    ),
    _Template(
        "{name} picks {a} {thing} on Monday and {b} {thing} on Tuesday. How many {thing} is that together?",
        (("Both days together make", _ADD, "a", "b"),),
    ),
    _Template(
        "{name} has {a} {thing} and gives {b} of them to a friend. How many {thing} are left?",
        (("After the gift there are", _SUB, "a", "b"),),
    ),
    _Template(
        "A shop has {a} {thing}. {name} buys {b} of them. How many {thing} does the shop still have?",
        (("After the sale the shop has", _SUB, "a", "b"),),
    ),
    _Template(
        "{name} wants {a} {thing} and already has {b}. How many more {thing} does {name} need?",
        (("What is missing is", _SUB, "a", "b"),),
    ),
    _Template(
        "{name} buys {b} {box} of {thing}. Each holds {a} {thing}. How many {thing} does {name} buy?",
        (("All of them hold", _MUL, "a", "b"),),
    ),
    _Template(
        "{name} makes {a} {thing} every day. How many {thing} does {name} make in {b} days?",
        (("In all those days that is", _MUL, "a", "b"),),
    ),
    _Template(
        "{name} has {a} {thing}, gets {b} more and then loses {c}. How many {thing} does {name} have at the end?",
        (("With those received there are", _ADD, "a", "b"), ("Without those lost there are", _SUB, "x", "c")),
    ),
    _Template(
        "A box holds {a} {thing}. {name} takes {b} out and later puts {c} in. How many {thing} does it hold then?",
        (("Without those taken out the box holds", _SUB, "a", "b"), ("With those put in it holds", _ADD, "x", "c")),
    ),
    _Template(
        "{name} fills {b} {box} with {a} {thing} each and keeps {c} more at home. How many {thing} is that in all?",
        (("All that was filled holds", _MUL, "a", "b"), ("With those at home that is", _ADD, "x", "c")),
    ),
    _Template(
        "{name} buys {b} {box} of {a} {thing} and uses {c} of the {thing}. How many {thing} remain?",
        (("What was bought is", _MUL, "a", "b"), ("After use there are", _SUB, "x", "c")),
    ),
)

LARGEST_OPERAND = 99
LARGEST_FACTOR = 9


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8])


def working(operation: str, a: int, b: int) -> tuple[str, str, int, int]:
    """How ``a operation b`` is worked out by tens and ones: (the sum as written, operation and pair of its last step).

    ``27+38=50+15=65``, ``83-47=43-7=36``, ``23*4=80+12=92``; in one step where tens or ones are nothing to speak of, as
    in ``6+5=11``, ``38-8=30``, ``20*4=80``. Written without spaces, as GSM8K's own workings often are.
    """
    if operation == _ADD:
        last, left, right = _ADD, (a - a % 10) + (b - b % 10), a % 10 + b % 10
    elif operation == _SUB:
        last, left, right = _SUB, a - (b - b % 10), b % 10
    else:
        last, left, right = _ADD, (a - a % 10) * b, a % 10 * b
    result = last.apply(left, right)
    if not left or not right or (left, right) == (a, b) or a > LARGEST_OPERAND:
        return f"{a}{operation}{b}={result}", operation, a, b
    return f"{a}{operation}{b}={left}{last.value}{right}={result}", last.value, left, right


@cache
def pair_split(operation: str, a: int, b: int) -> Split:
    """The split that owns the pair ``a operation b``; commutative operations ignore the order."""
    if operation != _SUB:
        a, b = max(a, b), min(a, b)
    if working(operation, a, b)[1:] == (operation, a, b):
        return Split.TRAIN
    return Split.TEST if _hash("pair", operation, a, b) % 10 == 0 else Split.TRAIN


@cache
def wording_split(template: int, name: str, thing: str) -> Split:
    """The split that owns a combination of template (its index in `TEMPLATES`), name and thing."""
    return Split.TEST if _hash("wording", template, name, thing) % 5 == 0 else Split.TRAIN


@cache
def _pairs(operation: _Operation, split: Split, left: int | None, chained: bool) -> tuple[tuple[int, int], ...]:
    """All number pairs of a split. ``left`` fixes the left operand; ``chained`` keeps the result usable as one."""
    lefts = range(1, LARGEST_OPERAND + 1) if left is None else (left,)
    rights = range(2, LARGEST_FACTOR + 1) if operation is _MUL else range(1, LARGEST_OPERAND + 1)
    smallest = 2 if operation is _MUL else 1
    return tuple(
        (a, b)
        for a in lefts
        if a >= smallest
        for b in rights
        if operation.apply(a, b) >= 1
        and (not chained or 2 <= operation.apply(a, b) <= LARGEST_OPERAND)
        and pair_split(operation, a, b) is split
        and (split is Split.TEST or pair_split(*working(operation, a, b)[1:]) is Split.TRAIN)
    )


def _pick(rng: random.Random, pairs: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """One of ``pairs``; a draw of both digit lengths first, so that short operands are not drowned by long ones."""
    short = [pair for pair in pairs if pair[1] < 10]
    return rng.choice(short) if short and rng.random() < 0.4 else rng.choice(pairs)


def make_problem(rng: random.Random, split: Split = Split.TEST) -> Problem:
    """One problem of the split, drawn from ``rng``."""
    while True:
        template_index = rng.randrange(len(TEMPLATES))
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        if wording_split(template_index, name, thing) is split:
            break
    template = TEMPLATES[template_index]
    words: dict[str, object] = {"name": name, "thing": thing, "box": rng.choice(_BOXES)}
    numbers = _draw_numbers(rng, template, split)
    question = template.question.format(**words, **numbers)
    lines, result = [], 0
    for sentence, operation, left, right in template.steps:
        result = operation.apply(numbers[left], numbers[right])
        lines.append(f"{sentence} {working(operation, numbers[left], numbers[right])[0]} {thing}.")
    return Problem(question, "\n".join([*lines, f"#### {result}"]))


def _draw_numbers(rng: random.Random, template: _Template, split: Split) -> dict[str, int]:
    """Numbers for ``a``, ``b``, ``c`` and the first result ``x`` such that every step's pair belongs to the split."""
    while True:
        (_, operation, *_), *rest = template.steps
        a, b = _pick(rng, _pairs(operation, split, None, bool(rest)))
        if not rest:
            return {"a": a, "b": b}
        x = operation.apply(a, b)
        seconds = _pairs(rest[0][1], split, x, False)
        if seconds:
            return {"a": a, "b": b, "x": x, "c": _pick(rng, seconds)[1]}


def make_drill(rng: random.Random) -> Problem:
    """A bare sum of some things from the training split: what training starts with and mixes in."""
    thing = rng.choice(THINGS)
    if rng.random() < 0.2:
        a, b = 10 * rng.randint(10, 81), rng.randint(2, 81)  # the last step of a large product
        return Problem(f"How many {thing}? {a} + {b}", f"{a}+{b}={a + b} {thing}.\n#### {a + b}")
    operation = rng.choice((_ADD, _SUB, _MUL, _MUL))  # products are learnt last
    a, b = _pick(rng, _pairs(operation, Split.TRAIN, None, False))
    result = operation.apply(a, b)
    return Problem(
        f"How many {thing}? {a} {operation.value} {b}", f"{working(operation, a, b)[0]} {thing}.\n#### {result}"
    )


def generate(count: int, seed: int, split: Split = Split.TEST) -> Iterator[Problem]:
    """``count`` problems of a split; the same seed gives the same problems.

    Raises:
        ValueError: if ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"flyte-batch-demo-{split}-{seed}")  # noqa: S311  problems, not secrets
    for _ in range(count):
        yield make_problem(rng, split)


_FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def final_answer(text: str | None) -> str | None:
    """The number after the last ``####`` of an answer, without thousands separators; None where there is none."""
    found = _FINAL.findall(text or "")
    return found[-1].replace(",", "") if found else None


def is_right(response: str | None, answer: str) -> bool:
    """Whether a response ends in the same number as the reference answer (GSM8K's exact-match rule)."""
    expected = final_answer(answer)
    return expected is not None and final_answer(response) == expected
