"""Small datasets and ways to run commands, shared by the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "DO_NOT_TRACK": "1", "COLUMNS": "400", "NO_COLOR": "1"}
FLYTE = str(Path(sys.executable).parent / "flyte")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(path: Path, count: int) -> str:
    """A source of ``count`` rows with the columns id and question."""
    return write_jsonl(path, [{"id": i, "question": f"question {i}"} for i in range(count)])


def flyte_run(
    workflow: str, *options: str, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``flyte run --local workflows/WORKFLOW main ...`` as a user types it."""
    return subprocess.run(
        [FLYTE, "run", "--local", f"workflows/{workflow}", "main", *options],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
