from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flyte_batch as fb
from flyte_batch.data.storage import locate
from flyte_batch.driver import fan_out
from flyte_batch.errors import RunError
from flyte_batch.monitoring.details import ChunkDetails
from flyte_batch.report.history import logs_of
from tests.helpers import questions, write_jsonl


class Worker:
    """Runs chunks in this process on a fake engine, and counts."""

    def __init__(self, engine: fb.FakeEngine | None = None, prompt: str = "{question}") -> None:
        self.engine = engine or fb.FakeEngine()
        self.prompt = prompt
        self.chunks: list[fb.Chunk] = []
        self.running = self.most_running = 0
        self.fail: set[int] = set()
        self.error: type[Exception] = OSError
        self.solver = fb.singleton(self._solver)

    async def _solver(self) -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(self.engine, batch_timeout_s=0.001)

    async def __call__(self, chunk: fb.Chunk) -> fb.ChunkReport:
        self.chunks.append(chunk)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if chunk.index in self.fail:
                raise self.error(f"chunk {chunk.index} has no luck")
            return await fb.infer(chunk, self.solver, prompt=self.prompt)
        finally:
            self.running -= 1


async def go(source: str, output: Path, worker: Worker, **options: Any) -> fb.RunSummary:
    return await fb.run(source, str(output), worker, code_version="1", **options)


async def test_a_run_answers_every_row_and_says_so(tmp_path: Path) -> None:
    worker = Worker()
    summary = await go(questions(tmp_path / "in.jsonl", 95), tmp_path / "out", worker, chunk_size=10)
    assert (summary.rows, summary.failures, summary.chunks, summary.chunks_reused) == (95, 0, 10, 0)
    assert (summary.prompt_tokens, summary.response_tokens) == (190, 285)
    assert 0 < summary.utilization <= 1
    table = fb.read_output(str(tmp_path / "out"))
    assert table["id"].to_pylist() == list(range(95))
    assert table["response"].to_pylist() == [f"echo: question {i}" for i in range(95)]


async def test_a_finished_run_repeats_nothing(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 30)
    first = await go(source, tmp_path / "out", Worker(), chunk_size=10)
    again = Worker()
    second = await go(source, tmp_path / "out", again, chunk_size=10)
    assert again.chunks == []
    assert (second.rows, second.chunks_reused, second.response_tokens) == (30, 3, first.response_tokens)


async def test_a_failed_chunk_leaves_the_others_committed_and_a_re_run_does_only_it(tmp_path: Path) -> None:
    source, worker = questions(tmp_path / "in.jsonl", 50), Worker()
    worker.fail = {2}
    with pytest.raises(
        fb.ChunkFailed, match=r"1 of 5 chunks failed; first: chunk 2 \(rows 20-29\): OSError: .*no luck"
    ):
        await go(source, tmp_path / "out", worker, chunk_size=10)
    assert not (tmp_path / "out" / "_manifest.json").exists()
    again = Worker()
    summary = await go(source, tmp_path / "out", again, chunk_size=10)
    assert [chunk.index for chunk in again.chunks] == [2]
    assert (summary.rows, summary.chunks_reused) == (50, 4)
    assert fb.read_output(str(tmp_path / "out"))["id"].to_pylist() == list(range(50))


class Shared(Worker):
    """Chunks that run at once share an engine; the poison one ends it once the first ``together`` all use it."""

    def __init__(self, poison: int, error: Exception, together: int = 4) -> None:
        super().__init__()
        self.poison, self.error_of_all, self.together = poison, error, together
        self.ended = asyncio.Event()

    async def __call__(self, chunk: fb.Chunk) -> fb.ChunkReport:
        shares = chunk.index < self.together and not self.ended.is_set()
        if chunk.index == self.together - 1:
            self.ended.set()
        if shares:
            await self.ended.wait()
        if shares or chunk.index == self.poison:
            self.chunks.append(chunk)
            raise self.error_of_all
        return await super().__call__(chunk)

    @property
    def tried(self) -> list[int]:
        return sorted(chunk.index for chunk in self.chunks)


class RuntimeSystemError(Exception):
    """As Flyte's: the replica was lost."""


