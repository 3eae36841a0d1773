"""The table of faults and outcomes in ``docs/reliability.md``: a row for every passed test that is marked ``fault``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.helpers import ROOT

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by make reliability -->\n", "<!-- until here -->\n"
HEADER = (
    "| what breaks | what happens | rows | of them failed | attempts repeated | seconds |\n|---|---|---|---|---|---|\n"
)

OUTCOMES = pytest.StashKey[dict[str, "Outcome"]]()
SKIPPED = pytest.StashKey[dict[str, str]]()
"""In pytest's stash, by test: what those that passed saw, and how the rows of those begin that can't be run here."""


@dataclass(frozen=True)
class Outcome:
    """What one test saw.

    Attributes:
        fault: what broke.
        told: what happens then, as the test asserts it.
        rows: rows of the output, each there exactly once.
        failures: those of them without a response.
        repeated: attempts of chunks that ended badly.
        seconds: from start to end, with the start of the containers.
    """

    fault: str
    told: str
    rows: int
    failures: int
    repeated: int
    seconds: float

    @property
    def line(self) -> str:
        return f"{self.lasting} {self.repeated} | {self.seconds:.0f} |\n"

    @property
    def lasting(self) -> str:
        """The part of the line that is alike in every run."""
        return f"{beginning(self.fault, self.told)} {self.rows:,} | {self.failures} |"


def table(outcomes: list[Outcome]) -> str:
    return HEADER + "".join(outcome.line for outcome in outcomes)


def write(outcomes: list[Outcome]) -> None:
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}")


def beginning(fault: str, told: str) -> str:
    return f"| {fault} | {told} |"


def missing(outcomes: list[Outcome], skipped: tuple[str, ...]) -> list[str]:
    """Lines that the document lacks, or has too many: they start with + and -. Those that begin so may be in it."""
    within = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip().removeprefix(HEADER)
    known = [line.rsplit("|", 3)[0].rstrip() + " |" for line in within.splitlines()]
    seen = [outcome.lasting for outcome in outcomes]
    return [f"+ {line}" for line in seen if line not in known] + [
        f"- {line}" for line in known if line not in seen and not line.startswith(skipped)
    ]
