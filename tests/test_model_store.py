"""Prefetched models: complete or absent, begun again where they broke off, and what the engines take."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
from pyarrow import fs as pafs

import flyte_batch as fb
from flyte_batch.data import copying, storage
from flyte_batch.data.storage import Location
from flyte_batch.demo import model_path
from flyte_batch.engines import choose_engine
from flyte_batch.engines.stored import LIST_NAME
from tests.helpers import ENVIRONMENT, ROOT

FILES = sorted(path.name for path in model_path().iterdir())
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path(), tmp_path / "source"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "demo"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An object store in memory, as pyarrow sees one: ``memory://bucket/...``."""
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    locate = storage.locate

    def locate_in_memory(path: str | os.PathLike[str]) -> Location:
        text = os.fspath(path)
        if text.startswith("memory://"):
            return Location(filesystem, text.removeprefix("memory://"), "memory://")
        return locate(path)

    monkeypatch.setattr(storage, "locate", locate_in_memory)
    yield memory
    memory.rm("/", recursive=True)


def written(folder: Path) -> dict[str, int]:
    """When each file was written (ns); hidden ones included."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def prefetch(model: str | Path, folder: str | Path) -> fb.PrefetchedModel:
    return asyncio.run(fb.prefetch(model, folder))


Pieces = Callable[[Location, int, Callable[[Any], Any], threading.Event], None]


def before(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, Callable[[Any], Any]], object]) -> None:
    """Do something before a file is copied: ``act`` gets its name and what writes to its copy."""
    whole: Pieces = copying._copy_pieces

    def copy(source: Location, size: int, write: Callable[[Any], Any], stop: threading.Event) -> None:
        act(source.name, write)
        whole(source, size, write, stop)

    monkeypatch.setattr(copying, "_copy_pieces", copy)


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Let the copying of a file fail when a part of it is written."""

    def act(of: str, write: Callable[[Any], Any]) -> None:
        if of == name:
            write(bytes(6 << 20))  # a part of an upload
            raise error

    before(monkeypatch, act)


RESET = OSError("connection reset")


# -- The copy ---------------------------------------------------------------


def test_the_copy_is_the_same_model_under_the_name_that_is_returned(source: Path, folder: Path) -> None:
    done = prefetch(source, folder)
    assert (done.location, done.files, done.copied) == (str(folder), len(FILES), len(FILES))
    assert done.size == sum(path.stat().st_size for path in source.iterdir())
    assert sorted(written(folder)) == [LIST_NAME, *FILES]
    assert choose_engine("auto", done.location).identity == choose_engine("auto", "demo").identity


async def test_a_prefetched_model_answers(source: Path, folder: Path) -> None:
    done = await fb.prefetch(source, f"file://{folder}")
    async with await fb.CTranslate2Engine.start(done.location) as engine:
        (completion,) = await engine.infer([engine.prepare(fb.Prompt("What is 2 plus 2?"))])
    assert isinstance(completion, fb.Completion)


def test_folders_below_are_copied_and_hidden_files_are_not(source: Path, folder: Path) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("x")
    (source / ".gitattributes").write_text("x")
    prefetch(source, folder)
    assert (folder / "1_Pooling" / "config.json").read_text() == "{}"
    assert sorted(written(folder)) == [LIST_NAME, "1_Pooling", *FILES]


def test_a_model_goes_to_an_object_store_and_comes_back(bucket: Any, source: Path, folder: Path) -> None:
    there = prefetch(source, "memory://bucket/models/demo")
    assert there.location == "memory://bucket/models/demo"
    names = sorted(path.rpartition("/")[2] for path in bucket.ls("/bucket/models/demo", detail=False))
    assert names == [LIST_NAME, *FILES]
    back = prefetch(there.location, folder)
    assert (back.source, back.copied) == (there.location, len(FILES))
    assert choose_engine("auto", back.location).identity == choose_engine("auto", "demo").identity
    assert prefetch(there.location, folder).copied == 0


@pytest.mark.parametrize(("kind", "last"), [("ctranslate2", "model.bin"), ("hf", "config.json")])
def test_the_list_comes_first_and_the_file_without_which_nothing_loads_comes_last(
    monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, last: str
) -> None:
    there: dict[str, set[str]] = {}
    before(monkeypatch, lambda name, _: there.update({name: {path.name for path in folder.iterdir()}}))
    done = prefetch(model_path(kind), folder)  # type: ignore[arg-type]
    assert len(there) == done.files
    assert all(LIST_NAME in names for names in there.values())
    assert set(there) - there[last] == {last}


