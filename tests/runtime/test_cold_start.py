"""``workflows/generate.py`` and ``gsm8k.py`` with ``--warm_up``: replicas load while the driver is still at the source.

Opening the source, and loading the model, wait for a file in a folder that driver, replicas and tests share; each load
leaves a file of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flyte_batch.demo.problems import generate
from tests.helpers import write_jsonl
from workflows import generate as workflow
from workflows import gsm8k

if TYPE_CHECKING:
    from tests.runtime.cluster import Action, Cluster, Run

CALLS = 5
"""Two replicas take four each: one of them alone cannot take these."""

STAGED = """
# -- from here on added by a test
from pathlib import Path as _Path
import time as _time
from flyte_batch.data import sources as _sources
from flyte_batch.engines.ctranslate2 import CTranslate2Engine as _Engine
_stage, _open, _start = _Path(os.environ["HOME"]) / "stage", _sources.open_source, _Engine.start
def _held_open(*args, **kwargs):
    (_stage / "opening").touch()
    while not (_stage / "open").exists():
        _time.sleep(0.01)
    return _open(*args, **kwargs)
async def _held_start(*args, **kwargs):
    (_stage / f"load-{os.getpid()}-{_time.monotonic_ns()}").touch()
    try:
        while not (_stage / "load").exists():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        (_stage / f"stopped-{os.getpid()}").touch()
        raise
    if (_stage / "fail").exists():
        raise OSError("the weights are not there yet")
    return await _start(*args, **kwargs)
_sources.open_source, _Engine.start = _held_open, _held_start
"""


class Staged:
    """A cluster, and a run that waits at each step for the test."""

    def __init__(self, cluster: Cluster, bundle: Path, folder: Path) -> None:
        self.cluster, self._bundle, self._folder = cluster, bundle, folder
        self._stage = cluster.folder / "stage"
        self._stage.mkdir()

    async def start(self, *, column: str = "question", **options: Any) -> Run:
        rows = [{"question": problem.question} for problem in generate(200, 31)]
        source = Path(write_jsonl(self._folder / "in.jsonl", rows)).as_uri()
        output = (self._folder / "out").as_uri()
        return await self.cluster.start(
            workflow.main, self._bundle, source=source, output=output, chunk_size=25, prompt_column=column, **options
        )

    def let(self, *names: str) -> None:
        for name in names:
            (self._stage / name).touch()

    def hold(self, *names: str) -> None:
        for name in names:
            (self._stage / name).unlink()

    def seen(self, what: str) -> list[int]:
        """The process of each ``load`` or ``stopped``."""
        return [int(path.name.split("-")[1]) for path in self._stage.glob(f"{what}-*")]

    async def until(self, condition: Callable[[], object], timeout_s: float = 20) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it does not come.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, [(run.error, run.log) for run in self.cluster.runs.values()]
            await asyncio.sleep(0.02)

    async def opening(self) -> None:
        await self.until((self._stage / "opening").exists)

    def executors(self) -> set[int]:
        return {replica.executor() for replica in self.cluster.pools["generate-cpu"].replicas}

    def busy(self) -> int:
        return sum(len(replica.worker.calls) for replica in self.cluster.pools["generate-cpu"].replicas)


@pytest.fixture
def staged(cluster: Cluster, generate_bundle: Callable[..., Path], tmp_path: Path) -> Staged:
    return Staged(cluster, generate_bundle(STAGED), tmp_path)


def wakes(run: Run) -> list[Action]:
    return [action for action in run.children if action.task == "generate-cpu.wake_cpu"]


async def test_both_replicas_load_before_the_driver_has_opened_the_source_and_their_chunks_load_nothing(
    staged: Staged,
) -> None:
    run = await staged.start(warm_up=True)
    await staged.opening()
    await staged.until(lambda: len(staged.seen("load")) == 2)
    assert set(staged.seen("load")) == staged.executors()
    assert len(run.children) == len(wakes(run)) == CALLS
    staged.let("load")
    await staged.until(lambda: [action.phase for action in wakes(run)] == ["SUCCEEDED"] * CALLS)
    assert len({action.attempts[0].where for action in wakes(run)}) == 2
    staged.let("open")
    summary = await run.result()
    assert (summary.rows, summary.failures, summary.chunks) == (200, 0, 8)
    assert len(run.children) == CALLS + 8
    assert len(staged.seen("load")) == 2


async def test_chunks_that_come_while_the_warm_up_loads_share_its_load(staged: Staged) -> None:
    run = await staged.start(warm_up=True)
    await staged.until(lambda: len(staged.seen("load")) == 2)
    staged.let("open")
    await staged.until(lambda: staged.busy() == 8)  # chunks in the slots that are left
    staged.let("load")
    assert (await run.result()).rows == 200
    assert len(staged.seen("load")) == 2


async def test_without_it_no_replica_is_woken_before_the_source_is_sound(staged: Staged) -> None:
    run = await staged.start(column="nowhere")
    await staged.opening()
    staged.let("open", "load")
    assert "nowhere" in (await run.ended()).error
    assert staged.cluster.pools == {}


async def test_a_warm_up_that_fails_is_logged_and_leaves_the_run_as_it_is(staged: Staged) -> None:
    staged.let("fail", "load")
    run = await staged.start(warm_up=True)
    await staged.until(lambda: [action.phase for action in wakes(run)] == ["FAILED"] * CALLS)
    await staged.cluster.pools["generate-cpu"].up()
    failed = len(staged.seen("load"))
    staged.hold("fail")
    staged.let("open")
    summary = await run.result()
    assert (summary.rows, summary.failures) == (200, 0)
    assert run.log.count("a replica was not warmed up") == CALLS
    assert "the weights are not there yet" in run.log
    assert len(staged.seen("load")) == failed + 2


async def test_a_run_that_ends_while_replicas_load_stops_the_loads_and_the_next_one_loads_anew(staged: Staged) -> None:
    run = await staged.start(warm_up=True, column="nowhere")
    await staged.until(lambda: len(staged.seen("load")) == 2)
    staged.let("open")
    assert "nowhere" in (await run.ended()).error
    await staged.until(lambda: sorted(staged.seen("stopped")) == sorted(staged.seen("load")))
    await staged.until(lambda: [action.phase for action in wakes(run)] == ["ABORTED"] * CALLS)
    assert staged.busy() == 0
    staged.let("load")
    assert (await (await staged.start(warm_up=True)).result()).rows == 200
    assert len(staged.seen("load")) == 4


async def test_a_run_that_is_cancelled_while_replicas_load_stops_the_loads(staged: Staged) -> None:
    run = await staged.start(warm_up=True)
    await staged.until(lambda: len(staged.seen("load")) == 2)
    for action in run.actions.values():  # what Flyte's service does when a run is aborted
        action.abort.set()
    assert (await run.ended()).phase == "ABORTED"
    await staged.until(lambda: len(staged.seen("stopped")) == 2)
    assert staged.busy() == 0


async def test_gsm8k_wakes_its_replicas_too(cluster: Cluster, bundle: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"question": problem.question, "answer": problem.answer} for problem in generate(40, 31)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run = await cluster.start(
        gsm8k.main, bundle("workflows.gsm8k"), num_questions=40, chunk_size=10, source=source, warm_up=True
    )
    answers, accuracy = await run.result()
    assert (len(answers), accuracy >= 0.95) == (4, True)
    assert [action.task for action in run.children].count("gsm8k-cpu.wake_cpu") == 1 * 10 + 1
    assert "not warmed up" not in run.log
