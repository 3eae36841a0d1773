"""vLLM's own metrics come with ours, under the names that the dashboard asks for, and agree with the rows."""

from __future__ import annotations

import json
from pathlib import Path

from flyte_batch.demo.problems import generate
from tests.helpers import flyte_run, write_jsonl
from tests.monitoring.tools import VLLM_METRICS, Gateway, value

EAGER = '{"max_model_len": 512, "engine_args": {"enforce_eager": true, "distributed_executor_backend": "uni"}}'


def test_vllms_metrics_are_pushed_beside_ours_and_agree_with_them(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": problem.question} for problem in generate(60, 88_001)])
    gateway = Gateway()
    try:
        run = flyte_run(
            "generate.py", "--source", source, "--output", str(tmp_path / "out"), "--engine", "vllm",
            "--engine_options", EAGER, timeout_s=300, FLYTE_BATCH_MONITORING=f"push:http://{gateway.address}",
        )  # fmt: skip
    finally:
        gateway.close()
    assert run.returncode == 0, run.stdout + run.stderr
    series = gateway.pushes[-1][3]
    assert set(VLLM_METRICS) <= {name for name, _ in series}
    totals = json.loads((tmp_path / "out" / "_manifest.json").read_text())["totals"]
    assert totals["failures"] == 0

    def theirs(name: str) -> float:
        return sum(number for (found, _), number in series.items() if found == name)

    assert value(series, "flyte_batch_records_total", engine="VLLMEngine", outcome="ok") == totals["rows"] == 60
    prompts = theirs("vllm:prompt_tokens_total")
    assert prompts == value(series, "flyte_batch_tokens_total", kind="prompt") == totals["prompt_tokens"]
    # vLLM counts the end of a response as a token.
    responses = value(series, "flyte_batch_tokens_total", kind="response")
    assert theirs("vllm:generation_tokens_total") == totals["response_tokens"] + 60 == (responses or 0) + 60