def test_what_is_there_is_not_copied_again(source: Path, folder: Path) -> None:
    prefetch(source, folder)
    untouched = written(folder)
    assert prefetch(source, folder).copied == 0
    assert written(folder) == untouched


# -- Breaking off -----------------------------------------------------------

KILLED = """
import asyncio, sys, time
import flyte_batch as fb
from flyte_batch.data import copying
model, folder, name = sys.argv[1:]
whole = copying._copy_pieces
def copy(source, size, write, stop):
    if source.name == name:
        write(b"x" * (size // 2))
        print("half", flush=True)
        time.sleep(600)
    whole(source, size, write, stop)
copying._copy_pieces = copy
asyncio.run(fb.prefetch(model, folder))
"""


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json", "config.json"])
def test_a_killed_prefetch_leaves_a_model_that_is_refused_and_is_finished_by_the_next(
    source: Path, folder: Path, name: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(source), str(folder), name]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    kept = {each: when for each, when in written(folder).items() if not each.startswith(".")}
    assert name not in kept
    assert "model.bin" not in kept
    with pytest.raises(fb.BadInput, match=r"copied by half.*wait for its prefetch to end, or run it again"):
        choose_engine("auto", str(folder))
    again = prefetch(source, folder)
    assert again.copied == len(FILES) - len(kept)
    assert {each: written(folder)[each] for each in kept} == kept
    assert choose_engine("auto", str(folder)).identity == choose_engine("auto", "demo").identity


def test_a_leftover_of_a_killed_prefetch_goes_when_it_is_old(source: Path, folder: Path) -> None:
    prefetch(source, folder)
    old, new = folder / ".tmp-old", folder / ".tmp-new"
    for path in (old, new):
        path.touch()
    os.utime(old, (1e9, 1e9))
    prefetch(source, folder)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json"])
def test_a_copy_that_fails_leaves_no_file_of_it_and_the_same_call_does_the_rest(
    monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path, name: str
) -> None:
    with monkeypatch.context() as patch:
        breaking(patch, name, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            prefetch(source, folder)
    assert name not in written(folder)
    assert not list(folder.glob(".tmp-*"))
    again = prefetch(source, folder)
    assert 1 <= again.copied <= len(FILES)
    assert choose_engine("auto", str(folder)).identity == choose_engine("auto", "demo").identity


def test_a_copy_that_fails_stops_the_others(monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path) -> None:
    whole: Pieces = copying._copy_pieces

    def copy(of: Location, size: int, write: Callable[[Any], Any], stop: threading.Event) -> None:
        if of.name == "config.json":
            raise RESET
        if of.name == "tokenizer.json":
            stop.wait(10)
        whole(of, size, write, stop)

    monkeypatch.setattr(copying, "_copy_pieces", copy)
    with pytest.raises(OSError, match="connection reset"):
        prefetch(source, folder)
    assert "tokenizer.json" not in written(folder)


def test_an_upload_that_fails_leaves_no_object_and_none_of_another_process_is_lost(
    monkeypatch: pytest.MonkeyPatch, bucket: Any, source: Path
) -> None:
    uri, key = "memory://bucket/demo", "/bucket/demo/tokenizer.json"
    content = (source / "tokenizer.json").read_bytes()

    with monkeypatch.context() as patch:
        breaking(patch, "tokenizer.json", RESET)
        with pytest.raises(OSError, match="connection reset"):
            prefetch(source, uri)
    assert not bucket.exists(key)
    with monkeypatch.context() as patch:
        breaking(patch, "tokenizer.json", RESET)
        look = copying.entry

        def found_whole(location: Location) -> storage.Entry | None:
            bucket.pipe(key, content)  # another process was as far just now
            return look(location)

        patch.setattr(copying, "entry", found_whole)
        with pytest.raises(OSError, match="connection reset"):
            prefetch(source, uri)
    assert bucket.cat(key) == content
    assert prefetch(source, uri).files == len(FILES)


def test_a_file_that_another_call_takes_away_meanwhile_is_copied_again(
    monkeypatch: pytest.MonkeyPatch, bucket: Any, source: Path
) -> None:
    def take_away(name: str, _: object) -> None:
        if name == "vocabulary.json":
            while not bucket.exists("/bucket/demo/config.json"):
                time.sleep(0.01)
            bucket.rm("/bucket/demo/config.json")

    before(monkeypatch, take_away)
    assert prefetch(source, "memory://bucket/demo").copied == len(FILES) + 1
    assert bucket.cat("/bucket/demo/config.json") == (source / "config.json").read_bytes()


def test_a_source_that_changes_meanwhile_is_found(monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path) -> None:
    def change(name: str, _: object) -> None:
        if name == "vocabulary.json":
            with (source / name).open("a") as file:
                file.write(" ")

    before(monkeypatch, change)
    with pytest.raises(OSError, match=r"vocabulary\.json is \d+ bytes long and was \d+: it changed"):
        prefetch(source, folder)
    assert "vocabulary.json" not in written(folder)


async def test_cancelled_it_stops_and_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path
) -> None:
    half, go = threading.Event(), threading.Event()

    def wait(name: str, write: Callable[[Any], Any]) -> None:
        if name == "tokenizer.json":
            write(b"a part")
            half.set()
            go.wait()

    def ended() -> None:
        while any(thread.name.startswith("prefetch") for thread in threading.enumerate()):
            time.sleep(0.01)

    before(monkeypatch, wait)
    call = asyncio.create_task(fb.prefetch(source, folder))
    await asyncio.to_thread(half.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go.set()
    await asyncio.to_thread(ended)
    assert not {"tokenizer.json", "model.bin"} & written(folder).keys()
    assert not [name for name in written(folder) if name.startswith(".tmp-")]


async def test_two_at_once_make_one_whole_model(monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path) -> None:
    together = threading.Barrier(2)
    # Both have found that it is not there.
    before(monkeypatch, lambda name, _: together.wait(30) if name == "chat_template.jinja" else None)
    done = await asyncio.gather(fb.prefetch(source, folder), fb.prefetch(source, folder))
    assert [each.files for each in done] == [len(FILES)] * 2
    assert choose_engine("auto", str(folder)).identity == choose_engine("auto", "demo").identity
    assert sorted(written(folder)) == [LIST_NAME, *FILES]


def test_one_that_looks_while_another_begins_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path
) -> None:
    look, others = storage.entries, iter([True])

    def look_late(at: Location, **options: Any) -> list[storage.Entry]:
        if next(others, False):
            prefetch(source, folder)
        return look(at, **options)

    monkeypatch.setattr(storage, "entries", look_late)
    assert prefetch(source, folder).copied == 0


