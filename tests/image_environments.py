"""What an image's containers have, without Docker: a virtual environment with exactly the packages that it installs.

They are linked from this environment, whose versions the pins must equal; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import flyte
from flyte._image import Env, Layer, PipPackages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ENVIRONMENT, ROOT


def layers(image: flyte.Image) -> tuple[Layer, ...]:
    return image._layers


def pins(image: flyte.Image) -> dict[str, Requirement]:
    """What the image installs by name: canonical name -> requirement."""
    requirements = [
        Requirement(package)
        for layer in layers(image)
        if isinstance(layer, PipPackages)
        for package in layer.packages or ()
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def env_vars(image: flyte.Image) -> dict[str, str]:
    return {key: value for layer in layers(image) if isinstance(layer, Env) for key, value in layer.env_vars}


def installed(name: str) -> bool:
    """Whether a distribution is installed in this environment."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def closure(requirements: Iterable[Requirement]) -> list[Distribution]:
    """The distributions that pip would install for the requirements, as they are installed here.

    Raises:
        AssertionError: one is installed here in another version than required.
        importlib.metadata.PackageNotFoundError: one is not installed here.
    """
    found: dict[str, Distribution] = {}
    todo = list(requirements)
    done: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        package = found.setdefault(name, distribution(name))
        assert requirement.specifier.contains(package.version, prereleases=True), f"{requirement}: {package.version}"
        for extra in ("", *requirement.extras):
            if (name, extra) in done:
                continue
            done.add((name, extra))
            for line in package.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    return list(found.values())


def make_environment(folder: Path, distributions: Iterable[Distribution]) -> Path:
    """A virtual environment that holds the distributions and nothing else; returns its Python."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for package in distributions:
        for file in package.files or ():
            if ".." in file.parts or file.suffix == ".pyc":  # scripts; and what Python writes by itself
                continue
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(package.locate_file(file))
    return folder / "bin" / "python"


BUNDLE = """
import asyncio, importlib, sys
from pathlib import Path
import flyte
from flyte._code_bundle import build_code_bundle
from flyte._code_bundle._includes import collect_env_include_files
from flyte._deploy import plan_deploy

flyte.init(root_dir=Path.cwd())
driver = importlib.import_module(sys.argv[1]).driver
environments = plan_deploy(driver)[0].envs.values()
include = collect_env_include_files(environments) if sys.argv[3] == "include" else ()
bundle = build_code_bundle(Path.cwd(), dryrun=True, copy_bundle_to=Path(sys.argv[2]), additional_files=include)
print(asyncio.run(bundle).tgz)
"""
"""What ``flyte run`` does before it submits, in a process that has imported the workflow and nothing more."""


def build_bundle(module: str, folder: Path, *, python: Path | str, root: Path = ROOT, include: bool = True) -> Path:
    """Flyte's code bundle of the workflow ``module`` in ``root``; the archive's path.

    Args:
        include: with what the environments ask for, or only with what Flyte finds by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(python), "-c", BUNDLE, module, str(folder), "include" if include else "nothing"],
        # Not this environment's PATH: with ruff on it Flyte follows import statements, which users may not have.
        cwd=root, env={**ENVIRONMENT, "PATH": os.defpath, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1])


def unpack(bundle: Path, folder: Path) -> Path:
    """Unpack a bundle with Flyte's own code, as a container does when it starts."""
    from flyte._code_bundle import download_bundle
    from flyte.models import CodeBundle

    folder.mkdir(parents=True)
    asyncio.run(download_bundle(CodeBundle(tgz=str(bundle), destination=str(folder), computed_version="1")))
    return folder


def run_in_container(
    python: Path, folder: Path, program: str, *arguments: str, image: flyte.Image
) -> subprocess.CompletedProcess[str]:
    """A program in an unpacked bundle, with the image's packages and variables and nothing of this environment."""
    environment = {"PATH": os.defpath, "HOME": str(folder.parent), "DO_NOT_TRACK": "1", "COLUMNS": "400"}
    # -P: like a container's entrypoint, which puts the bundle's folder on the path by itself.
    command: Sequence[str] = [str(python), "-P", "-B", "-c", f"import sys; sys.path.insert(0, '.')\n{program}"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env={**environment, **env_vars(image)},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
