"""Every code block of README and docs runs, in order, in one folder per document, as a reader would type it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flyte_batch.demo.problems import generate
from tests.helpers import ENVIRONMENT, ROOT, write_jsonl

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(document.read_text())


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: str(d.relative_to(ROOT)))
def test_every_code_block_runs(document: Path, tmp_path: Path) -> None:
    for name in ("workflows", "images", "flyte_batch", "benchmarks", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name if name != ".venv" else Path(sys.prefix))
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out" / "problems.jsonl", [{"question": p.question} for p in generate(200, 3)])
    for number, (language, text) in enumerate(blocks(document)):
        if language == "python":
            file = tmp_path / f"block_{number}.py"
            file.write_text(text)
            run(["python", str(file)], tmp_path)
        else:
            assert language == "bash", f"a block in {language} is run by nobody"
            for line in text.replace("\\\n", " ").splitlines():
                command = shlex.split(line.partition("#")[0])
                if command and command[0] == "make":
                    assert line in (ROOT / ".ci" / "run").read_text(), f"CI does not run {line!r}"
                elif command:
                    run(command, tmp_path)


def run(command: list[str], folder: Path) -> None:
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(document: Path) -> None:
    prose = BLOCK.sub("", document.read_text())
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
        assert (document.parent / target).exists(), target


def test_every_make_target_of_the_readme_and_ci_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in ((ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()):
        for target in re.findall(r"^make ([\w-]+)$", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