# -- What is refused --------------------------------------------------------


@pytest.mark.parametrize("kind", ["ctranslate2", "hf"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_model_in_which_any_file_is_missing_or_cut_is_refused_before_anything_starts(
    folder: Path, kind: str, damage: str
) -> None:
    engine = "vllm" if kind == "hf" else "ctranslate2"
    prefetch(model_path(kind), folder)  # type: ignore[arg-type]
    assert choose_engine(engine, str(folder), here=False).engine == engine
    for path in [path for path in folder.iterdir() if path.name != LIST_NAME]:
        content = path.read_bytes()
        if damage == "cut":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        with pytest.raises(
            fb.BadInput, match=rf"copied by half: of its \d+ files 1 are missing or cut, such as {path.name}"
        ):
            choose_engine(engine, str(folder), here=False)
        path.write_bytes(content)


def test_a_folder_that_holds_another_model_or_anything_else_is_refused_and_left_alone(
    source: Path, folder: Path
) -> None:
    prefetch(source, folder)
    untouched = written(folder)
    with pytest.raises(fb.BadInput, match=r"holds another model.*choose a new folder"):
        prefetch(model_path("hf"), folder)
    weights = bytearray((source / "model.bin").read_bytes())
    weights[1000] ^= 1
    (source / "model.bin").write_bytes(weights)
    with pytest.raises(fb.BadInput, match="or another version of it"):
        prefetch(source, folder)
    assert written(folder) == untouched
    with pytest.raises(fb.BadInput, match="holds files that no prefetch put there"):
        prefetch(folder, source)


def test_another_model_that_comes_into_the_folder_meanwhile_is_noticed_before_the_last_file(
    monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path, tmp_path: Path
) -> None:
    prefetch(model_path("hf"), tmp_path / "other")
    before(monkeypatch, lambda *_: shutil.copy(tmp_path / "other" / LIST_NAME, folder))
    with pytest.raises(fb.BadInput, match="holds another model"):
        prefetch(source, folder)
    assert "model.bin" not in written(folder)


def test_a_source_that_is_copied_by_half_is_refused(source: Path, folder: Path, tmp_path: Path) -> None:
    prefetch(source, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(fb.BadInput, match=r"copied by half.*tokenizer\.json"):
        prefetch(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("nowhere", "is not there, and is no Hugging Face id"),
        ("/nowhere/at/all", "is not there"),
        ("README.md", "is a file: name the folder"),
        ("docs", "there is no model in docs: looked for"),
        ("s5://bucket/model", "can't open s5://"),
    ],
)
def test_says_what_is_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, why: str) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(fb.BadInput, match=why):
        prefetch(model, folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(fb.BadInput, match="file"):
        prefetch(source, tmp_path / "file" / "models")


# -- Hugging Face -----------------------------------------------------------


class Hub:
    """Stands for Hugging Face: a cache with one repository, laid out as huggingface_hub does, with links to blobs."""

    def __init__(self, cache: Path, files: dict[str, Path]) -> None:
        self.snapshot = cache / "models--owner--demo" / "snapshots" / COMMIT
        self.files = files
        self.asked: list[str | None] = []

    def download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repository == "owner/demo"
        self.asked.append(revision)
        blobs = self.snapshot.parent.parent / "blobs"
        for folder in (self.snapshot, blobs):
            folder.mkdir(parents=True, exist_ok=True)
        for name, path in self.files.items():
            if (
                any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
                and not (self.snapshot / name).exists()
            ):
                shutil.copy(path, blobs / name)
                (self.snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub", {path.name: path for path in model_path("hf").iterdir()})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_a_hugging_face_model_is_copied_file_by_file_and_named_by_its_commit(hub: Hub, folder: Path) -> None:
    hub.files["pytorch_model.bin"] = hub.files["model.safetensors"]  # the same weights once more
    done = prefetch("owner/demo", folder)
    assert (done.source, done.files) == (f"owner/demo@{COMMIT}", 6)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert "pytorch_model.bin" not in written(folder)
    assert choose_engine("vllm", str(folder), here=False).identity == choose_engine("vllm", "demo", here=False).identity


def test_a_commit_that_is_there_is_not_downloaded_again_and_a_branch_is_looked_up(hub: Hub, folder: Path) -> None:
    prefetch("owner/demo", folder)
    shutil.rmtree(hub.snapshot)
    assert prefetch(f"owner/demo@{COMMIT}", folder).copied == 0
    assert hub.asked == [None]
    assert prefetch("owner/demo@main", folder).copied == 0
    assert hub.asked == [None, "main"]
    (folder / "tokenizer.json").unlink()
    assert prefetch(f"owner/demo@{COMMIT}", folder).copied == 1


def test_a_model_without_safetensors_is_copied_with_its_older_weights(hub: Hub, folder: Path) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    prefetch("owner/demo", folder)
    assert (folder / "pytorch_model.bin").is_file()
    assert choose_engine("vllm", str(folder), here=False).engine == "vllm"


# -- S3 ---------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a stand-in for S3, which pyarrow and Flyte find by their environment variables."""
    server = pytest.importorskip("moto.server", reason="the stand-in for S3 comes with make test-runtime")
    boto3 = pytest.importorskip("boto3")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "FLYTE_AWS_ENDPOINT": endpoint,
        "FLYTE_AWS_ACCESS_KEY_ID": "id", "FLYTE_AWS_SECRET_ACCESS_KEY": "secret", "AWS_ALLOW_HTTP": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
    yield f"s3://bucket/{uuid.uuid4().hex}/demo"  # moto's buckets outlive its server
    moto.stop()


def test_on_s3_too_a_copy_is_whole_or_absent_and_is_finished_by_the_same_call(
    s3: str, monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path
) -> None:
    with (source / "model.bin").open("ab") as file:
        file.write(bytes(40 << 20))  # uploaded in several parts

    for name in ("tokenizer.json", "model.bin"):
        with monkeypatch.context() as patch:
            breaking(patch, name, RESET)
            with pytest.raises(OSError, match="connection reset"):
                prefetch(source, s3)
        left = {each.name for each in storage.entries(storage.locate(s3))}
        assert not {name, "model.bin"} & left
    done = prefetch(source, s3)
    assert (done.location, done.copied) == (s3, 1)
    assert prefetch(source, s3).copied == 0
    prefetch(s3, folder)
    assert choose_engine("auto", str(folder)).identity == choose_engine("auto", str(source)).identity
