"""JSON logs: one flat line an event, filtered by action as log tools do it, whatever the events hold."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import pytest

import flyte_batch as fb
from flyte_batch.monitoring import events, hooks
from flyte_batch.monitoring.events import Scope, Share
from flyte_batch.monitoring.json_logs import JsonLogs
from flyte_batch.monitoring.scope import process_name, scope_entered

ANNA = Scope("run-a", "a1", "chunk-a", 3)
BOB = Scope("run-b", "b1", "chunk-b", 4)
HEAD = ["event", "time", "level", "run", "action", "chunk", "chunk_index", "replica", "batcher", "batch"]

ONE_OF_EACH: list[events.Event] = [
    events.RecordsSubmitted(1.0, "b", ANNA, 2, 3.0, 4),
    events.BatchFormed(1.0, "b", 1, 2, 3.0, 0.5, 4),
    events.BatchDone(1.0, "b", 1, 0.5, 2, 0, 3.0, 0.5, False, (Share(ANNA, 2, 0, 3.0, ((0.5, 2),)),)),
    events.RecordFailed(1.0, ANNA, "infer", "BadRecord", "too long", "b"),
    events.ChunkStarted(1.0, ANNA, 2),
    events.ChunkDone(1.0, ANNA, 2, 1, 10, 20, 0.5, MappingProxyType({"BadRecord": 1})),
    events.ChunkFailed(1.0, ANNA, "EngineDead", "gone", 0.5),
    events.EngineLoading(1.0, "solver"),
    events.EngineLoaded(1.0, "solver", 0.5),
    events.EngineStarted(1.0, "b", "FakeEngine"),
    events.EngineDied(1.0, "b", "FakeEngine", "EngineDead", "gone", 2),
    events.LoopBlocked(1.0, 1.5, "work (mine.py)"),
    events.RunStarted(1.0, ANNA, "out", 2, 0, 1, 0),
    events.ChunkReported(1.0, ANNA, "chunk-x", 7, 2),
    events.RunEnded(1.0, ANNA, "out", 2, 1, 0.5),
]


def lines_of(*given: events.Event, **options: Any) -> list[dict[str, Any]]:
    stream = io.StringIO()
    logs = JsonLogs(stream, **options)
    for event in given:
        logs.on_event(event)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@contextlib.contextmanager
def logging_to(stream: TextIO) -> Iterator[None]:
    unsubscribe = hooks.subscribe(JsonLogs(stream))
    try:
        yield
    finally:
        unsubscribe()


def test_every_event_there_is_becomes_a_line_with_the_same_head_and_its_own_fields() -> None:
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)}
    assert kinds - {events.Event} == {type(event) for event in ONE_OF_EACH}
    lines = lines_of(*ONE_OF_EACH)
    assert len(lines) == len(ONE_OF_EACH)
    for line, event in zip(lines, ONE_OF_EACH, strict=True):
        assert list(line)[: len(HEAD)] == HEAD
        assert line["time"] == "1970-01-01T00:00:01.000000Z"
        assert line["replica"] == process_name()
        own = {field.name for field in dataclasses.fields(event)} - {"at", "scope", "shares"}
        assert own <= set(line)
        if isinstance(getattr(event, "scope", None), Scope):
            assert (line["run"], line["action"]) == ("run-a", "a1")
    assert [line["event"] for line in lines[:3]] == ["records_submitted", "batch_formed", "batch_done"]
    assert lines[5]["causes"] == {"BadRecord": 1}


def test_a_line_that_reports_a_chunk_names_that_chunk_and_the_drivers_action() -> None:
    (line,) = lines_of(events.ChunkReported(1.0, Scope("run-a", "driver"), "chunk-x", 7, 2))
    assert (line["action"], line["chunk"], line["chunk_index"]) == ("driver", "chunk-x", 7)


def test_a_batch_is_a_line_for_each_caller_and_their_records_add_up_to_it() -> None:
    shares = (Share(ANNA, 3, 1, 6.0, ((0.5, 2), (1.1, 1))), Share(BOB, 2, 0, 4.0, ((0.25, 2),)))
    anna, bob = lines_of(events.BatchDone(9.0, "b", 7, 8.5, 5, 1, 10.0, 0.5, False, shares))
    assert (anna["action"], anna["chunk"], anna["chunk_index"], anna["batch"]) == ("a1", "chunk-a", 3, 7)
    assert (anna["records"], anna["failed"], anna["cost"], anna["level"]) == (3, 1, 6.0, "warning")
    assert (anna["latency_mean"], anna["latency_max"]) == (0.7, 1.1)
    assert (bob["action"], bob["records"], bob["failed"], bob["level"]) == ("b1", 2, 0, "debug")
    for line in (anna, bob):
        assert (line["batch_records"], line["batch_failed"], line["batch_cost"]) == (5, 1, 10.0)
        assert (line["started_at"], line["fill"], line["out_of_memory"]) == (8.5, 0.5, False)


def test_a_batch_that_is_tried_again_is_nobodys_and_adds_no_records() -> None:
    (line,) = lines_of(events.BatchDone(9.0, "b", 7, 8.5, 5, 5, 10.0, 0.5, True, ()))
    assert (line["run"], line["records"], line["failed"], line["cost"]) == ("", 0, 0, 0)
    assert (line["batch_records"], line["out_of_memory"], line["level"]) == (5, True, "warning")


@pytest.mark.parametrize("continuous", [False, True])
async def test_in_a_shared_batcher_a_filter_by_action_finds_all_records_of_that_action_and_no_others(
    continuous: bool,
) -> None:
    stream = io.StringIO()
    fail = {f"{name} 0" for name in ("a", "b")}
    batcher: Any = (
        fb.ContinuousBatcher(fb.FakeContinuousEngine(fail_on=fail))
        if continuous
        else fb.EngineBatcher(fb.FakeEngine(fail_on=fail), batch_timeout_s=0.01)
    )

    async def ask(scope: Scope, name: str, count: int) -> None:
        with scope_entered(scope):
            prompts = [batcher.engine.prepare(fb.Prompt(f"{name} {i}")) for i in range(count)]
            await batcher.map(prompts, return_exceptions=True)

    with logging_to(stream):
        async with batcher:
            await asyncio.gather(ask(ANNA, "a", 30), ask(BOB, "b", 20))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    done = [line for line in lines if line["event"] == "batch_done"]
    for action, count in (("a1", 30), ("b1", 20)):
        mine = [line for line in done if line["action"] == action]
        assert sum(line["records"] for line in mine) == count
        assert sum(line["failed"] for line in mine) == 1
        failures = [line for line in lines if line["event"] == "record_failed" and line["action"] == action]
        assert [(line["stage"], line["error"]) for line in failures] == [("infer", "BadRecord")]
    batches = [(line["batcher"], line["batch"]) for line in done]
    assert len(set(batches)) < len(batches), "no batch was shared"


@pytest.mark.parametrize("failing", [False, True])
async def test_no_prompt_and_no_response_is_logged_even_if_errors_quote_them_when_told_so(failing: bool) -> None:
    stream = io.StringIO()
    engine = fb.FakeEngine(lambda text: f"the answer to {text} is hush", fail_on={"sesame 1"} if failing else ())
    unsubscribe = hooks.subscribe(JsonLogs(stream, message_chars=0 if failing else 200))
    try:
        async with fb.EngineBatcher(engine) as batcher:
            records = [engine.prepare(fb.Prompt(f"sesame {i}")) for i in range(3)]
            results = await batcher.map(records, return_exceptions=True)
    finally:
        unsubscribe()
    assert any("hush" in str(getattr(result, "text", "")) for result in results)
    assert any("sesame" in str(result) for result in results if isinstance(result, Exception)) is failing
    logged = stream.getvalue()
    assert '"batch_done"' in logged
    assert "hush" not in logged
    assert "sesame" not in logged


def test_messages_are_cut_or_left_out_and_cannot_break_a_line() -> None:
    event = events.RecordFailed(1.0, ANNA, "finish", "ValueError", 'first"\n\x1b[31m\ud800' + "x" * 10_000)
    (line,) = lines_of(event)
    assert len(line["message"]) == 200
    assert line["message"].startswith('first"\n\x1b[31m\ud800xxx')
    stream = io.StringIO()
    JsonLogs(stream).on_event(event)
    assert re.fullmatch(r"[\x20-\x7e]+\n", stream.getvalue())
    (line,) = lines_of(event, message_chars=0)
    assert line["message"] == ""


def test_levels_leave_out_what_is_below() -> None:
    by_level = {level: [line["level"] for line in lines_of(*ONE_OF_EACH, level=level)] for level in
                ("debug", "info", "warning", "error")}  # fmt: skip
    assert len(by_level["debug"]) == len(ONE_OF_EACH)
    assert len(by_level["info"]) == len(ONE_OF_EACH) - 3
    assert sorted(by_level["warning"]) == ["error", "error", "warning", "warning"]
    assert by_level["error"] == ["error", "error"]
    failed = [
        events.EngineLoaded(1.0, "solver", 0.5, "OSError"),
        events.ChunkReported(1.0, ANNA, "chunk-x", 7, 2, error="EngineDead"),
        events.RunEnded(1.0, ANNA, "out", 2, 1, 0.5, error="ChunkFailed"),
    ]
    assert [line["level"] for line in lines_of(*failed)] == ["error"] * 3
    shares = (Share(ANNA, 1, 1, 1.0, ()), Share(BOB, 1, 0, 1.0, ()))
    done = events.BatchDone(9.0, "b", 7, 8.5, 2, 1, 2.0, 0.5, False, shares)
    for level in ("info", "warning"):  # a caller whose records are all well is not told of
        assert [line["action"] for line in lines_of(done, level=level)] == ["a1"]
    assert [line["level"] for line in lines_of(done)] == ["warning", "debug"]


@pytest.mark.parametrize(("options", "named"), [({"level": "loud"}, "level"), ({"message_chars": -1}, "message_chars")])
def test_an_option_that_cannot_work_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(fb.BadInput, match=named):
        JsonLogs(**options)


def test_standard_error_is_looked_up_when_an_event_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = JsonLogs()
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logs.on_event(ONE_OF_EACH[0])
    assert json.loads(later.getvalue())["event"] == "records_submitted"


class Pieces(io.StringIO):
    """A stream that lets other threads in while it writes, and remembers what it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        for letter in text:
            super().write(letter)
            if letter == ",":
                time.sleep(0)
        return len(text)