@pytest.mark.parametrize("together", [4, 10])
@pytest.mark.parametrize(
    "error", [fb.EngineDead("gone"), fb.BatcherDied("gone"), fb.DeadlineExceeded("hangs"), RuntimeSystemError("lost")]
)
async def test_chunks_that_failed_with_a_poison_chunk_are_answered_without_it(
    tmp_path: Path, error: Exception, together: int
) -> None:
    source, worker = questions(tmp_path / "in.jsonl", 200), Shared(2, error, together)
    with pytest.raises(fb.ChunkFailed, match=r"1 of 20 chunks failed; first: chunk 2 \(rows 20-29\)"):
        await go(source, tmp_path / "out", worker, chunk_size=10, concurrency=together)
    assert worker.tried == sorted([*range(20), *range(together)])
    worker.poison = -1  # mended
    again = await go(source, tmp_path / "out", worker, chunk_size=10)
    assert (again.rows, again.chunks_reused) == (200, 19)


async def test_a_chunk_that_fails_by_itself_does_not_keep_the_others_from_being_tried_again(tmp_path: Path) -> None:
    worker = Shared(2, fb.EngineDead("gone"))
    worker.fail = {7}
    with pytest.raises(fb.ChunkFailed, match=r"2 of 10 chunks failed"):
        await go(questions(tmp_path / "in.jsonl", 100), tmp_path / "out", worker, chunk_size=10, concurrency=4)
    assert worker.tried == sorted([*range(10), *range(4)])


async def test_a_chunk_that_failed_by_itself_is_not_tried_again(tmp_path: Path) -> None:
    worker = Shared(2, OSError("the prompt's own"))
    with pytest.raises(fb.ChunkFailed, match="4 of 10 chunks failed"):
        await go(questions(tmp_path / "in.jsonl", 100), tmp_path / "out", worker, chunk_size=10, concurrency=4)
    assert worker.tried == list(range(10))


async def test_of_a_run_with_bad_input_no_chunk_is_tried_again(tmp_path: Path) -> None:
    worker = Shared(2, fb.EngineDead("gone"))
    worker.prompt = "{question}{missing}"
    with pytest.raises(fb.ChunkFailed, match="fix that, then run the same command"):
        await go(questions(tmp_path / "in.jsonl", 100), tmp_path / "out", worker, chunk_size=10, concurrency=4)
    assert len(worker.tried) == len(set(worker.tried))


@pytest.mark.parametrize(("first_bad", "alone"), [(10, 3), (0, 0)])
async def test_engines_that_always_end_cost_a_few_chunks_alone_and_none_if_nothing_was_ever_answered(
    tmp_path: Path, first_bad: int, alone: int
) -> None:
    worker = Worker()
    worker.fail, worker.error = set(range(first_bad, 100)), fb.EngineDead
    with pytest.raises(fb.ChunkFailed, match=r"[78] of 100 chunks failed") as raised:
        await go(
            questions(tmp_path / "in.jsonl", 100), tmp_path / "out", worker,
            chunk_size=1, concurrency=2, max_failed_chunks=5,
        )  # fmt: skip
    tries = [chunk.index for chunk in worker.chunks]
    assert len(tries) - len(set(tries)) == alone
    assert ("What the others wrote" in str(raised.value)) == (first_bad > 0)


async def test_a_run_that_ends_when_no_thread_can_be_started_any_more_says_its_own_error(tmp_path: Path) -> None:
    async def interrupted(chunk: fb.Chunk) -> fb.ChunkReport:
        await asyncio.get_running_loop().shutdown_default_executor()  # as the interpreter does after Ctrl-C
        raise OSError("interrupted")

    source = questions(tmp_path / "in.jsonl", 100)
    with pytest.raises(fb.ChunkFailed, match="OSError: interrupted"):
        await fb.run(source, str(tmp_path / "out"), interrupted, code_version="1")


async def test_when_too_many_chunks_fail_no_more_are_started(tmp_path: Path) -> None:
    worker = Worker()
    worker.fail = set(range(100))
    with pytest.raises(fb.ChunkFailed, match="3 of 100 chunks failed"):
        await go(
            questions(tmp_path / "in.jsonl", 100), tmp_path / "out", worker,
            chunk_size=1, concurrency=1, max_failed_chunks=3,
        )  # fmt: skip
    assert len(worker.chunks) == 3


