"""The same promises on storage that is no disk: an in-memory object store behind pyarrow's file system interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from flyte_batch.data import storage
from flyte_batch.data.chunks import Chunk, plan_chunks, read_chunk
from flyte_batch.data.output import Output, read_output
from flyte_batch.data.parts import write_part
from flyte_batch.data.sources import open_source
from flyte_batch.errors import BadInput
from flyte_batch.records import Completion

locate = storage.locate


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))

    def locate_in_memory(path: str | os.PathLike[str]) -> storage.Location:
        text = os.fspath(path)
        if text.startswith("memory://"):
            return storage.Location(filesystem, text.removeprefix("memory://"), "memory://")
        return locate(path)

    monkeypatch.setattr(storage, "locate", locate_in_memory)
    yield memory
    memory.rm("/", recursive=True)


def test_a_run_reads_and_commits_by_uri_and_leaves_no_temporary_file(bucket: Any) -> None:
    bucket.pipe("/b/in/a.jsonl", b'{"n": 0}\n{"n": 1}\n{"n": 2}\n')
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [3, 4]}), sink)
    bucket.pipe("/b/in/b.parquet", sink.getvalue().to_pybytes())
    for given in ("memory://b/in", "memory://b/in/*", "memory://b/**/[ab].*"):
        assert open_source(given).rows == 5
    source = open_source("memory://b/in")
    for _ in range(2):
        output = Output.open("memory://b/out", {"model": "m"}, source)
        chunks = plan_chunks(source, output.path, 2, settings={"model": "m"})
        assert [span.path for span in chunks[1].spans] == ["memory://b/in/a.jsonl", "memory://b/in/b.parquet"]
        done = output.resume(chunks)
        for chunk in chunks:
            if chunk.id not in done:
                write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)] * chunk.rows)
        output.commit(chunks)
    assert len(done) == 3
    assert read_output("memory://b/out")["n"].to_pylist() == [0, 1, 2, 3, 4]
    names = sorted(path.rpartition("/")[2] for path in bucket.ls("/b/out", detail=False))
    assert names == ["_manifest.json", "_run.json", *(chunk.part for chunk in chunks)]


def test_an_upload_that_breaks_off_leaves_no_part(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe("/b/a.jsonl", b'{"n": 0}\n')
    (chunk,) = plan_chunks(open_source("memory://b/a.jsonl"), "memory://b/out", 2, settings={})

    def break_off(*_: object, **__: object) -> None:
        raise OSError("connection reset")

    for step in ("mv", "move"):
        monkeypatch.setattr(bucket, step, break_off)
    with pytest.raises(OSError, match="connection reset"):
        write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)])
    assert not bucket.exists("/b/out") or bucket.ls("/b/out", detail=False) == []


def test_a_broken_connection_is_worth_a_retry_and_a_refusal_is_bad_input(tmp_path: Path) -> None:
    location = storage.locate(tmp_path)
    with pytest.raises(ConnectionResetError, match=f"can't read {tmp_path}: "), storage.explained("read", location):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(OSError, match=f"can't read {tmp_path}: .*SLOW_DOWN"), storage.explained("read", location):
        raise OSError("When reading: AWS Error SLOW_DOWN during GetObject operation")
    with pytest.raises(BadInput, match=f"can't read {tmp_path}: .*ACCESS_DENIED"), storage.explained("read", location):
        raise OSError("When reading: AWS Error ACCESS_DENIED during GetObject operation: Access Denied")


def finished_output(bucket: Any) -> tuple[Output, list[Chunk]]:
    """Two chunks of one row each, committed."""
    bucket.pipe("/b/a.jsonl", b'{"n": 0}\n{"n": 1}\n')
    source = open_source("memory://b/a.jsonl")
    output = Output.open("memory://b/out", {}, source)
    chunks = plan_chunks(source, output.path, 1, settings={})
    output.resume(chunks)
    for chunk in chunks:
        write_part(chunk, read_chunk(chunk), [Completion("x", "stop", 1, 1)])
    output.commit(chunks)
    return output, chunks


def away(bucket: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on files of that name can't be read, as from a store that is away."""
    opened = bucket.open

    def refuse(path: str, *given: Any, **more: Any) -> Any:
        if name in path:
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")
        return opened(path, *given, **more)

    monkeypatch.setattr(bucket, "open", refuse)


