"""What a replica gets, Flyte's code bundle on its image, is all that it needs."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flyte_batch.demo.problems import generate, is_right
from images import cpu_image, vllm_image
from tests.helpers import ROOT, write_jsonl
from tests.image_environments import build_bundle, closure, installed, make_environment, pins, run_in_container, unpack

IMAGES = {"cpu": cpu_image, "vllm": vllm_image}
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.py"))

# What an image does without. Everything else that any module imports must be in it, or in the bundle.
OTHERS_ENGINE = {"cpu": "flyte_batch/engines/vllm", "vllm": "flyte_batch/engines/ctranslate2"}
WITHOUT = {
    "cpu": {"PIL", "jsonschema"},  # pictures and structured answers are vLLM's
    "vllm": set(),
}
NAMES = {"pillow": "PIL", "flyteplugins-vllm": "flyteplugins"}  # of a package, and of its module

IMPORT_ALL = """
import ast, importlib
from pathlib import Path

others_engine, elsewhere = sys.argv[1], set(sys.argv[2:])

def imports(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}:{alias.name}" for alias in child.names)
        yield from imports(child)

missing = []
for path in sorted(Path().rglob("*.py")):
    if str(path).startswith(others_engine):
        continue
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for name in (module, *imports(ast.parse(path.read_text()))):
        if name.split(".")[0].split(":")[0] in elsewhere or name.endswith("__main__"):
            continue
        name, _, attribute = name.partition(":")
        try:
            imported = importlib.import_module(name)
            if attribute and not hasattr(imported, attribute):
                importlib.import_module(f"{name}.{attribute}")
        except ImportError as error:
            missing.append(f"{path} needs {error.name}")
if missing:
    sys.exit("neither in the bundle nor in the image, pin them in images/: " + "; ".join(dict.fromkeys(missing)))
"""
"""Imports every module of a bundle, and all that each of them names in an import statement, at whatever depth."""

RUN = """
from pathlib import Path
import flyte
from flyte._internal.runtime.entrypoints import load_task

resolver = "flyte._internal.resolvers.default.DefaultTaskResolver"
source, output, engine = sys.argv[1:]
load_task(resolver, "mod", "workflows.generate", "instance", "infer_chunk")
main = load_task(resolver, "mod", "workflows.generate", "instance", "main")
flyte.init(root_dir=Path.cwd())
flyte.with_runcontext(mode="local").run(main, source=source, output=output, engine=engine)
"""
"""Finds the tasks as a container does, and runs them: driver, chunk, engine, part, manifest."""


def absent(image: str) -> list[str]:
    """What an image pins and this environment does not have, so that no test here can import it."""
    return [name for name in pins(IMAGES[image]) if not installed(name)]


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Python of an environment with what an image installs, as far as it is installed here."""

    @functools.cache
    def make(image: str) -> Path:
        present = [pin for name, pin in pins(IMAGES[image]).items() if name not in absent(image)]
        return make_environment(tmp_path_factory.mktemp(image) / "venv", closure(present))

    return make


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The archive that Flyte makes of a workflow of this repository."""

    @functools.cache
    def make(workflow: str) -> Path:
        return build_bundle(f"workflows.{workflow}", tmp_path_factory.mktemp(workflow), python=sys.executable)

    return make


Container = Callable[[str], Path]
Bundle = Callable[[str], Path]


def import_all(python: Path, folder: Path, image: str) -> subprocess.CompletedProcess[str]:
    elsewhere = [*(NAMES.get(name, name) for name in absent(image)), *WITHOUT[image]]
    return run_in_container(python, folder, IMPORT_ALL, OTHERS_ENGINE[image], *elsewhere, image=IMAGES[image])


def answer(
    python: Path, folder: Path, tmp_path: Path, *, image: str, engine: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Answer 20 problems with ``workflows/generate.py`` of an unpacked bundle."""
    rows = [{"question": p.question, "answer": p.answer} for p in generate(20, 5)]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    return run_in_container(python, folder, RUN, source, str(output), engine, image=IMAGES[image]), output


