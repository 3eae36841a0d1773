"""Imports go one way, importing is cheap, and the public names are what they are said to be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flyte_batch as fb
from tests.helpers import ENVIRONMENT, ROOT

PACKAGE = ROOT / "flyte_batch"
LEAVES = {"records", "errors"}

# room -> rooms that it may import from (beside itself and the leaves): the table of docs/structure.md
ALLOWED: dict[str, set[str]] = {
    "records": set(),
    "errors": set(),
    "cores": set(),
    "replica": set(),
    "processes": set(),
    "guard": {"monitoring", "processes", "replica"},
    "planning": set(),
    "versions": set(),
    "histograms": set(),
    "progress": {"monitoring", "report"},
    "report": {"data", "histograms", "monitoring", "planning"},
    "flyte_ui": {"monitoring", "report"},
    "fingerprint": set(),
    "singletons": {"guard", "monitoring", "replica"},
    "checklist": {"load", "monitoring", "replica", "report"},
    "load": {
        "batching", "cores", "data", "demo", "engines", "histograms", "monitoring", "options", "pipeline", "progress",
        "prompts", "replica", "report", "versions",
    },
    "cli": {"batching", "checklist", "data", "engines", "load", "monitoring", "report", "singletons"},
    "environments": {"flyte_ui", "monitoring", "replica"},
    "options": set(),
    "prompts": set(),
    "pipeline": {"cores"},
    "data": {"histograms"},
    "demo": {"data"},
    "device_calls": set(),
    "engines": {"cores", "demo", "device_calls", "processes"},
    "monitoring": {"histograms"},
    "batching": {"device_calls", "engines", "monitoring"},
    "worker": {"batching", "data", "guard", "monitoring", "pipeline", "prompts"},
    "warming": {"batching", "data", "worker"},
    "model_store": {"data", "engines"},
    "driver": {"data", "fingerprint", "monitoring", "planning", "progress", "replica", "report", "versions"},
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Dotted names that a module imports, lazily or not; those under TYPE_CHECKING included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "flyte_batch")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def rooms_imported_by(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("flyte_batch.")} - {room_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    leaves = LEAVES if room not in LEAVES else set()
    assert rooms_imported_by(path) <= ALLOWED[room] | leaves


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_may_import_no_more_than_it_does(room: str) -> None:
    imported = set().union(*(rooms_imported_by(path) for path in MODULES if room_of(path) == room))
    assert ALLOWED[room] <= imported


def test_only_the_wiring_and_the_commands_import_flyte_and_only_data_imports_pyarrow() -> None:
    users: dict[str, set[str]] = {library: set() for library in ("flyte", "pyarrow")}
    for path in MODULES:
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in users:
                users[top].add(room_of(path))
    assert users["flyte"] <= {"environments", "flyte_ui", "cli"}
    assert users["pyarrow"] == {"data"}


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


HEAVY = {"flyte", "pyarrow", "torch", "ctranslate2", "tokenizers", "vllm", "datasets", "transformers", "numpy"}


def test_importing_the_package_or_a_chunk_loads_nothing_heavy() -> None:
    assert not loaded_by("import flyte_batch") & HEAVY
    assert not loaded_by("import flyte_batch as fb; fb.Chunk, fb.DynamicBatcher, fb.FakeEngine, fb.infer") & HEAVY


def test_every_public_name_can_be_reached_and_is_declared_for_type_checkers() -> None:
    for name in fb.__all__:
        assert getattr(fb, name).__name__ == name
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == set(fb.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = fb.nope  # type: ignore[attr-defined]
