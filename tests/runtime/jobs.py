"""A run of ``workflows/generate.py`` over generated problems, to break things in and to check afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from tests.helpers import write_jsonl
from workflows import generate as workflow

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster, Run
    from tests.runtime.replica import Replica

ROWS, CHUNK_ROWS = 600, 25
"""Two replicas take four chunks each at once, so the 24 chunks go in three rounds: faults come after the first."""


class Job:
    """A run of the workflow over `ROWS` problems, and what became of it."""

    def __init__(
        self,
        cluster: Cluster,
        bundle: Path,
        folder: Path,
        record_property: Callable[[str, object], None],
        output: Path | None = None,
    ) -> None:
        self.cluster, self.bundle, self._record = cluster, bundle, record_property
        self.output = output or folder / "out"
        problems = [{"question": p.question, "answer": p.answer} for p in generate(ROWS, 31)]
        self.source = write_jsonl(folder / "in.jsonl", problems)

    async def start(self, **options: object) -> Run:
        """Start the workflow; ``options`` are further ones of its ``main``."""
        given = {"source": Path(self.source).as_uri(), "output": self.output.as_uri(), "chunk_size": CHUNK_ROWS}
        return await self.cluster.start(workflow.main, self.bundle, **(given | options))

    def parts(self) -> dict[str, int]:
        """Committed parts and when they were written (ns)."""
        return {path.name: path.stat().st_mtime_ns for path in self.output.glob("part-*")}

    async def half_done(self, run: Run, parts: int = 6) -> list[Replica]:
        """Wait until some parts are there and calls are under way on both replicas; gives the replicas.

        Raises:
            AssertionError: the run ended before.
        """
        while True:
            assert not run.phase, f"too late: {run.phase} {run.error}"
            pool = self.cluster.pools.get("generate-cpu")
            replicas = list(pool.replicas) if pool is not None else []
            busy = len(replicas) == 2 and all(replica.worker.calls for replica in replicas)
            if busy and len(self.parts()) >= parts:
                return replicas
            await asyncio.sleep(0.01)

    async def has_ended_a_call(self, run: Run) -> Replica:
        """Wait until a replica has ended a call and has others under way; gives it.

        Raises:
            AssertionError: the run ended before.
        """
        while True:
            assert not run.phase, f"too late: {run.phase} {run.error}"
            used = {attempt.where for action in run.children for attempt in action.attempts}
            for replica in self.cluster.pools["generate-cpu"].replicas:
                if replica.worker.id in used and replica.worker.calls:
                    return replica
            await asyncio.sleep(0.01)

    def check(self, summary: fb.RunSummary, *, failures: int = 0) -> None:
        """Every row is there exactly once, in order, and right, and no process is left behind (or is for 10 s)."""
        import psutil

        assert (summary.rows, summary.failures, summary.chunks) == (ROWS, failures, ROWS // CHUNK_ROWS)
        table = fb.read_output(str(self.output))
        assert table["question"].to_pylist() == [p.question for p in generate(ROWS, 31)]
        right = sum(is_right(row["response"] or "", row["answer"]) for row in table.to_pylist())
        assert right >= 0.99 * ROWS - failures
        _, left = psutil.wait_procs(orphans(self.cluster), timeout=10)
        assert not left, f"left behind: {left}"
        self._record("rows", table.num_rows)
        self._record("failures", failures)
        self._record("repeated", sum(len(lost(run)) for run in self.cluster.runs.values()))


def orphans(cluster: Cluster) -> list[Any]:
    """Processes of the cluster, by the home folder that they inherit, whose bridge or driver is gone."""
    import psutil

    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == str(cluster.folder):
                ours.append(process)
    below = set(psutil.Process().children(recursive=True))
    return [process for process in ours if process not in below]


def lost(run: Run) -> list[Any]:
    """The attempts of chunks that did not end well."""
    return [attempt for action in run.children for attempt in action.attempts if attempt.error is not None]


SLOW = """
# -- from here on added by a test
from flyte_batch.engines.ctranslate2 import CTranslate2Engine as _Engine
_undelayed = _Engine.infer
async def _slow(self, batch):
    await asyncio.sleep(0.3)  # so that a test can break something meanwhile
    return await _undelayed(self, batch)
_Engine.infer = _slow
"""