def copy_of_the_project(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(ROOT / name, folder / "project" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "project"


@pytest.mark.parametrize(("workflow", "image"), [*((w, "cpu") for w in WORKFLOWS), ("generate", "vllm")])
def test_all_that_a_bundle_imports_however_lazily_is_in_it_or_in_the_image(
    workflow: str, image: str, container: Container, bundle: Bundle, tmp_path: Path
) -> None:
    folder = unpack(bundle(workflow), tmp_path / "replica")
    for path in (*(ROOT / "flyte_batch").rglob("*.py"), ROOT / "workflows" / f"{workflow}.py"):
        assert (folder / path.relative_to(ROOT)).is_file()
    done = import_all(container(image), folder, image)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_what_vllm_brings_is_left_to_be_imported_elsewhere() -> None:
    assert absent("cpu") == []
    assert set(absent("vllm")) <= {"vllm", "transformers", "flyteplugins-vllm", "pillow", "jsonschema"}


def test_a_container_answers_with_the_model_that_the_bundle_carries(
    container: Container, bundle: Bundle, tmp_path: Path
) -> None:
    folder = unpack(bundle("generate"), tmp_path / "replica")
    done, output = answer(container("cpu"), folder, tmp_path, image="cpu", engine="ctranslate2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(output).to_pylist()
    assert sum(is_right(row["response"], row["answer"]) for row in rows) >= 19


def test_a_chunk_needs_nothing_of_the_other_image(container: Container, bundle: Bundle, tmp_path: Path) -> None:
    folder = unpack(bundle("generate"), tmp_path / "replica")
    done, output = answer(container("vllm"), folder, tmp_path, image="vllm", engine="fake")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(output)["response"].null_count == 0


# -- That the tests above would notice --------------------------------------


@pytest.mark.parametrize(("package", "module"), [("async-lru", "async_lru"), ("datasets", "datasets")])
def test_an_image_that_lacks_a_package_is_found(package: str, module: str, bundle: Bundle, tmp_path: Path) -> None:
    present = [found for found in closure(pins(cpu_image).values()) if found.name.lower() != package]
    python = make_environment(tmp_path / "venv", present)
    done = import_all(python, unpack(bundle("gsm8k"), tmp_path / "replica"), "cpu")
    assert done.returncode == 1
    assert "neither in the bundle nor in the image" in done.stderr
    assert f"needs {module};" in done.stderr.replace("\n", ";")


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("flyte_batch/worker.py", "No module named 'flyte_batch.worker'"),
        ("images/__init__.py", "cannot import name 'cpu_image' from 'images'"),
        ("flyte_batch/demo/model/ctranslate2/model.bin", "model.bin"),
    ],
)
def test_a_bundle_that_lacks_a_file_is_found(
    file: str, complaint: str, container: Container, bundle: Bundle, tmp_path: Path
) -> None:
    folder = unpack(bundle("generate"), tmp_path / "replica")
    (folder / file).unlink()
    done, _ = answer(container("cpu"), folder, tmp_path, image="cpu", engine="ctranslate2")
    assert done.returncode == 1
    assert complaint in done.stdout + done.stderr


def test_without_what_the_environments_include_flyte_would_leave_most_of_the_package_out(
    container: Container, tmp_path: Path
) -> None:
    archive = build_bundle("workflows.generate", tmp_path, python=sys.executable, include=False)
    folder = unpack(archive, tmp_path / "replica")
    assert (folder / "flyte_batch" / "environments.py").is_file()
    assert not (folder / "flyte_batch" / "worker.py").exists()
    done, _ = answer(container("cpu"), folder, tmp_path, image="cpu", engine="fake")
    assert "No module named 'flyte_batch" in done.stdout + done.stderr


def test_what_git_ignores_or_does_not_know_yet_is_in_the_bundle_too(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path, "workflows", "images", "flyte_batch")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    (project / ".gitignore").write_text("data/\n*.bin\n")
    (project / "cache").mkdir()
    (project / "cache" / ".gitignore").write_text("*\n")
    folder = unpack(build_bundle("workflows.generate", tmp_path, root=project, python=sys.executable), tmp_path / "one")
    bundled = {path.relative_to(folder) for path in folder.rglob("*")}
    for path in (project / "flyte_batch").rglob("*"):
        assert path.suffix == ".pyc" or path.is_dir() or path.relative_to(project) in bundled


# -- The package installed, not beside the workflow -------------------------


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_an_installed_package_stays_out_of_the_bundle_and_must_be_in_the_image(
    packages: str, container: Container, tmp_path: Path
) -> None:
    project = copy_of_the_project(tmp_path, "workflows", "images")
    with_package = make_environment(tmp_path / "venv", closure(pins(cpu_image).values()))
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # Debian's own Python, which has dist-packages, finds them by a .pth file too.
    (site_packages / "debian.pth").write_text(f"{site_packages.parent / packages}\n")
    shutil.copytree(
        ROOT / "flyte_batch", site_packages.parent / packages / "flyte_batch",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    folder = unpack(build_bundle("workflows.generate", tmp_path, root=project, python=with_package), tmp_path / "one")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} == {
        "workflows/generate.py", "images/__init__.py"
    }  # fmt: skip
    done, output = answer(with_package, folder, tmp_path, image="cpu", engine="ctranslate2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(output)["response"].null_count == 0
    done, _ = answer(container("cpu"), folder, tmp_path, image="cpu", engine="ctranslate2")
    assert "No module named 'flyte_batch'" in done.stdout + done.stderr