async def test_changed_settings_or_code_are_another_run(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 10), tmp_path / "out"
    await fb.run(source, str(out), Worker(), settings={"model": "a"}, code_version="1")
    with pytest.raises(fb.BadInput, match=r"model.*a.*b.*--overwrite"):
        await fb.run(source, str(out), Worker(), settings={"model": "b"}, code_version="1")
    with pytest.raises(fb.BadInput, match="code"):
        await fb.run(source, str(out), Worker(), settings={"model": "a"}, code_version="2")
    replaced = Worker(prompt="new {question}")
    await fb.run(source, str(out), replaced, settings={"model": "b"}, code_version="1", overwrite=True)
    assert fb.read_output(str(out))["response"].to_pylist() == [f"echo: new question {i}" for i in range(10)]


async def test_without_a_version_the_code_of_run_chunk_counts(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 4), str(tmp_path / "out")
    worker = Worker()

    async def plain(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, worker.solver, prompt="{question}")

    async def changed(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, worker.solver, prompt="again: {question}")

    await fb.run(source, out, plain)
    assert (await fb.run(source, out, plain)).chunks_reused == 1
    with pytest.raises(fb.BadInput, match="code"):
        await fb.run(source, out, changed)


async def test_a_limit_takes_the_first_rows_and_raising_it_reuses_what_is_done(tmp_path: Path) -> None:
    source, worker = questions(tmp_path / "in.jsonl", 40), Worker()
    await go(source, tmp_path / "out", Worker(), chunk_size=10, limit=20)
    summary = await go(source, tmp_path / "out", worker, chunk_size=10, limit=35)
    assert (summary.rows, summary.chunks_reused, len(worker.chunks)) == (35, 2, 2)


async def test_too_many_failed_rows_fail_the_run_without_a_manifest(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": "x" if i % 2 else None} for i in range(20)])
    with pytest.raises(fb.TooManyFailures, match=r"of 20 rows failed.*max_failure_rate 0\.4"):
        await go(source, tmp_path / "out", Worker(), chunk_size=5, max_failure_rate=0.4)
    assert not (tmp_path / "out" / "_manifest.json").exists()
    summary = await go(source, tmp_path / "out", Worker(), chunk_size=5, max_failure_rate=0.5)
    assert summary.failures == 10


async def test_a_run_without_a_single_answer_fails_whatever_rate_is_allowed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "question": None}, {"id": 2, "question": ""}])
    with pytest.raises(fb.TooManyFailures, match="no row was answered"):
        await go(source, tmp_path / "out", Worker())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0; leave it out"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_failure_rate": 1.5}, "max_failure_rate must be between"),
        ({"required_columns": ["questoin"]}, "has no column 'questoin' .did you mean 'question'"),
        ({"columns": ["nope"]}, "has no column 'nope'"),
        ({"columns": ["id"], "required_columns": ["question"]}, "which --columns leaves out: add it"),
    ],
)
async def test_options_that_cannot_work_are_refused_before_a_chunk_starts(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    worker = Worker()
    with pytest.raises(fb.BadInput, match=message):
        await go(questions(tmp_path / "in.jsonl", 3), tmp_path / "out", worker, **options)
    assert worker.chunks == []


@pytest.mark.parametrize(
    ("rows", "options", "warned"),
    [
        (400, {"chunk_size": 10, "concurrency": 4, "batch_rows": 64}, True),
        (400, {"chunk_size": 16, "concurrency": 4, "batch_rows": 64}, False),
        (400, {"chunk_size": 10, "concurrency": 7, "batch_rows": 64}, False),
        (40, {"chunk_size": 10, "concurrency": 4, "batch_rows": 64}, False),  # there is no more
        (80, {"chunk_size": 10, "concurrency": 4, "batch_rows": 64, "replicas": 2}, False),  # nor a replica's share
        (400, {"concurrency": 4, "batch_rows": 64}, False),  # planned
    ],
)
async def test_chunks_that_cannot_fill_a_batch_are_warned_about_with_the_size_that_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, options: dict[str, Any], warned: bool
) -> None:
    await go(questions(tmp_path / "in.jsonl", rows), tmp_path / "out", Worker(), **options)
    warnings = [record.getMessage() for record in caplog.records if record.name == "flyte_batch.driver"]
    expected = (
        "warning: chunks of 10 rows x concurrency 4 give a replica 40 rows at once, fewer than the 64 of a full "
        "batch: its device will wait. Raise chunk_size to 32 or the replicas' concurrency to 13"
    )
    assert warnings == ([expected] if warned else [])


