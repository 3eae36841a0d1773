from __future__ import annotations

import asyncio
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flyte_batch as fb
from flyte_batch.data import parts
from flyte_batch.data.chunks import plan_chunks
from flyte_batch.data.parts import read_part_info
from flyte_batch.data.sources import open_source
from flyte_batch.data.storage import locate
from flyte_batch.errors import EngineError
from flyte_batch.monitoring.details import ChunkDetails
from tests.helpers import questions, write_jsonl


def chunk_of(tmp_path: Path, source: str) -> fb.Chunk:
    (tmp_path / "out").mkdir(exist_ok=True)
    opened = open_source(source)
    (chunk,) = plan_chunks(opened, str(tmp_path / "out"), opened.rows, settings={})
    return chunk


def rows_of(chunk: fb.Chunk) -> list[dict[str, Any]]:
    return pq.read_table(Path(chunk.output) / chunk.part).to_pylist()


def solver_of(*engines: fb.FakeEngine, **options: Any) -> Any:
    """A singleton that starts the engines one after the other, each when the one before is gone."""
    left = list(engines)

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(left.pop(0), batch_timeout_s=0.001, **options)

    return solver


def continuous_solver(answer: Any) -> Any:
    @fb.singleton
    async def solver() -> fb.ContinuousBatcher[Any, Any]:
        return fb.ContinuousBatcher(fb.FakeContinuousEngine(answer))

    return solver


async def test_every_row_is_answered_in_the_sources_order(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 300))
    report = await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}?")
    rows = rows_of(chunk)
    assert [row["id"] for row in rows] == list(range(300))
    assert [row["response"] for row in rows] == [f"echo: question {i}?" for i in range(300)]
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert {row["error"] for row in rows} == {None}
    assert (report.rows, report.failures) == (300, 0)
    assert report.prompt_tokens == sum(row["prompt_tokens"] for row in rows) == 600
    assert report.response_tokens == sum(row["response_tokens"] for row in rows) == 900


async def test_a_null_an_oversized_and_a_poison_row_fail_alone_with_their_causes(tmp_path: Path) -> None:
    rows = [{"question": text} for text in ("fine", None, "long " * 50, "poison", "", "fine too")]
    chunk = chunk_of(tmp_path, write_jsonl(tmp_path / "in.jsonl", rows))
    engine = fb.FakeEngine(context=20, poison=["poison"])
    report = await fb.infer(chunk, solver_of(engine), prompt="{question}")
    out = rows_of(chunk)
    assert [row["response"] is None for row in out] == [False, True, True, True, True, False]
    assert "MissingValue: column 'question' is null" in out[1]["error"]
    assert "PromptTooLong: the prompt has 50 tokens" in out[2]["error"]
    assert "RuntimeError: the fake engine failed" in out[3]["error"]
    assert "MissingValue: the prompt is empty" in out[4]["error"]
    assert report.failures == 4


async def test_prompt_and_finish_can_be_functions_of_the_row(tmp_path: Path) -> None:
    def ask(row: Any) -> fb.Prompt:
        return fb.Prompt(f"{row['question']} #{row['id']}")

    def finish(row: Any, completion: fb.Completion) -> str:
        if row["id"] == 1:
            raise ValueError("cannot be parsed")
        return completion.text.upper() + str(row["id"])

    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt=ask, finish=finish)
    rows = rows_of(chunk)
    assert [row["response"] for row in rows] == ["ECHO: QUESTION 0 #00", None, "ECHO: QUESTION 2 #22"]
    assert rows[1]["error"] == "ValueError: cannot be parsed"


