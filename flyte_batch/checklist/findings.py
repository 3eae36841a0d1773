"""What a check found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flyte_batch.errors import BadInput

Status = Literal["ok", "missing", "not applicable", "could not tell", "accepted"]
"""``accepted`` is what is missing for a reason that somebody gave."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found about one thing.

    Attributes:
        check: ``area.name``, such as ``limits.retries``.
        subject: the environment, task or trigger that was looked at; "" for the workflow as a whole.
        status: see `Status`.
        evidence: what was found.
        remedy: what to do about it, "" where nothing is to be done.
    """

    check: str
    subject: str
    status: Status
    evidence: str
    remedy: str = ""

    @property
    def area(self) -> str:
        return self.check.partition(".")[0]


def accept(findings: Iterable[Finding], reasons: Mapping[str, str]) -> list[Finding]:
    """The same findings, those that are missing for a reason marked as accepted.

    Args:
        findings: of all checks.
        reasons: ``check`` or ``check:subject`` -> why it may be missing.

    Raises:
        BadInput: a reason for what no check looks at.
    """
    found = list(findings)
    checks = sorted({each.check for each in found})
    for name in reasons:
        check = name.partition(":")[0]
        of_it = sorted(f"{each.check}:{each.subject}" for each in found if each.check == check and each.subject)
        if name not in (*checks, *of_it):
            known = of_it or checks
            close = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise BadInput(f"--accept {name}: there is no such check here. {hint}These are:\n  " + "\n  ".join(known))
    return [_accepted(each, reasons) if each.status == "missing" else each for each in found]


def _accepted(finding: Finding, reasons: Mapping[str, str]) -> Finding:
    reason = reasons.get(f"{finding.check}:{finding.subject}") or reasons.get(finding.check)
    if not reason:
        return finding
    return replace(finding, status="accepted", evidence=f"{finding.evidence}; accepted: {reason}", remedy="")