async def test_a_resumed_run_says_which_rows_are_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = questions(tmp_path / "in.jsonl", 95), tmp_path / "out"

    async def said() -> list[str]:
        await go(source, output, Worker(), chunk_size=10, concurrency=8, progress="plain")
        return capsys.readouterr().out.splitlines()

    lines = await said()
    assert not [line for line in lines if "earlier" in line]
    for part in sorted(output.glob("part-*.parquet"))[:3]:
        part.unlink()
    begun, *lines, last = await said()
    assert begun == "7 of 10 chunks (65 of 95 rows) are finished already, by earlier runs"
    assert lines[-1].startswith("95/95 rows (100%), 65 by earlier runs, ")
    assert re.match(r"95 rows, 65 by earlier runs, 0 failed; .*, device busy .*; 10 parts, 7 of them kept: ", last)
    begun, last = await said()
    assert begun == "10 of 10 chunks (95 of 95 rows) are finished already, by earlier runs"
    assert re.match(r"95 rows, all by earlier runs, 0 failed; [^,]*; 10 parts, 10 of them kept: ", last)


async def test_the_last_rows_of_a_run_that_is_resumed_are_no_reason_to_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, worker = questions(tmp_path / "in.jsonl", 400), Worker()
    worker.fail = {39}
    options = {"chunk_size": 10, "concurrency": 4, "batch_rows": 64}
    with pytest.raises(fb.ChunkFailed):
        await go(source, tmp_path / "out", worker, **options)
    caplog.clear()
    await go(source, tmp_path / "out", Worker(), **options)
    assert [record for record in caplog.records if record.name == "flyte_batch.driver"] == []


