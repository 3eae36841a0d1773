"""What the calls of one replica share, and what each keeps for itself: engine, batches, loading, cancelling."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

import flyte_batch as fb
from flyte_batch.data.chunks import Chunk, plan_chunks
from flyte_batch.data.sources import open_source
from tests.helpers import write_jsonl
from tests.runtime.project import sharing

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run

BOTH = pytest.mark.parametrize("solver", ["batching", "continuous"])


class OneReplica:
    """A cluster whose pool has one replica, and ways to look into it."""

    def __init__(self, cluster: Cluster, bundle: Path, folder: Path) -> None:
        self.cluster, self.bundle, self.folder = cluster, bundle, folder

    def source(self, name: str, rows: int) -> tuple[str, list[str]]:
        """A dataset, and its texts: the name with a number."""
        texts = [f"{name} {i}" for i in range(rows)]
        return write_jsonl(self.folder / f"{name}.jsonl", [{"text": text} for text in texts]), texts

    def chunk(self, name: str, rows: int = 4) -> Chunk:
        source, _ = self.source(name, rows)
        output = self.folder / f"{name}-out"
        output.mkdir()
        (chunk,) = plan_chunks(open_source(source), str(output), rows, settings={"of": name})
        return chunk

    async def ask(self, name: str, solver: str) -> Run:
        return await self.cluster.start(sharing.ask, self.bundle, chunk=self.chunk(name), solver=solver)

    def answers(self, name: str) -> list[str]:
        (part,) = (self.folder / f"{name}-out").glob("part-*.parquet")
        responses: list[str] = pq.read_table(part)["response"].to_pylist()
        return responses

    async def let(self, *, load: bool, answer: bool, loads_to_fail: int = 0) -> None:
        await self.cluster.run(sharing.let, self.bundle, load=load, answer=answer, loads_to_fail=loads_to_fail)

    async def look(self) -> sharing.Journal:
        return sharing.Journal(**json.loads(await self.cluster.run(sharing.look, self.bundle)))

    async def until(self, condition: Callable[[sharing.Journal], Any], timeout_s: float = 10) -> sharing.Journal:
        """Look until the condition holds.

        Raises:
            AssertionError: it does not in time, or a run failed.
        """
        deadline = time.monotonic() + timeout_s
        while not condition(journal := await self.look()):
            assert time.monotonic() < deadline, journal
            assert not [run.error for run in self.cluster.runs.values() if run.phase == "FAILED"]
        return journal


@pytest.fixture
async def replica(tmp_path: Path, bundle: Callable[..., Path]) -> AsyncIterator[OneReplica]:
    from tests.runtime.cluster import Cluster

    async with Cluster(tmp_path / "cluster", replicas=1).up() as up:
        yield OneReplica(up, bundle("tests.runtime.project.sharing"), tmp_path)


# -- One engine, one batcher ------------------------------------------------


@BOTH
async def test_ten_calls_at_once_share_one_engine_and_its_batches(replica: OneReplica, solver: str) -> None:
    await replica.let(load=False, answer=True)
    runs = [await replica.ask(f"chunk{i}", solver) for i in range(10)]
    await replica.until(lambda journal: len(journal.calls) == 10)
    await replica.let(load=True, answer=True)
    for report in [await run.result() for run in runs]:
        assert (report.rows, report.failures) == (4, 0)
    journal = await replica.look()
    assert len(journal.loads) == 1
    assert sorted(journal.begun) == sorted(f"chunk{i} {j}" for i in range(10) for j in range(4))
    if solver == "batching":
        assert max(len({text.split()[0] for text in batch}) for batch in journal.batches) >= 3
    for i in range(10):
        assert replica.answers(f"chunk{i}") == [f"echo: chunk{i} {j}" for j in range(4)]


async def test_the_code_that_runs_is_the_bundles(replica: OneReplica) -> None:
    package = Path((await replica.look()).package)
    (container,) = replica.cluster.pools["sharing"].replicas
    assert package.is_relative_to(container.folder)
    assert (await replica.look()).pid == container.executor()


async def test_four_driver_runs_share_one_engine_and_every_batch_mixes_them(replica: OneReplica) -> None:
    await replica.let(load=False, answer=True)
    runs = []
    for i in range(4):
        source, _ = replica.source(f"run{i}", 60)
        runs.append(
            await replica.cluster.start(
                sharing.main, replica.bundle, source=source, output=str(replica.folder / f"out{i}"), solver="batching"
            )
        )
    await replica.until(lambda journal: len(journal.calls) == 16)  # four chunks of each are under way
    await replica.let(load=True, answer=True)
    for i, run in enumerate(runs):
        assert (await run.result()).rows == 60
        table = fb.read_output(str(replica.folder / f"out{i}"))
        assert table["response"].to_pylist() == [f"echo: run{i} {j}" for j in range(60)]
    journal = await replica.look()
    assert len(journal.loads) == 1
    assert len(journal.begun) == len(set(journal.begun)) == 240
    assert max(len({text.split()[0] for text in batch}) for batch in journal.batches) == 4


# -- Loading ----------------------------------------------------------------


@BOTH
async def test_nothing_is_loaded_before_the_first_call_and_the_load_sees_no_callers_context(
    replica: OneReplica, solver: str
) -> None:
    assert (await replica.look()).loads == []
    await replica.let(load=True, answer=True)
    await (await replica.ask("first", solver)).result()
    await (await replica.ask("second", solver)).result()
    assert (await replica.look()).loads == [""]


@BOTH
async def test_prompts_and_finish_see_the_context_of_the_call_whose_rows_they_work_on(
    replica: OneReplica, solver: str
) -> None:
    await replica.let(load=True, answer=False)
    runs = {name: await replica.ask(name, solver) for name in ("first", "second", "third")}
    await replica.until(lambda journal: len(journal.attributed) == 12)
    await replica.let(load=True, answer=True)
    for run in runs.values():
        await run.result()
    attributed = (await replica.look()).attributed
    assert attributed == {f"{name} {i}": [run.name] * 2 for name, run in runs.items() for i in range(4)}


@BOTH
async def test_a_failed_load_fails_its_callers_with_its_error_and_the_next_call_loads_anew(
    replica: OneReplica, solver: str
) -> None:
    await replica.let(load=False, answer=True, loads_to_fail=1)
    runs = [await replica.ask(f"early{i}", solver) for i in range(3)]
    await replica.until(lambda journal: len(journal.calls) == 3)
    await replica.let(load=True, answer=True, loads_to_fail=1)
    for run in runs:
        await run.ended()
        assert run.phase == "FAILED"
        assert run.error.startswith("OSError: the weights are not there yet")
    assert (await (await replica.ask("late", solver)).result()).rows == 4
    assert (await replica.look()).loads == ["", ""]


# -- Cancelling -------------------------------------------------------------


@BOTH
async def test_the_first_caller_cancelled_while_it_loads_takes_nobody_with_it(replica: OneReplica, solver: str) -> None:
    await replica.let(load=False, answer=True)
    first = await replica.ask("first", solver)
    await replica.until(lambda journal: len(journal.loads) == 1)
    others = [await replica.ask(f"other{i}", solver) for i in range(3)]
    await replica.until(lambda journal: len(journal.calls) == 4)
    first.abort()
    journal = await replica.until(lambda journal: journal.cancelled)
    await replica.let(load=True, answer=True)
    assert [(await other.result()).rows for other in others] == [4, 4, 4]
    assert (await first.ended()).phase == "ABORTED"
    journal = await replica.look()
    assert (journal.cancelled, journal.loads, journal.loads_cancelled) == ([first.name], [""], 0)
    assert not any(text.startswith("first") for text in journal.begun)


@BOTH
async def test_a_load_whose_only_caller_is_cancelled_stops_and_the_next_call_loads_anew(
    replica: OneReplica, solver: str
) -> None:
    await replica.let(load=False, answer=True)
    only = await replica.ask("only", solver)
    await replica.until(lambda journal: len(journal.loads) == 1)
    only.abort()
    await replica.until(lambda journal: journal.loads_cancelled == 1)
    await replica.let(load=True, answer=True)
    assert (await (await replica.ask("next", solver)).result()).rows == 4
    assert (await only.ended()).phase == "ABORTED"
    assert (await replica.look()).loads == ["", ""]


@BOTH
async def test_a_cancelled_call_frees_its_records_and_its_neighbours_get_their_answers(
    replica: OneReplica, solver: str
) -> None:
    await replica.let(load=True, answer=False)
    before = await replica.ask("before", solver)
    await replica.until(lambda journal: journal.begun)
    gone = await replica.ask("gone", solver)
    after = await replica.ask("after", solver)
    await replica.until(lambda journal: len(journal.attributed) == 12)
    gone.abort()
    assert (await gone.ended()).phase == "ABORTED"
    journal = await replica.until(lambda journal: journal.cancelled)
    if solver == "continuous":
        await replica.until(lambda journal: sorted(journal.freed) == [f"gone {i}" for i in range(4)])
    await replica.let(load=True, answer=True)
    assert [(await run.result()).rows for run in (before, after)] == [4, 4]
    assert replica.answers("after") == [f"echo: after {i}" for i in range(4)]
    journal = await replica.look()
    assert journal.cancelled == [gone.name]
    assert len(journal.loads) == 1
    if solver == "batching":
        assert not any(text.startswith("gone") for text in journal.begun)


@BOTH
async def test_cancelled_calls_leave_every_slot_of_the_replica_free(replica: OneReplica, solver: str) -> None:
    await replica.let(load=True, answer=False)
    runs = [await replica.ask(f"gone{i}", solver) for i in range(20)]
    await replica.until(lambda journal: len(journal.calls) == 20)
    for run in runs:
        run.abort()
    assert [(await run.ended()).phase for run in runs] == ["ABORTED"] * 20
    journal = await replica.until(lambda journal: len(journal.cancelled) == 20)
    await replica.let(load=True, answer=True)
    again = [await replica.ask(f"again{i}", solver) for i in range(20)]
    assert [(await run.result()).rows for run in again] == [4] * 20
    assert len((await replica.look()).loads) == 1
    assert (await replica.look()).pid == journal.pid


async def test_an_aborted_driver_cancels_its_chunks_and_leaves_another_run_alone(replica: OneReplica) -> None:
    await replica.let(load=True, answer=False)
    runs = []
    for i in range(2):
        source, _ = replica.source(f"run{i}", 20)
        output = str(replica.folder / f"out{i}")
        runs.append(
            await replica.cluster.start(sharing.main, replica.bundle, source=source, output=output, solver="continuous")
        )
    await replica.until(lambda journal: len(journal.begun) == 40)
    runs[0].abort()
    assert (await runs[0].ended()).phase == "ABORTED"
    await replica.let(load=True, answer=True)
    assert (await runs[1].result()).rows == 20