async def test_an_engine_that_dies_is_rebuilt_and_only_unanswered_rows_are_asked_again(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 100))
    first, second = fb.FakeEngine(dies_after=4), fb.FakeEngine()
    report = await fb.infer(chunk, solver_of(first, second, max_batch_size=10), prompt="{question}")
    assert report.failures == 0
    assert [row["response"] for row in rows_of(chunk)] == [f"echo: question {i}" for i in range(100)]
    answered = {text for batch in first.batches[:4] for text in batch}
    repeated = answered & {text for batch in second.batches for text in batch}
    assert first.closed
    assert not repeated
    details = ChunkDetails.from_json(report.details)
    dead, last = details.lives
    assert (dead.rows, dead.engine, [dead.batcher]) == (40, "FakeEngine", list(details.died))
    assert (last.rows, last.tokens) == (60, report.prompt_tokens + report.response_tokens - dead.tokens)
    assert dead.tokens == sum(row["prompt_tokens"] + row["response_tokens"] for row in rows_of(chunk)[:40])
    assert dead.samples[-1].batches == 5  # the last one under it
    assert dead.started <= dead.loaded <= dead.ended == last.started <= last.loaded <= last.ended


async def test_an_engine_that_dies_twice_fails_the_chunk_and_leaves_no_part(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 10))
    with pytest.raises((fb.EngineDead, fb.BatcherDied)):
        await fb.infer(chunk, solver_of(fb.FakeEngine(dies_after=0), fb.FakeEngine(dies_after=0)), prompt="{question}")
    assert read_part_info(locate(chunk.output).child(chunk.part)) is None


async def test_an_engine_that_dies_again_only_after_a_long_time_is_rebuilt_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flyte_batch.worker.DEATHS_APART_S", 0.0)
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 10))
    dying = [fb.FakeEngine(dies_after=0) for _ in range(3)]
    report = await fb.infer(chunk, solver_of(*dying, fb.FakeEngine()), prompt="{question}")
    assert report.failures == 0
    assert all(engine.closed for engine in dying)


async def test_a_continuous_batcher_serves_a_chunk_and_an_engine_that_dies_under_it_is_rebuilt(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 200))
    bad = ["question 7"]
    engines = iter([fb.FakeContinuousEngine(dies_after=50, fail_on=bad), fb.FakeContinuousEngine(fail_on=bad)])

    @fb.singleton
    async def solver() -> fb.ContinuousBatcher[Any]:
        return fb.ContinuousBatcher(next(engines))

    report = await fb.infer(chunk, solver, prompt="{question}")
    rows = rows_of(chunk)
    assert report.failures == 1
    assert "as told" in rows.pop(7)["error"]
    assert [row["response"] for row in rows] == [f"echo: question {i}" for i in range(200) if i != 7]
    await solver.aclose()


async def test_an_engine_that_answers_nothing_fails_the_chunk_instead_of_writing_failures_for_ever(
    tmp_path: Path,
) -> None:
    def broken(text: str) -> str:
        raise RuntimeError("CUDA error: unspecified launch failure")

    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 10))
    with pytest.raises(EngineError, match="answered none of 10 rows; the first error is RuntimeError: CUDA error"):
        await fb.infer(chunk, solver_of(fb.FakeEngine(broken)), prompt="{question}")
    assert read_part_info(locate(chunk.output).child(chunk.part)) is None


async def test_a_prompt_that_reads_a_column_that_is_not_there_is_bad_input_before_the_engine_starts(
    tmp_path: Path,
) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 2))
    with pytest.raises(fb.BadInput, match="reads column 'questoin'; the source has id, question"):
        await fb.infer(chunk, solver_of(), prompt="{questoin}")  # there is no engine to start


async def test_a_finish_that_returns_no_text_fails_its_row_only(tmp_path: Path) -> None:
    def finish(row: Any, completion: fb.Completion) -> Any:
        return completion.text if row["id"] else 7

    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 2))
    await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}", finish=finish)
    assert [row["error"] for row in rows_of(chunk)] == ["TypeError: finish returned int, not a text", None]


async def test_loading_the_engine_counts_as_time_in_which_the_device_was_not_busy(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 2))
    loading: list[float] = []

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        loading.append(time.time())
        return fb.EngineBatcher(fb.FakeEngine(), batch_timeout_s=0.001)

    report = await fb.infer(chunk, solver, prompt="{question}")
    details = ChunkDetails.from_json(report.details)
    (life,) = details.lives
    assert life.started <= loading[0] <= life.loaded <= life.samples[0].at


