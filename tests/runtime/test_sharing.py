"""What the calls of one replica share, and what each keeps for itself: engine, batches, loading, cancelling."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

import flyte_batch as fb
from flyte_batch.data.chunks import Chunk, plan_chunks
from flyte_batch.data.sources import open_source
from tests.helpers import ROOT, write_jsonl
from tests.image_environments import build_bundle
from tests.runtime.project import sharing

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run

psutil = pytest.importorskip("psutil", reason="make test-runtime")

BOTH = pytest.mark.parametrize("solver", ["batching", "continuous"])


class OneReplica:
    """A cluster whose pool has one replica, and ways to look into it."""

    def __init__(self, cluster: Cluster, bundle: Path, folder: Path) -> None:
        self.cluster, self.bundle, self.folder = cluster, bundle, folder

    def source(self, name: str, rows: int) -> tuple[str, list[str]]:
        """A dataset, and its texts: the name with a number."""
        texts = [f"{name} {i}" for i in range(rows)]
        return write_jsonl(self.folder / f"{name}.jsonl", [{"text": text} for text in texts]), texts

    def chunk(self, name: str, texts: Sequence[str] = ()) -> Chunk:
        """All rows of a dataset as one chunk: four texts of the name with a number, or these."""
        source, _ = self.source(name, 4)
        if texts:
            write_jsonl(Path(source), [{"text": text} for text in texts])
        output = self.folder / f"{name}-out"
        output.mkdir()
        (chunk,) = plan_chunks(open_source(source), str(output), len(texts) or 4, settings={"of": name})
        return chunk

    async def ask(self, name: str, solver: str, texts: Sequence[str] = ()) -> Run:
        chunk = self.chunk(name, texts)
        return await self.cluster.start(sharing.ask, self.bundle, chunk=chunk, solver=solver)

    def answers(self, name: str) -> list[str | None]:
        (part,) = (self.folder / f"{name}-out").glob("part-*.parquet")
        responses: list[str | None] = pq.read_table(part)["response"].to_pylist()
        return responses

    async def let(
        self, *, load: bool, answer: bool, hold: str = "", loads_to_fail: int = 0, deaths: int = 0, leaks: int = 0
    ) -> None:
        faults = {"loads_to_fail": loads_to_fail, "deaths": deaths, "leaks": leaks}
        await self.cluster.run(sharing.let, self.bundle, load=load, answer=answer, hold=hold, **faults)

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
    if solver == "continuous":
        await replica.let(load=True, answer=False)
        await replica.until(lambda journal: len(journal.begun) == 40)  # those of all calls are in the engine at once
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


async def test_four_driver_runs_share_one_engine_and_a_batch_mixes_all_of_them(replica: OneReplica) -> None:
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


# -- Whose it is ------------------------------------------------------------


def said_by(log: str) -> dict[str, set[str]]:
    """Who wrote each line of the log, the empty text where no run stands before it; without Flyte's own lines."""
    said: dict[str, set[str]] = {}
    for line in log.splitlines():
        match = re.fullmatch(r"(?:\[(\w+)\]\[a0\] )?WARNING (.+)", line)
        if match is not None:
            said.setdefault(match[2], set()).add(match[1] or "")
    return said


@BOTH
async def test_logs_reports_metrics_and_paths_are_those_of_the_call_that_owns_the_record(
    replica: OneReplica, solver: str
) -> None:
    texts = {"one": ["one 0", "one bad 1", "one 2"], "two": [f"two {i}" for i in range(5)], "three": ["three 0"] * 2}
    await replica.let(load=True, answer=False)
    runs = {name: await replica.ask(name, solver, asked) for name, asked in texts.items()}
    await replica.until(lambda journal: len(journal.paths) == 9 and journal.begun)
    await replica.let(load=True, answer=True)
    reports = {name: await run.result() for name, run in runs.items()}
    journal = await replica.look()
    (container,) = replica.cluster.pools["sharing"].replicas
    said = said_by(container.log)

    assert said["loading"] == {""}
    for name, asked in texts.items():
        run, report, good = runs[name], reports[name], [text for text in asked if "bad" not in text]
        words = sum(len(text.split()) for text in good)
        assert (report.rows, report.failures) == (len(asked), len(asked) - len(good))
        assert (report.prompt_tokens, report.response_tokens) == (words, words + len(good))  # one word more: "echo:"
        assert [path.name for path in (replica.folder / f"{name}-out").glob("part-*")] == [report.part]
        html = (run.root.outputs_folder / "report.html").read_text()
        assert re.findall("<p>echo: (.+)</p>", html) == good
        for text in asked:
            assert said[f"asking {text}"] == {run.name}
            assert set(journal.paths[text]) == {str(run.folder / "a0" / "raw")}
            # A batch belongs to many; a record that is answered by itself belongs to its caller.
            owner = run.name if solver == "continuous" else ""
            assert said[f"answering {text}"] == {journal.answered_for[text]} == {owner}
        for text in good:
            assert said[f"finishing {text}"] == {run.name}