def test_an_event_is_one_write_and_threads_do_not_mix_their_lines() -> None:
    stream = Pieces()
    logs = JsonLogs(stream)
    shares = (Share(ANNA, 1, 0, 1.0, ()), Share(BOB, 1, 0, 1.0, ()))
    done = events.BatchDone(9.0, "b", 7, 8.5, 2, 0, 2.0, 0.5, False, shares)
    threads = [threading.Thread(target=lambda: [logs.on_event(done) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stream.writes) == 80
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["action"] for line in lines] == ["a1", "b1"] * 80


def test_lines_are_in_the_file_before_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w") as stream:
        JsonLogs(stream).on_event(ONE_OF_EACH[0])
        assert json.loads(path.read_text())["event"] == "records_submitted"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' full disk")
@pytest.mark.parametrize("broken", ["full", "closed"])
async def test_a_stream_that_takes_nothing_fails_no_batch_and_is_said_once(
    broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path("/dev/full") if broken == "full" else tmp_path / "closed"
    stream = path.open("w")
    if broken == "closed":
        stream.close()
    try:
        with logging_to(stream), caplog.at_level(logging.WARNING):
            async with fb.EngineBatcher(fb.FakeEngine()) as batcher:
                prompts = [batcher.engine.prepare(fb.Prompt(f"p {i}")) for i in range(3)]
                results = await batcher.map(prompts)
    finally:
        with contextlib.suppress(OSError):
            stream.close()
    assert [result.text for result in results] == ["echo: p 0", "echo: p 1", "echo: p 2"]
    said = [record for record in caplog.records if "JsonLogs" in record.getMessage()]
    assert len(said) == 1


def test_a_forked_process_is_another_replica() -> None:
    read, write = os.pipe()
    logs = JsonLogs(os.fdopen(write, "w"))
    child = os.fork()
    if not child:
        logs.on_event(ONE_OF_EACH[0])
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(read) as stream:
        assert json.loads(stream.readline())["replica"].endswith(f"-{child}")
