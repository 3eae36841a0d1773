"""A driver that takes a slot of the replicas that it waits for, on the real runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import flyte_batch as fb
from tests.helpers import questions
from tests.runtime.project import own_slots

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster


@pytest.fixture
def own_slots_bundle(bundle: Callable[..., Path]) -> Path:
    return bundle("tests.runtime.project.own_slots")


async def test_a_driver_in_the_only_slot_of_its_replicas_ends_with_an_error_that_says_so_and_does_not_hang(
    cluster: Cluster, own_slots_bundle: Path, tmp_path: Path
) -> None:
    source = questions(tmp_path / "in.jsonl", 20)
    run = await cluster.start(
        own_slots.main_in_the_only_slot, own_slots_bundle, source=source, output=str(tmp_path / "out")
    )
    await run.ended(timeout_s=30)
    assert run.error.startswith(
        "BadInput: this driver runs in the only slot (replicas x concurrency) of environment 'one-slot'"
    )
    assert "fb.driver_environment" in run.error
    assert run.children == []


async def test_a_driver_in_one_of_two_slots_is_warned_about_and_its_chunks_go_through_the_other(
    cluster: Cluster, own_slots_bundle: Path, tmp_path: Path
) -> None:
    source, output = questions(tmp_path / "in.jsonl", 20), str(tmp_path / "out")
    summary = await cluster.run(own_slots.main_in_one_of_two_slots, own_slots_bundle, source=source, output=output)
    assert (summary.rows, summary.failures, summary.chunks) == (20, 0, 4)
    assert fb.read_output(output)["id"].to_pylist() == list(range(20))
    (replica,) = cluster.pools["two-slots"].replicas
    assert (
        replica.log.count("this driver takes one of the 2 slots (replicas x concurrency) of environment 'two-slots'")
        == 1
    )


async def test_a_driver_in_a_container_of_its_own_runs_although_it_was_cloned_with_the_replicas_variables(
    cluster: Cluster, own_slots_bundle: Path, tmp_path: Path
) -> None:
    source, output = questions(tmp_path / "in.jsonl", 20), str(tmp_path / "out")
    summary = await cluster.run(
        own_slots.main_in_a_container_of_its_own, own_slots_bundle, source=source, output=output
    )
    assert (summary.rows, summary.chunks) == (20, 4)