async def test_an_engines_death_is_nobodys_line_and_each_calls_own_line_says_what_it_has_to_do_again(
    replica: OneReplica,
) -> None:
    await replica.let(load=True, answer=False)
    runs = [await replica.ask(name, "continuous") for name in ("first", "second")]
    await replica.until(lambda journal: len(journal.begun) == 8)
    await replica.let(load=True, answer=True, deaths=1)
    assert [(await run.result()).failures for run in runs] == [0, 0]
    assert (await replica.look()).loads == ["", ""]
    (container,) = replica.cluster.pools["sharing"].replicas
    assert re.findall(r"(.*)ERROR ContinuousBatcher died: EngineDead", container.log) == [""]
    again = re.findall(r"\[(\w+)\]\[a0\] WARNING .* with 4 of 4 rows to do; building the engine anew", container.log)
    assert sorted(again) == [run.name for run in runs]


async def test_a_new_bundle_has_replicas_and_an_engine_of_its_own_and_the_old_engine_ends_with_its_replica(
    replica: OneReplica, tmp_path: Path
) -> None:
    root = tmp_path / "changed"
    for name in ("flyte_batch", "images", "tests/runtime/project"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "tests/runtime/project/sharing.py").open("a") as file:
        file.write("\n# changed\n")
    module = "tests.runtime.project.sharing"
    changed = OneReplica(
        replica.cluster, build_bundle(module, tmp_path / "b", root=root, python=sys.executable), tmp_path
    )

    await replica.let(load=True, answer=True)
    await (await replica.ask("former", "batching")).result()
    former, (container,) = await replica.look(), replica.cluster.pools["sharing"].replicas
    await changed.let(load=True, answer=True)
    await (await changed.ask("latest", "batching")).result()
    latest = await changed.look()
    assert (former.begun, latest.begun) == ([f"former {i}" for i in range(4)], [f"latest {i}" for i in range(4)])
    assert former.loads == latest.loads == [""]
    assert former.pid == container.executor() != latest.pid

    executor = psutil.Process(former.pid)
    container.terminate_bridge()  # as when it was idle for long enough
    await container.ended()
    await asyncio.to_thread(executor.wait, 10)
    await (await changed.ask("later", "batching")).result()
    assert (await changed.look()).pid == latest.pid
    assert len((await changed.look()).loads) == 1


# -- What goes wrong --------------------------------------------------------


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


@pytest.mark.parametrize("stage", ["load", "prepare", "infer", "finish", "write"])
async def test_a_call_that_is_cancelled_ends_at_once_whatever_it_waits_for_and_no_neighbour_is_cancelled(
    replica: OneReplica, stage: str
) -> None:
    await replica.let(load=stage != "load", answer=stage != "infer", hold=stage)
    names = "before", "gone", "after"
    runs = {name: await replica.ask(name, "continuous") for name in names}
    waiting = {
        "load": lambda journal: len(journal.calls) == 3 and journal.loads,
        "infer": lambda journal: len(journal.begun) == 12,
    }
    await replica.until(waiting.get(stage, lambda journal: len(journal.reached.get(stage, ())) == 3))
    runs["gone"].abort()
    assert (await runs["gone"].ended(timeout_s=20)).phase == "ABORTED"  # nothing was let go on
    journal = await replica.until(lambda journal: journal.cancelled)
    assert journal.cancelling == {runs["gone"].name: 1}
    await replica.let(load=True, answer=True)
    for name in ("before", "after"):
        assert (await runs[name].result()).failures == 0
        assert replica.answers(name) == [f"echo: {name} {i}" for i in range(4)]
    journal = await replica.look()
    assert journal.cancelled == [runs["gone"].name]
    assert journal.cancelling == {run.name: int(name == "gone") for name, run in runs.items()}
    assert (journal.loads, journal.loads_cancelled) == ([""], 0)


@BOTH
async def test_a_cancellation_that_user_code_raises_fails_what_it_was_for_and_cancels_no_call(
    replica: OneReplica, solver: str
) -> None:
    await replica.let(load=False, answer=True, leaks=1)
    runs = [await replica.ask(f"early{i}", solver) for i in range(2)]
    await replica.until(lambda journal: len(journal.calls) == 2 and journal.loads)
    await replica.let(load=True, answer=True, leaks=1)
    for run in runs:
        await run.ended()
        assert re.match("FlyteBatchError: .* raised a CancelledError that was not its callers'", run.error)
    report = await (await replica.ask("late", solver, ["late 0", "late leak", "late 2"])).result()
    assert (report.rows, report.failures) == (3, 1)
    assert replica.answers("late") == ["echo: late 0", None, "echo: late 2"]
    journal = await replica.look()
    assert (journal.cancelled, set(journal.cancelling.values()), journal.loads) == ([], {0}, ["", ""])


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
