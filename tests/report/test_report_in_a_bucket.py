"""A report of an output in an object store: an in-memory one behind pyarrow's file system interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from pyarrow import fs as pafs

from flyte_batch.cli.report import command
from flyte_batch.data import storage
from flyte_batch.report.history import LOG_FILE
from flyte_batch.report.keeper import PAGE_FILE, ReportKeeper
from flyte_batch.report.run_log import logs_from_json
from tests.report.logs import make_log
from tests.report.parsing import parse


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    filesystem, locate = pafs.PyFileSystem(pafs.FSSpecHandler(memory)), storage.locate

    def locate_in_memory(path: str | os.PathLike[str]) -> storage.Location:
        text = os.fspath(path)
        if text.startswith("memory://"):
            return storage.Location(filesystem, text.removeprefix("memory://"), "memory://")
        return locate(path)

    monkeypatch.setattr(storage, "locate", locate_in_memory)
    memory.mkdirs("/b/out", exist_ok=True)
    yield memory
    memory.rm("/", recursive=True)


async def test_a_run_leaves_its_report_in_the_bucket_and_it_is_made_again_from_there(bucket: Any) -> None:
    log = make_log()
    async with ReportKeeper(log, storage.locate("memory://b/out")):
        pass
    assert logs_from_json(bucket.cat(f"/b/out/{LOG_FILE}")) == [log]
    left = bucket.cat(f"/b/out/{PAGE_FILE}")
    assert parse(left.decode()).all("h1")
    bucket.rm(f"/b/out/{PAGE_FILE}")
    result = CliRunner().invoke(command, ["memory://b/out"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"report: memory://b/out/{PAGE_FILE}"
    assert bucket.cat(f"/b/out/{PAGE_FILE}") == left
