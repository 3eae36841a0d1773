"""``workflows/generate.py``, whole, by a real driver on two real replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import flyte_batch as fb
from flyte_batch.demo.problems import generate, is_right
from tests.helpers import write_jsonl
from workflows import generate as workflow

if TYPE_CHECKING:
    from tests.runtime.cluster import Cluster


def problems(path: Path, count: int) -> str:
    return write_jsonl(path, [{"question": p.question, "answer": p.answer} for p in generate(count, 31)])


async def test_every_row_is_answered_once_and_right_by_both_replicas(
    cluster: Cluster, generate_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = problems(tmp_path / "in.jsonl", 600), tmp_path / "out"
    run = await cluster.start(
        workflow.main, generate_bundle(), source=Path(source).as_uri(), output=output.as_uri(), chunk_size=25
    )
    summary = await run.result()
    assert (summary.rows, summary.failures, summary.chunks, summary.chunks_reused) == (600, 0, 24, 0)
    table = fb.read_output(str(output))
    assert table["question"].to_pylist() == [p.question for p in generate(600, 31)]
    assert sum(is_right(row["response"], row["answer"]) for row in table.to_pylist()) >= 594
    assert [len(action.attempts) for action in run.children] == [1] * 24
    used = Counter(action.attempts[0].where for action in run.children)
    assert set(used) == {replica.worker.id for replica in cluster.pools["generate-cpu"].replicas}
    assert len(used) == 2
    assert "600/600 rows (100%)" in run.log