async def test_29_of_100_failed_rows_are_not_more_than_a_rate_of_0_29(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": None if i < 29 else "x"} for i in range(100)])
    assert (await go(source, tmp_path / "out", Worker(), max_failure_rate=0.29)).failures == 29


async def test_a_resumed_run_that_is_over_its_rate_starts_no_chunk(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": None if i < 10 else "x"} for i in range(100)])
    with pytest.raises(fb.TooManyFailures):
        await go(source, tmp_path / "out", Worker(), chunk_size=10, concurrency=1, max_failure_rate=0.05)
    again = Worker()
    with pytest.raises(fb.TooManyFailures):
        await go(source, tmp_path / "out", again, chunk_size=10, max_failure_rate=0.05)
    assert again.chunks == []


async def test_by_default_more_than_half_of_many_rows_may_not_fail_but_of_a_few_they_may(tmp_path: Path) -> None:
    for rows, fails in ((102, True), (9, False)):
        source = write_jsonl(tmp_path / f"{rows}.jsonl", [{"question": None if i % 3 else "x"} for i in range(rows)])
        if fails:
            with pytest.raises(fb.TooManyFailures, match=r"max_failure_rate 0\.5"):
                await go(source, tmp_path / f"out-{rows}", Worker())
        else:
            assert (await go(source, tmp_path / f"out-{rows}", Worker())).failures == 6


async def test_chunks_with_failed_rows_are_done_again_when_asked_for(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 30), tmp_path / "out"
    flawed = Worker(fb.FakeEngine(fail_on=["question 12"]))
    assert (await go(source, out, flawed, chunk_size=10)).failures == 1
    kept, mended = Worker(), Worker()
    assert (await go(source, out, kept, chunk_size=10)).failures == 1
    assert kept.chunks == []
    assert (await go(source, out, mended, chunk_size=10, retry_failures=True)).failures == 0
    assert [chunk.index for chunk in mended.chunks] == [1]
    assert fb.read_output(str(out))["error"].to_pylist() == [None] * 30


async def test_an_output_is_cut_as_it_was_begun(tmp_path: Path) -> None:
    source, again = questions(tmp_path / "in.jsonl", 40), Worker()
    await go(source, tmp_path / "out", Worker(), chunk_size=7)
    summary = await go(source, tmp_path / "out", again, replicas=3, concurrency=9, batch_rows=64)
    assert (again.chunks, summary.chunks_reused) == ([], 6)


async def test_bad_input_in_a_worker_stops_the_run_at_once_and_no_re_run_is_advised_for_it_alone(
    tmp_path: Path,
) -> None:
    worker = Worker(prompt="{questoin}")
    with pytest.raises(fb.ChunkFailed, match=r"BadInput: the prompt reads column 'questoin'.*fix that, then"):
        await go(questions(tmp_path / "in.jsonl", 50), tmp_path / "out", worker, chunk_size=1, concurrency=1)
    assert len(worker.chunks) == 1


async def test_the_error_names_the_first_chunk_of_those_that_failed(tmp_path: Path) -> None:
    worker = Worker()
    worker.fail = {3, 1}
    with pytest.raises(fb.ChunkFailed, match="2 of 5 chunks failed; first: chunk 1 "):
        await go(questions(tmp_path / "in.jsonl", 5), tmp_path / "out", worker, chunk_size=1)


async def test_a_run_that_another_plan_overtook_takes_its_parts_away(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 40), tmp_path / "out"
    may_end = asyncio.Event()

    class Slow(Worker):
        async def __call__(self, chunk: fb.Chunk) -> fb.ChunkReport:
            report = await super().__call__(chunk)
            if chunk.index == 0:
                begun.set()
            await may_end.wait()
            return report

    begun = asyncio.Event()
    overtaken = asyncio.create_task(go(source, out, Slow(), chunk_size=4))
    await begun.wait()
    assert (await go(source, out, Worker(), chunk_size=20)).rows == 40
    may_end.set()
    with pytest.raises(fb.ChunkFailed, match="have no part"):
        await overtaken
    assert pq.read_table(out)["id"].to_pylist() == list(range(40))  # as any reader of the folder sees it


async def test_a_run_that_was_overwritten_while_it_worked_does_not_commit(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 8), tmp_path / "out"
    begun, may_end = asyncio.Event(), asyncio.Event()

    class Slow(Worker):
        async def __call__(self, chunk: fb.Chunk) -> fb.ChunkReport:
            report = await super().__call__(chunk)
            begun.set()
            await may_end.wait()
            return report

    old = asyncio.create_task(fb.run(source, str(out), Slow(), settings={"p": 1}, code_version="1", chunk_size=2))
    await begun.wait()
    new = Worker(prompt="new {question}")
    await fb.run(source, str(out), new, settings={"p": 2}, code_version="1", chunk_size=4, overwrite=True)
    may_end.set()
    with pytest.raises(RunError, match="another run took over"):
        await old
    assert pq.read_table(out)["response"].to_pylist() == [f"echo: new question {i}" for i in range(8)]


async def test_fewer_rows_than_are_finished_are_refused_unless_told_to_overwrite(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 30), tmp_path / "out"
    await go(source, out, Worker(), chunk_size=10)
    with pytest.raises(fb.BadInput, match="holds 30 finished rows and this run has only 5"):
        await go(source, out, Worker(), limit=5)
    assert fb.read_output(str(out)).num_rows == 30
    assert (await go(source, out, Worker(), limit=5, overwrite=True)).rows == 5


async def test_a_folder_that_was_begun_without_a_part_is_anyones(tmp_path: Path) -> None:
    source, out, broken = questions(tmp_path / "in.jsonl", 3), tmp_path / "out", Worker()
    broken.fail = {0}
    with pytest.raises(fb.ChunkFailed):
        await fb.run(source, str(out), broken, settings={"model": "broken"}, code_version="1")
    assert (await fb.run(source, str(out), Worker(), settings={"model": "mended"}, code_version="1")).rows == 3


async def test_a_finished_output_that_lost_its_run_file_is_still_cut_as_it_was(tmp_path: Path) -> None:
    source, again = questions(tmp_path / "in.jsonl", 30), Worker()
    await go(source, tmp_path / "out", Worker(), chunk_size=7)
    (tmp_path / "out" / "_run.json").unlink()
    assert (await go(source, tmp_path / "out", again)).chunks_reused == 5
    assert again.chunks == []


async def test_two_drivers_at_once_leave_every_row_exactly_once(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 100)
    summaries = await asyncio.gather(
        *(go(source, tmp_path / "out", Worker(), chunk_size=7, concurrency=2) for _ in range(2))
    )
    assert [summary.rows for summary in summaries] == [100, 100]
    assert fb.read_output(str(tmp_path / "out"))["id"].to_pylist() == list(range(100))


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_chunks_fail_in_whatever_runs_the_output_is_that_of_an_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    rows, size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
    source = questions(folder / "in.jsonl", rows)

    async def main() -> None:
        for _ in range(data.draw(st.integers(0, 3))):
            worker = Worker()
            worker.fail = data.draw(st.sets(st.integers(0, rows // size)))
            with contextlib.suppress(fb.ChunkFailed):
                await go(source, folder / "out", worker, chunk_size=size, concurrency=data.draw(st.integers(1, 5)))
        await go(source, folder / "out", Worker(), chunk_size=size)
        await go(source, folder / "undisturbed", Worker(), chunk_size=size)

    asyncio.run(main())
    assert fb.read_output(str(folder / "out")).equals(fb.read_output(str(folder / "undisturbed")))


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
async def test_a_clock_that_is_set_while_a_run_goes_on_costs_its_figures_nothing(
    tmp_path: Path, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker()
    true_time, jumped = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: true_time() + jumped)

    async def answer(chunk: fb.Chunk) -> fb.ChunkReport:
        nonlocal jumped
        jumped = jump_s if chunk.index >= 5 else 0.0
        return await worker(chunk)

    output = tmp_path / "out"
    await fb.run(questions(tmp_path / "in.jsonl", 100), str(output), answer, code_version="1", chunk_size=10)
    (log,) = logs_of(locate(output))
    assert 0 < log.seconds < 600
    shares = log.time_shares()
    assert min(astuple(shares)) >= 0
    assert 0 < shares.total < 600
    assert shares.busy > 0
    assert all(chunk.started and chunk.ended and chunk.started <= chunk.ended for chunk in log.chunks)


@pytest.mark.parametrize("lag_s", [-3600.0, 3600.0])
async def test_a_replica_whose_clock_is_off_is_reckoned_with_by_the_drivers(tmp_path: Path, lag_s: float) -> None:
    worker = Worker()

    async def elsewhere(chunk: fb.Chunk) -> fb.ChunkReport:
        report = await worker(chunk)
        details = ChunkDetails.from_json(report.details).later(-lag_s)
        return replace(report, details=details.to_json())

    output = tmp_path / "out"
    await fb.run(questions(tmp_path / "in.jsonl", 100), str(output), elsewhere, code_version="1", chunk_size=10)
    (log,) = logs_of(locate(output))
    assert 0 < log.time_shares().total < 600
    assert 0 < log.replica_seconds < 600
    assert all(log.started <= (chunk.started or 0) <= (chunk.ended or 0) <= log.ended for chunk in log.chunks)


async def test_fan_out_keeps_as_many_under_way_as_allowed_and_takes_items_late() -> None:
    gates = [asyncio.Event() for _ in range(6)]
    started: list[int] = []
    taken: list[int] = []
    two_started = asyncio.Event()

    async def call(i: int) -> int:
        started.append(i)
        if len(started) == 2:
            two_started.set()
        await gates[i].wait()
        if i == 1:
            raise ValueError("one")
        return i

    outcomes = fan_out((taken.append(i) or i for i in range(6)), call, 2)
    first = asyncio.ensure_future(anext(outcomes))
    await two_started.wait()
    assert (started, taken) == ([0, 1], [0, 1])
    gates[1].set()
    ((item, error),) = await first
    assert (item, type(error)) == (1, ValueError)
    assert taken == [0, 1]
    for gate in gates:
        gate.set()
    assert sorted([item async for together in outcomes for item, _ in together]) == [0, 2, 3, 4, 5]


async def test_leaving_fan_out_cancels_what_is_under_way() -> None:
    cancelled: list[int] = []

    async def call(i: int) -> int:
        if i:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(i)
                raise
        return i

    outcomes = fan_out(range(10), call, 3)
    assert await anext(outcomes) == [(0, 0)]
    await outcomes.aclose()
    assert sorted(cancelled) == [1, 2]


async def test_a_call_that_was_cancelled_elsewhere_is_a_failed_call_and_not_our_cancellation() -> None:
    async def call(i: int) -> int:
        raise asyncio.CancelledError

    assert [type(outcome) async for together in fan_out([1], call, 1) for _, outcome in together] == [RuntimeError]


async def test_what_ended_at_the_same_time_is_heard_of_before_a_run_stops(tmp_path: Path) -> None:
    """Parts that lie there are in the log, though the run failed on the first of them."""
    all_there = asyncio.Barrier(4)

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        report = await worker(chunk)
        await all_there.wait()
        return report

    worker = Worker(prompt="{nothing}")
    source = write_jsonl(tmp_path / "in.jsonl", [{"nothing": ""} for _ in range(80)])
    with pytest.raises(fb.TooManyFailures, match="40 of 80 rows failed"):
        await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=10, max_failure_rate=0.1)
    (log,) = logs_of(locate(tmp_path / "out"))
    assert (log.rows, log.rows_done, len(list((tmp_path / "out").glob("part-*.parquet")))) == (40, 40, 4)
