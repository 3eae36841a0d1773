"""The real reusable-container runtime, on this machine: run by ``make test-runtime``, see `tests.runtime.cluster`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import ROOT
from tests.image_environments import build_bundle
from tests.runtime.jobs import SLOW, Job
from tests.runtime.reliability import OUTCOMES, SKIPPED, Outcome, beginning

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster

_HERE = Path(__file__).parent

# Flyte leaves a lazy module of it behind, which no two threads may load at once, as Flyte's and pyarrow's here do.
_ = importlib.import_module("pandas").DataFrame


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[OUTCOMES], config.stash[SKIPPED] = {}, {}
    needed = ("flask", "grpc", "grpc_tools", "moto", "psutil", "uvicorn", "werkzeug")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    reason = f"{', '.join(missing)} not installed here: make test-runtime" if missing else ""
    if not missing and os.environ.get("FLYTE_BATCH_RUNTIME_TESTS") != "1":
        reason = "starts many processes; run it by make test-runtime"
    for item in items:
        if _HERE in item.path.parents and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fault = item.get_closest_marker("fault")
    if fault is not None and report.skipped:
        item.config.stash[SKIPPED][item.nodeid] = beginning(*fault.args)
    if fault is not None and report.when == "call" and report.passed:
        seen = dict(report.user_properties)
        item.config.stash[OUTCOMES][item.nodeid] = Outcome(*fault.args, **seen, seconds=report.duration)
    return report


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """An empty cluster; pools of at most two replicas start when they are needed, and go with the test."""
    from tests.runtime.cluster import Cluster

    async with Cluster(tmp_path / "cluster").up() as up:
        yield up


Bundle = Callable[..., Path]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Flyte's own bundle of a module of ours. With ``plus``, code at its end: the module with one thing broken."""

    @functools.cache
    def make(module: str, plus: str = "") -> Path:
        folder, root = tmp_path_factory.mktemp("bundle"), ROOT
        if plus:
            root = folder / "root"
            for name in ("flyte_batch", "images", "workflows"):
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            with (root / f"{module.replace('.', '/')}.py").open("a") as file:
                file.write(plus)
        return build_bundle(module, folder / "bundle", root=root, python=sys.executable)

    return make


@pytest.fixture(scope="session")
def generate_bundle(bundle: Bundle) -> Callable[[str], Path]:
    """The bundle of ``workflows/generate.py``, with a fault if one is given."""
    return lambda fault="": bundle("workflows.generate", fault)


@pytest.fixture
def job(
    cluster: Cluster,
    generate_bundle: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> Job:
    """A run of the workflow that takes long enough to break something meanwhile."""
    return Job(cluster, generate_bundle(SLOW), tmp_path, record_property)
