"""``workflows/generate.py``, whole, on two replicas while the storage fails: no row lost, none twice, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as ds
import pytest

import flyte_batch as fb
from tests.runtime.jobs import CHUNK_ROWS, ROWS, SLOW, Job, lost
from workflows import generate as workflow

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run
    from tests.runtime.object_store import Fault, ObjectStore
    from tests.runtime.replica import Replica

Record = Callable[[str, object], None]
MakeJob = Callable[[str], Job]


async def failed(run: Run, timeout_s: float = 60) -> str:
    """Wait for a run's bad end; gives its error."""
    await run.ended(timeout_s)
    assert run.phase == "FAILED"
    return run.error


# -- A disk that is full ----------------------------------------------------


class FullDisk:
    """A small disk of its own, with an output folder on it."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "out"
        self._filler = folder / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError):  # no space left
            self._filler.write_bytes(bytes(2 << 20))

    def make_room(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FullDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk here: {mounted.stderr.strip()}")
    yield FullDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk_job(
    disk: FullDisk, cluster: Cluster, generate_bundle: Callable[..., Path], tmp_path: Path, record_property: Record
) -> MakeJob:
    """Makes a job with its output on the small disk; takes code for the end of its bundle."""
    return lambda fault: Job(cluster, generate_bundle(fault), tmp_path, record_property, disk.output)


@pytest.mark.fault(
    "the disk of the output is full from the start", "found before a replica starts; works after room is made"
)
async def test_a_disk_that_is_full_from_the_start_is_found_before_any_replica_starts(
    disk: FullDisk, disk_job: MakeJob
) -> None:
    job = disk_job(SLOW)
    disk.fill()
    error = await failed(await job.start())
    assert error.startswith(f"BadInput: can't write to the output folder {disk.output}: No space left on device; ")
    assert job.cluster.pools == {}
    disk.make_room()
    job.check(await (await job.start()).result())


@pytest.mark.fault(
    "the disk of the output runs full",
    "the run fails and names path and reason; after room is made, the same command does the rest",
)
async def test_a_disk_that_runs_full_fails_the_run_and_the_same_command_does_the_rest(
    disk: FullDisk, disk_job: MakeJob
) -> None:
    job = disk_job(SLOW)
    run = await job.start()
    await job.half_done(run)
    disk.fill()
    error = await failed(run)
    assert error.startswith("ChunkFailed: ")
    assert f"can't write {disk.output}/part-" in error
    assert "No space left on device" in error
    assert "run the same command again" in error
    assert list(disk.output.glob(".tmp-*")) == []
    done = job.parts()
    assert len(done) >= 6
    disk.make_room()
    summary = await (await job.start()).result()
    job.check(summary)
    assert summary.chunks_reused >= len(done)  # a write that was cut off by the end may still get through
    assert {name: job.parts()[name] for name in done} == done


FULL_AT_COMMIT = """
from pathlib import Path
from flyte_batch.data.output import Output as _Output
_commit = _Output.commit
def _full_at_commit(self, chunks):
    filler = Path({folder!r}, "filler")
    if not Path({flag!r}).exists():
        Path({flag!r}).touch()
        try:
            filler.write_bytes(bytes(2 << 20))
        except OSError:
            pass
    return _commit(self, chunks)