def test_a_store_that_is_away_is_said_to_be_and_its_parts_are_not_taken_for_missing_or_damaged(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, chunks = finished_output(bucket)
    with monkeypatch.context() as patch:
        away(bucket, patch, chunks[1].part)
        for ask in (output.resume, output.commit, lambda _: output.table()):
            with pytest.raises(OSError, match=f"can't read memory://b/out/{chunks[1].part}: .*SLOW_DOWN"):
                ask(chunks)
    assert output.manifest() is not None
    assert len(output.resume(chunks)) == 2


def test_a_connection_that_breaks_while_a_part_is_read_is_no_damage(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = finished_output(bucket)
    read = pq.read_table

    def break_off(source: Any, **options: Any) -> Any:
        if not isinstance(source, pa.BufferReader):
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
        return read(source, **options)

    monkeypatch.setattr(pq, "read_table", break_off)
    assert output.table()["n"].to_pylist() == [0, 1]


def test_a_run_that_ends_while_the_store_is_away_ends_with_its_own_error(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, chunks = finished_output(bucket)
    away(bucket, monkeypatch, "_run.json")
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Output.open("memory://b/out", {}, output.source)
    output.leave(chunks)  # the driver calls it on its way out, and raises what ended the run
    assert len(output.finished(chunks)) == 2


def test_an_option_of_an_s3_uri_that_is_not_known_is_refused_and_its_value_is_not_shown() -> None:
    with pytest.raises(BadInput, match=r"'secret_key': known are region, .* from the environment") as caught:
        storage.locate("s3://bucket/a.jsonl?region=eu-west-1&secret_key=hunter2")
    assert "hunter2" not in str(caught.value)


def test_what_pyarrows_s3_file_system_can_be_told_a_uri_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    made = pafs.S3FileSystem

    def make(**options: Any) -> pafs.S3FileSystem:
        given.append(options)
        return made(**options)

    monkeypatch.setattr(pafs, "S3FileSystem", make)
    storage._s3_filesystem.cache_clear()
    switches = "force_virtual_addressing=true&allow_bucket_creation=1&allow_bucket_deletion=False&anonymous=TRUE"
    storage.locate(f"s3://bucket/a?region=eu-west-1&allow_delayed_open=0&{switches}")
    storage.locate("s3://bucket/a?region=eu-west-1")
    told, usual = given
    assert told == usual | {
        "allow_delayed_open": False,
        "force_virtual_addressing": True,
        "allow_bucket_creation": True,
        "allow_bucket_deletion": False,
        "anonymous": True,
        "retry_strategy": told["retry_strategy"],
    }
    assert usual["allow_delayed_open"] is True


def test_a_switch_of_an_s3_uri_that_is_neither_on_nor_off_is_refused() -> None:
    with pytest.raises(BadInput, match="s3://bucket/a with the option allow_bucket_creation=yes: give true or false"):
        storage.locate("s3://bucket/a?region=eu-west-1&allow_bucket_creation=yes")


def test_files_of_one_bucket_share_connections_and_credentials() -> None:
    one = storage.locate("s3://bucket/a?region=eu-west-1")
    assert storage.locate("s3://bucket/b?region=eu-west-1").fs is one.fs
    assert storage.locate("s3://bucket/b?region=eu-west-2").fs is not one.fs


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("s3://bucket/folder/*.jsonl?region=eu-west-1&endpoint_override=localhost:9000", "bucket/folder/*.jsonl"),
        ("s3://bucket/a b/é[1].parquet?region=eu-west-1", "bucket/a b/é[1].parquet"),
    ],
)
def test_a_uri_keeps_its_options_for_every_file_in_it(uri: str, path: str) -> None:
    location = storage.locate(uri)
    assert location.path == path
    assert location.uri == uri
    query = uri[uri.index("?") :]
    assert location.parent.child("x.jsonl").uri == f"s3://{path.rpartition('/')[0]}/x.jsonl{query}"