async def test_a_text_that_is_no_utf_8_fails_its_row_only(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(struct.pack("4i", 0, 1, 3, 4)), pa.py_buffer(b"a\xff\xfeb")]
    )
    pq.write_table(pa.table({"question": texts}), tmp_path / "in.parquet")
    chunk = chunk_of(tmp_path, str(tmp_path / "in.parquet"))
    await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}")
    part = pq.read_table(Path(chunk.output) / chunk.part)
    assert part["response"].to_pylist() == ["echo: a", None, "echo: b"]
    assert "column 'question' is no valid UTF-8" in part["error"].to_pylist()[1]


async def test_chunks_at_the_same_time_share_one_engine_and_its_batches(tmp_path: Path) -> None:
    opened = open_source(questions(tmp_path / "in.jsonl", 60))
    (tmp_path / "out").mkdir()
    chunks = plan_chunks(opened, str(tmp_path / "out"), 20, settings={})
    engine = fb.FakeEngine()

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(engine, batch_timeout_s=5, max_batch_size=60)

    reports = await asyncio.gather(*(fb.infer(chunk, solver, prompt="{question}") for chunk in chunks))
    assert len(engine.batches) == 1  # it left because it was full, long before its time was up
    assert len({ChunkDetails.from_json(report.details).batcher for report in reports}) == 1


async def test_a_cancelled_chunk_leaves_no_part_and_its_neighbour_alone(tmp_path: Path) -> None:
    opened = open_source(questions(tmp_path / "in.jsonl", 20))
    (tmp_path / "out").mkdir()
    one, two = plan_chunks(opened, str(tmp_path / "out"), 10, settings={})
    reached, gate = asyncio.Event(), asyncio.Event()

    async def answer(text: str) -> str:
        reached.set()
        await gate.wait()
        return text

    solver = solver_of(fb.FakeEngine(answer))
    tasks = [asyncio.create_task(fb.infer(chunk, solver, prompt="{question}")) for chunk in (one, two)]
    await reached.wait()
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    gate.set()
    assert (await tasks[1]).failures == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [two.part]


async def test_a_source_that_changed_since_the_plan_is_bad_input(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 5)
    chunk = chunk_of(tmp_path, source)
    write_jsonl(tmp_path / "in.jsonl", [{"id": i, "question": "another"} for i in range(5)])
    with pytest.raises(fb.BadInput, match="changed"):
        await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}")