_Output.commit = _full_at_commit
"""


@pytest.mark.fault(
    "the disk is full when the manifest is written",
    "the run fails and names it; the same command writes it and infers nothing again",
)
async def test_a_manifest_that_does_not_fit_is_written_by_the_same_command_without_any_inference(
    disk: FullDisk, disk_job: MakeJob, tmp_path: Path
) -> None:
    job = disk_job(FULL_AT_COMMIT.format(folder=str(disk.output.parent), flag=str(tmp_path / "filled")))
    error = await failed(await job.start())
    manifest = disk.output / "_manifest.json"
    assert error == f"OSError: [Errno 28] can't write {manifest}: No space left on device"
    assert not manifest.exists()
    assert list(disk.output.glob(".tmp-*")) == []
    disk.make_room()
    again = await job.start()
    summary = await again.result()
    job.check(summary)
    assert summary.chunks_reused == summary.chunks
    assert again.children == []


# -- A replica that is killed ------------------------------------------------

KILL = """
import os, signal
from pathlib import Path
_calls = 0
def _kill_once(calls):
    "At that call in a process, in the first process that gets there."
    global _calls
    _calls += 1
    if _calls == calls and not Path({flag!r}).exists():
        Path({flag!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""

WHILE_WRITING = """
from flyte_batch.data import storage as _storage
_write_local = _storage._write_local
def _killed_while_writing(path, data):
    if data[:4] == b"PAR1":
        _write_local(path, data[: len(data) // 2])
        _kill_once(2)
        os.unlink(path)
    _write_local(path, data)
_storage._write_local = _killed_while_writing
"""

WHILE_LOADING = """
_start = _Engine.start
async def _killed_while_loading(*given, **more):
    engine = await _start(*given, **more)
    _kill_once(1)
    return engine
_Engine.start = _killed_while_loading
"""


@pytest.fixture
def killed(
    cluster: Cluster, generate_bundle: Callable[..., Path], tmp_path: Path, record_property: Record
) -> Callable[[str], Job]:
    """Makes a job in which one replica kills itself, where the given code says so."""

    def make(where: str) -> Job:
        fault = SLOW + KILL.format(flag=str(tmp_path / "killed")) + where
        return Job(cluster, generate_bundle(fault), tmp_path, record_property)

    return make


@pytest.mark.fault(
    "a replica is killed while it writes a part", "half a part is no part; another replica does its calls"
)
async def test_a_replica_killed_while_it_writes_a_part_leaves_nothing_that_a_reader_sees(
    killed: Callable[[str], Job],
) -> None:
    job = killed(WHILE_WRITING)
    run = await job.start()
    job.check(await run.result())
    (victim,) = job.cluster.pools["generate-cpu"].ended
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    assert 1 <= len(lost(run)) <= 4
    assert 1 <= len(list(job.output.glob(".tmp-*"))) <= len(lost(run))
    assert ds.dataset(job.output, format="parquet").count_rows() == ROWS


@pytest.mark.fault(
    "a replica is killed while its model loads", "another replica does its calls; a new one takes its place"
)
async def test_a_replica_killed_while_its_model_loads_costs_only_its_calls(killed: Callable[[str], Job]) -> None:
    job = killed(WHILE_LOADING)
    run = await job.start()
    job.check(await run.result())
    (victim,) = job.cluster.pools["generate-cpu"].ended
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    assert 1 <= len(lost(run)) <= 4
    assert len(await job.cluster.pools["generate-cpu"].up()) == 2


# -- An object store that fails ----------------------------------------------


class StoreJob(Job):
    """A run whose source and output are in an S3 store."""

    def __init__(self, store: ObjectStore, *given: Any) -> None:
        super().__init__(*given)
        self.store = store
        store.put("in/problems.jsonl", Path(self.source).read_bytes())
        self.output = "s3://bucket/out"

    async def start(self, **options: object) -> Run:
        source = "s3://bucket/in/problems.jsonl"
        given = {"source": source, "output": self.output, "chunk_size": CHUNK_ROWS}
        return await self.cluster.start(workflow.main, self.bundle, **(given | options))

    def parts(self) -> dict[str, int]:
        """Committed parts and how often each was asked to be written."""
        keys = [request.key for request in self.store.requests if request.method == "PUT"]
        return {key: keys.count(key) for key in self.store.objects("out/part-")}

    def breaks(self, kind: str, **rule: Any) -> Fault:
        from tests.runtime.object_store import Fault

        return self.store.add(Fault(kind, **rule))

    def check(self, summary: fb.RunSummary, *, failures: int = 0) -> None:
        super().check(summary, failures=failures)
        names = [key.removeprefix("out/") for key in self.store.objects("out/")]
        # A report that the store did not take is a warning, and no fault of the run.
        parts = [name for name in names if name.startswith("part-")]
        assert set(names) - set(parts) - {"_report.html", "_report.json"} == {"", "_manifest.json", "_run.json"}
        assert len(parts) == summary.chunks
        self._check_secrets()

    def _check_secrets(self) -> None:
        """The keys are in no log, no input or output of a task, no manifest and no part."""
        written = {str(path): path.read_bytes() for path in self.cluster.folder.rglob("*") if path.is_file()}
        for name, content in {**written, **self.store.objects("out/")}.items():
            for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                assert self.store.env[variable].encode() not in content, name


@pytest.fixture
async def store_job(
    tmp_path: Path, bundle: Callable[..., Path], record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[str], StoreJob]]:
    """Makes a job on an S3 store; takes code for the end of its bundle."""
    from tests.runtime.cluster import Cluster
    from tests.runtime.object_store import ObjectStore

    with ObjectStore() as store:
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        async with Cluster(tmp_path / "cluster", env=store.env).up() as cluster:
            yield lambda fault: StoreJob(store, cluster, bundle("workflows.generate", fault), tmp_path, record_property)


def holder(replicas: list[Replica], fault: Fault) -> Replica:
    """The replica that made the request that the fault broke."""
    import psutil

    port = fault.broken[0].port
    (found,) = [
        replica
        for replica in replicas
        if any(each.laddr.port == port for each in psutil.Process(replica.executor()).net_connections())
    ]
    return found


async def test_a_part_is_one_request_to_the_store(store_job: Callable[[str], StoreJob]) -> None:
    job = store_job("")
    run = await job.start()
    job.check(await run.result())
    assert set(job.parts().values()) == {1}
    assert lost(run) == []
    assert {request.method for request in job.store.requests if "/part-" in request.key} == {"PUT", "HEAD", "GET"}
    temporary = {request.key for request in job.store.requests if "/.tmp-" in request.key}
    assert len(temporary) == 1  # by which the driver finds out whether it may write there


@pytest.mark.fault(
    "the object store is busy, fails or breaks off in one of six requests", "requests are repeated, no call is lost"
)
async def test_one_in_six_requests_broken_costs_no_call(store_job: Callable[[str], StoreJob]) -> None:
    job = store_job("")
    faults = [job.breaks(kind, every=every) for kind, every in (("SlowDown", 14), ("InternalError", 16), ("reset", 18))]
    run = await job.start()
    job.check(await run.result())
    assert lost(run) == []
    broken = sum(len(fault.broken) for fault in faults)
    assert broken >= len(job.store.requests) / 6


@pytest.mark.fault("the object store is away for a moment", "requests wait for it, no call is lost")
async def test_a_store_that_is_away_for_a_moment_costs_no_call(store_job: Callable[[str], StoreJob]) -> None:
    job = store_job(SLOW)
    run = await job.start()
    await job.half_done(run)
    away = job.breaks("SlowDown")
    await asyncio.to_thread(away.wait_for, 20)  # eight calls at once, each of which waits longer and longer
    away.mend()
    job.check(await run.result())
    assert lost(run) == []


@pytest.mark.fault(
    "the object store refuses everything from the middle on",
    "the run fails and names path and reason; once it may again, the same command does the rest",
)
async def test_a_store_that_refuses_fails_the_run_and_the_same_command_does_the_rest(
    store_job: Callable[[str], StoreJob],
) -> None:
    job = store_job(SLOW)
    run = await job.start()
    await job.half_done(run)
    refusal = job.breaks("AccessDenied")
    error = await failed(run)
    done = job.parts()
    assert error.startswith("ChunkFailed: ")
    assert "BadInput: can't " in error
    assert "ACCESS_DENIED" in error
    assert "s3://bucket/" in error
    assert "run the same command again" in error
    refusal.mend()
    summary = await (await job.start()).result()
    job.check(summary)
    assert summary.chunks_reused >= len(done) >= 6  # as above
    assert {name: job.parts()[name] for name in done} == done


@pytest.mark.fault("a write to the object store gets no answer", "it is given up and made again, no call is lost")
async def test_a_request_without_an_answer_is_given_up_and_made_again(store_job: Callable[[str], StoreJob]) -> None:
    job = store_job("\nfrom flyte_batch.data import storage as _storage\n_storage.S3_REQUEST_TIMEOUT_S = 1.0\n")
    stalled = job.breaks("stall", methods=("PUT",), keys="out/part-*", times=1)
    run = await job.start()
    job.check(await run.result())
    assert len(stalled.broken) == 1
    assert lost(run) == []


@pytest.mark.fault(
    "a replica is killed while it uploads a part", "there is no such part; another replica does its calls"
)
async def test_a_replica_killed_while_it_uploads_a_part_leaves_nothing_in_the_store(
    store_job: Callable[[str], StoreJob],
) -> None:
    job = store_job(SLOW)
    stalled = job.breaks("stall", methods=("PUT",), keys="out/part-*", times=1)
    run = await job.start()
    replicas = await job.half_done(run)
    key = stalled.broken[0].key
    assert key not in job.store.objects()
    victim = holder(replicas, stalled)
    victim.kill_executor()
    job.check(await run.result())
    assert {attempt.where for attempt in lost(run)} == {victim.worker.id}
    assert key in job.store.objects()


async def test_an_upload_in_pieces_that_fails_leaves_the_old_content(store_job: Callable[[str], StoreJob]) -> None:
    from flyte_batch.data import storage

    job = store_job("")
    target = storage.locate("s3://bucket/out/part")
    storage.write_atomically(target, b"old")
    refused = job.breaks("AccessDenied", methods=("PUT",), keys="out/part", every=2)
    with pytest.raises(fb.BadInput, match=r"can't write s3://bucket/out/part: .*ACCESS_DENIED"):
        await asyncio.to_thread(storage.write_atomically, target, bytes(25 << 20))
    refused.mend()
    assert [request.method for request in refused.broken] == ["PUT"]
    assert storage.read_bytes(target) == b"old"


async def test_a_read_of_a_few_bytes_is_tried_again_like_any_other(store_job: Callable[[str], StoreJob]) -> None:
    from flyte_batch.data import storage

    job = store_job("")
    content = bytes(range(256)) * 400
    job.store.put("file", content)
    with storage.open_file(storage.locate("s3://bucket/file")) as file:
        for offset, length in ((0, 4), (len(content) - 8, 8)):
            busy = job.breaks("SlowDown", methods=("GET",), times=1)
            read = await asyncio.to_thread(storage.read_range, file, offset, length)
            assert read == content[offset : offset + length]
            assert len(busy.broken) == 1
