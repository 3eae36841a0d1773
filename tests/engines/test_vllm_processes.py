"""Which processes an engine takes for its own. The cores here only sleep, under names as vLLM gives them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from flyte_batch.engines.vllm_processes import EngineProcesses
from flyte_batch.processes import kill_below, process_table

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")

StartCore = Callable[..., BaseProcess]


@pytest.fixture
def start_core() -> Iterator[StartCore]:
    """Starts a core, which starts a worker if it is to have one."""
    cores: list[BaseProcess] = []

    def start(name: str, *, worker: bool = False) -> BaseProcess:
        spawn = multiprocessing.get_context("spawn")
        if worker:
            core = spawn.Process(target=subprocess.call, args=(["sleep", "600"],), name=name)
        else:
            core = spawn.Process(target=time.sleep, args=(600,), name=name)
        core.start()
        cores.append(core)
        return core

    yield start
    for core in cores:
        assert core.pid is not None
        kill_below(core.pid)
        core.kill()
        core.join()


def children() -> set[int]:
    return {pid for pid, (parent, _) in process_table().items() if parent == os.getpid()}


def until_complete(processes: EngineProcesses) -> set[int]:
    """Look until there is a worker too; ids of both."""
    deadline = time.monotonic() + 30
    while len(processes.alive) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        processes.look()
    return set(processes.alive)


def test_an_engine_that_ends_leaves_those_that_started_before_and_after_it_alone(start_core: StartCore) -> None:
    engines: list[EngineProcesses] = []
    cores: list[BaseProcess] = []
    for name in ("EngineCore_first", "VLLM::second", "EngineCore_third"):
        engines.append(EngineProcesses())
        cores.append(start_core(name, worker=True))
        engines[-1].started()
    first, second, third = map(until_complete, engines)
    for core, known in zip(cores, (first, second, third), strict=True):
        assert core.pid in known
    engines[1].end(0)
    assert not second & set(process_table())
    assert first | third <= set(process_table())
    engines[0].end(0)
    assert not first & set(process_table())
    assert third <= set(process_table())
    engines[2].end(0)
    assert not third & set(process_table())


def test_a_child_that_is_no_core_of_vllms_is_left_alone(start_core: StartCore) -> None:
    processes = EngineProcesses()
    other = start_core("SpawnProcess-1")
    processes.started()
    assert processes.end(0) == []
    assert other.is_alive()


def test_cores_that_come_while_the_start_is_being_cancelled_are_ended_too(start_core: StartCore) -> None:
    processes = EngineProcesses()
    for name in ("EngineCore_0", "EngineCore_1"):
        core = start_core(name)
        processes.end(0)
        assert core.pid not in process_table()


def test_an_engine_that_has_ended_starts_no_reaper_anew(start_core: StartCore) -> None:
    processes = EngineProcesses()
    start_core("EngineCore_0")
    before = children()
    processes.look()
    (reaper,) = children() - before
    processes.end(0)
    assert reaper not in process_table()
    left = children()
    processes.look()
    assert children() == left