class Seeds(fb.FakeEngine):
    """Notes the seed of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: dict[str, int | None] = {}

    def prepare(self, prompt: fb.Prompt | fb.Chat) -> Any:
        record = super().prepare(prompt)
        self.seeds[record.text] = prompt.seed
        return record


@pytest.mark.parametrize("rows_per_chunk", [2, 7, 100])
async def test_a_row_has_the_same_seed_in_chunks_of_any_size(tmp_path: Path, rows_per_chunk: int) -> None:
    for name, first in (("a", 0), ("b", 6)):  # a chunk may span files
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": f"q{i}"} for i in range(first, first + 6)])
    (tmp_path / "out").mkdir()
    engine = Seeds()
    solver = solver_of(engine)
    for chunk in plan_chunks(
        open_source(str(tmp_path / "*.jsonl")), str(tmp_path / "out"), rows_per_chunk, settings={}
    ):
        await fb.infer(chunk, solver, prompt="{question}")
    assert engine.seeds == {f"q{i}": i for i in range(12)}


async def test_a_prompt_functions_own_seed_stays_and_its_object_is_not_changed(tmp_path: Path) -> None:
    shared = fb.Chat([{"role": "user", "content": "the same"}])
    own = fb.Prompt("own", seed=77)
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 2))
    engine = Seeds()
    await fb.infer(chunk, solver_of(engine), prompt=lambda row: own if row["id"] else shared)
    assert engine.seeds == {"own": 77, "the same": 0}
    assert shared.seed is None


async def test_conversations_are_answered_and_a_broken_one_fails_alone(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": f"q{i}"}] for i in range(3)]
    messages[1] = [{"role": "user", "content": ""}]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "in.parquet")
    chunk = chunk_of(tmp_path, str(tmp_path / "in.parquet"))
    await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt=fb.ChatColumn("messages"))
    assert [row["response"] for row in rows_of(chunk)] == ["echo: q0", None, "echo: q2"]
    assert "messages[0], which the model is to answer, is empty" in rows_of(chunk)[1]["error"]


async def test_a_conversations_column_that_is_not_there_is_bad_input_before_the_engine_starts(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 2))
    with pytest.raises(fb.BadInput, match="reads column 'messages'; the source has id, question"):
        await fb.infer(chunk, solver_of(), prompt=fb.ChatColumn("messages"))


# -- The deadline of a chunk ------------------------------------------------


async def never(*_: object) -> Any:
    await asyncio.Event().wait()


async def test_a_chunk_that_takes_too_long_is_given_up_and_its_records_are_taken_back(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    answers = asyncio.Event()

    async def answer(text: str) -> str:
        if text == "question 0":
            return "at once"
        await answers.wait()
        return "late"

    solver = continuous_solver(answer)
    with pytest.raises(
        fb.DeadlineExceeded, match=r"chunk 0 \(rows 0-2\) was not done after 2 s: its rows were being answered"
    ):
        await fb.infer(chunk, solver, prompt="{question}", timeout_s=2)
    assert read_part_info(locate(chunk.output).child(chunk.part), chunk) is None
    batcher = await solver()
    assert (batcher.stats.running, batcher.stats.queued) == (0, 0)
    answers.set()
    assert (await fb.infer(chunk, solver, prompt="{question}", timeout_s=60)).failures == 0


async def test_the_deadline_says_what_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    with pytest.raises(fb.DeadlineExceeded, match="the model was still loading"):
        await fb.infer(chunk, fb.singleton(never), prompt="{question}", timeout_s=2)
    release = threading.Event()
    monkeypatch.setattr(parts, "write_part", lambda *_: release.wait(20))
    with pytest.raises(fb.DeadlineExceeded, match="its part was being written"):
        await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}", timeout_s=3)
    release.set()


async def test_a_timeout_of_the_users_own_is_not_taken_for_the_deadline(tmp_path: Path) -> None:
    async def load() -> Any:
        raise TimeoutError("the hub does not answer")

    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    with pytest.raises(TimeoutError, match="the hub does not answer") as raised:
        await fb.infer(chunk, fb.singleton(load), prompt="{question}", timeout_s=60)
    assert not isinstance(raised.value, fb.DeadlineExceeded)


async def test_a_cancelled_chunk_is_cancelled_whatever_its_deadline(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    solver = continuous_solver(never)
    call = asyncio.create_task(fb.infer(chunk, solver, prompt="{question}", timeout_s=60))
    batcher = await solver()
    while batcher.stats.running < 3:  # noqa: ASYNC110 - the batcher tells nobody
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("timeout_s", [0, -1.0])
async def test_a_deadline_that_is_over_before_it_begins_is_refused(tmp_path: Path, timeout_s: float) -> None:
    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 3))
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt="{question}", timeout_s=timeout_s)


async def test_examples_of_failed_rows_are_ones_that_say_different_things(tmp_path: Path) -> None:
    def ask(row: dict[str, Any]) -> str:
        match row["id"] % 3:
            case 0:
                raise ValueError(f"too long: {row['id']} tokens")
            case 1:
                raise ValueError("no question")
        return str(row["question"])

    chunk = chunk_of(tmp_path, questions(tmp_path / "in.jsonl", 12))
    report = await fb.infer(chunk, solver_of(fb.FakeEngine()), prompt=ask)  # type: ignore[arg-type]
    details = ChunkDetails.from_json(report.details)
    assert [(each.row, each.message) for each in details.examples] == [(0, "too long: 0 tokens"), (1, "no question")]
