"""How `VLLMEngine` starts, fails to start, dies and ends: nothing hangs, and no process is left."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines import VLLMEngine, choose_engine, start_engine, vllm_start
from flyte_batch.engines.vllm_processes import EngineProcesses
from flyte_batch.errors import BadInput, EngineDead, EngineError, EngineOutOfMemory
from flyte_batch.processes import process_table
from flyte_batch.records import Completion, Prompt, SamplingParameters, StructuredOutput
from tests.helpers import ENVIRONMENT, ROOT
from tests.vllm_cpu.starting import FAST, MODEL, Start, start_demo

MULTIPLE = {"distributed_executor_backend": "mp"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[EngineProcesses]:
    """The processes of every start, those of failed ones too."""
    found: list[EngineProcesses] = []

    def note() -> EngineProcesses:
        found.append(EngineProcesses())
        return found[-1]

    monkeypatch.setattr(vllm_start, "EngineProcesses", note)
    return found


class TestDeath:
    async def test_a_killed_core_fails_what_runs_at_once_and_its_worker_is_ended(self, start: Start) -> None:
        engine = await start(sampling=SamplingParameters(max_tokens=450, ignore_eos=True), engine_args=MULTIPLE)
        processes = engine._launch.processes
        assert processes is not None
        core, worker = sorted(processes.alive)
        record = engine.prepare(Prompt("Ben has 3 cups."))
        running = [asyncio.ensure_future(engine.generate(record)) for _ in range(4)]
        while engine._engine.output_processor.get_num_unfinished_requests() < len(running):  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(core, signal.SIGKILL)
        killed = time.monotonic()
        done, pending = await asyncio.wait(running, timeout=10)
        assert not pending
        assert time.monotonic() - killed < 5
        for call in done:
            assert isinstance(call.exception(), EngineDead)
            assert "died, or was killed: start a new one" in str(call.exception())
        assert engine.errored
        with pytest.raises(EngineDead):
            await engine.infer([record])
        await engine.aclose()
        assert processes.alive == []
        assert {core, worker} <= set(processes._known)

    async def test_a_killed_worker_fails_what_runs(self, start: Start) -> None:
        engine = await start(sampling=SamplingParameters(max_tokens=450, ignore_eos=True), engine_args=MULTIPLE)
        processes = engine._launch.processes
        assert processes is not None
        worker = max(processes.alive)
        record = engine.prepare(Prompt("Ben has 3 cups."))
        running = [asyncio.ensure_future(engine.generate(record)) for _ in range(4)]
        while engine._engine.output_processor.get_num_unfinished_requests() < len(running):  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(worker, signal.SIGKILL)
        _, pending = await asyncio.wait(running, timeout=30)
        assert not pending
        assert all(isinstance(call.exception(), EngineDead) for call in running)
        await engine.aclose()
        assert processes.alive == []

    async def test_death_is_noticed_while_nothing_runs(self, start: Start) -> None:
        engine = await start()
        assert not engine.errored
        processes = engine._launch.processes
        assert processes is not None
        os.kill(processes.alive[0], signal.SIGKILL)
        killed = time.monotonic()
        while not engine.errored:
            assert time.monotonic() - killed < 5
            await asyncio.sleep(0.01)

    async def test_an_engine_that_ends_leaves_one_that_started_later_alone(self, start: Start) -> None:
        first, second = await start(), await start()
        await first.aclose()
        assert not second.errored
        (result,) = await second.infer([second.prepare(Prompt("Ben has 3 cups."))])
        assert isinstance(result, Completion)

    async def test_an_engine_of_a_closed_loop_can_be_closed_from_another(self) -> None:
        def elsewhere() -> VLLMEngine:
            return asyncio.run(start_demo())

        engine = await asyncio.to_thread(elsewhere)
        processes = engine._launch.processes
        assert processes is not None
        with pytest.raises(EngineDead, match="belongs to another event loop"):
            await engine.generate(engine.prepare(Prompt("Ben has 3 cups.")))
        await engine.aclose()
        assert processes.alive == []


class TestRefusedBeforeAProcessStarts:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"engine_args": {"max_num_sequences": 4}}, "engine_args holds 'max_num_sequences'.*did you mean"),
            ({"sampling_args": {"logit_biass": {}}}, "sampling_args holds 'logit_biass'.*did you mean 'logit_bias'"),
            ({"quantization": "nope"}, "vLLM refuses .* with these options"),
            ({"dtype": "float7"}, "vLLM refuses .* with these options"),
            ({"max_model_len": 1_000_000}, "vLLM refuses .*1000000"),
            ({"lora": "/nowhere"}, "lora: there is no folder /nowhere"),
            ({"lora": MODEL}, "lora: .* holds no adapter_config.json: name the folder of a LoRA adapter"),
            ({"sampling": SamplingParameters(temperature=3.0)}, "refuses the sampling parameters: temperature must be"),
            ({"sampling": SamplingParameters(stop_token_ids=(9999,))}, "refuses the sampling parameters: .*9999"),
            (
                {"sampling": SamplingParameters(structured=StructuredOutput(json_schema='{"type": "whole"}'))},
                "json_schema is no valid JSON schema",
            ),
            ({"sampling": SamplingParameters(structured=StructuredOutput(regex="(a"))}, "is no regular expression"),
            (
                {"sampling": SamplingParameters(structured=StructuredOutput(grammar="root ::= (("))},
                "refuses the sampling parameters",
            ),
        ],
        ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
    )
    async def test_with_one_line_that_names_the_option(
        self, start: Start, launched: list[EngineProcesses], options: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(BadInput, match=why) as caught:
            await start(**options)
        assert "\n" not in str(caught.value)
        assert launched == []

    @pytest.mark.parametrize(
        ("model", "why"),
        [
            ("nothing here", "there is no model 'nothing here'"),
            (f"file://{MODEL}", "name the folder itself"),
            (MODEL.parent / "ctranslate2", "converted for CTranslate2"),
            (MODEL.parent, "looked for config.json"),
        ],
    )
    async def test_a_model_that_is_none(self, start: Start, model: str | Path, why: str) -> None:
        with pytest.raises(BadInput, match=why):
            await start(model)


class TestFailedStarts:
    async def test_a_cache_that_is_too_small_names_the_length_that_fits(
        self, start: Start, launched: list[EngineProcesses]
    ) -> None:
        with pytest.raises(EngineOutOfMemory, match=r"set max_model_len=(\d+)") as caught:
            await start(max_model_len=None, engine_args={"kv_cache_memory_bytes": 600_000, **MULTIPLE})
        (failed,) = launched
        assert len(failed._known) >= 2  # a core, a worker
        assert failed.alive == []
        fits = int(str(caught.value).partition("set max_model_len=")[2].partition(" ")[0].rstrip(","))
        assert fits > 16
        engine = await start(max_model_len=fits, engine_args={"kv_cache_memory_bytes": 600_000})
        assert engine.context == fits

    async def test_a_share_of_memory_that_is_not_free_names_one_that_is(
        self, start: Start, launched: list[EngineProcesses]
    ) -> None:
        with pytest.raises(EngineOutOfMemory, match=r"set gpu_memory_utilization=0\.\d+") as caught:
            await start(gpu_memory_utilization=1.0)
        assert "\n" not in str(caught.value)
        assert [processes.alive for processes in launched] == [[]]

    async def test_weights_that_are_cut_say_what_vllm_says(
        self, start: Start, launched: list[EngineProcesses], tmp_path: Path
    ) -> None:
        model = Path(shutil.copytree(MODEL, tmp_path / "model"))
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(EngineError, match=r"vLLM cannot load .*model: SafetensorError") as caught:
            await start(model)
        assert "\n" not in str(caught.value)
        assert [processes.alive for processes in launched] == [[]]

    async def test_weights_that_are_none_are_found_before_a_process_starts(
        self, start: Start, launched: list[EngineProcesses], tmp_path: Path
    ) -> None:
        model = Path(shutil.copytree(MODEL, tmp_path / "model"))
        (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 nothing")
        with pytest.raises(BadInput, match=r"a file of .*model is broken"):
            await start(model)
        assert launched == []

    async def test_cancelling_leaves_no_process(self, launched: list[EngineProcesses]) -> None:
        starting = asyncio.ensure_future(start_demo(engine_args=MULTIPLE))
        while not (launched and len(launched[0]._known) >= 2):  # noqa: ASYNC110  until there is a core and a worker
            await asyncio.sleep(0.05)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()
        assert launched[0].alive == []

    def test_a_script_without_a_guard_says_so(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import asyncio\n"
            "import flyte_batch as fb\n"
            f"asyncio.run(fb.VLLMEngine.start({str(MODEL)!r}, max_model_len=64, engine_args={FAST!r}))\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 1
        said = [line for line in done.stdout.splitlines() if "the script starts an engine while vLLM's own" in line]
        assert any("if __name__ == '__main__':" in line for line in said), done.stdout + done.stderr

    def test_a_process_that_is_killed_leaves_none_of_vllms(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import asyncio, os, signal\n"
            "import flyte_batch as fb\n"
            "if __name__ == '__main__':\n"
            f"    start = fb.VLLMEngine.start({str(MODEL)!r}, max_model_len=64, engine_args={FAST!r})\n"
            "    engine = asyncio.run(start)\n"
            "    print('processes', *engine._launch.processes.alive, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("processes ")]
        deadline = time.monotonic() + 20
        while set(map(int, line.split()[1:])) & set(process_table()):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_a_process_that_just_ends_leaves_none_of_vllms(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import asyncio\n"
            "import flyte_batch as fb\n"
            "if __name__ == '__main__':\n"
            f"    start = fb.VLLMEngine.start({str(MODEL)!r}, max_model_len=64, engine_args={FAST!r})\n"
            "    engine = asyncio.run(start)\n"
            "    print('processes', *engine._launch.processes.alive)\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("processes ")]
        assert not set(map(int, line.split()[1:])) & set(process_table())
        assert "Traceback" not in done.stdout + done.stderr


class TestWays:
    async def test_the_choice_vllm_runs_the_demo_model(self) -> None:
        chosen = choose_engine("vllm", "demo")
        engine = await start_engine(chosen, SamplingParameters(max_tokens=100), max_model_len=256, engine_args=FAST)
        assert isinstance(engine, VLLMEngine)
        async with engine:
            (problem,) = generate(1, 3)
            (result,) = await engine.infer([engine.prepare(Prompt(problem.question))])
            assert is_right(getattr(result, "text", None), problem.answer)

    def test_a_hugging_face_id_with_a_revision_is_found_in_the_cache(self, tmp_path: Path) -> None:
        model = tmp_path / "hub" / "models--owner--demo"
        shutil.copytree(MODEL, model / "snapshots" / "abc")
        (model / "refs").mkdir()
        (model / "refs" / "v1").write_text("abc")
        script = tmp_path / "script.py"
        script.write_text(
            "import asyncio\n"
            "import flyte_batch as fb\n"
            "async def main():\n"
            f"    engine = await fb.VLLMEngine.start('owner/demo@v1', max_model_len=64, engine_args={FAST!r})\n"
            "    async with engine:\n"
            "        print('answer', (await engine.infer([engine.prepare(fb.Prompt('12 + 7 ='))]))[0].text)\n"
            "if __name__ == '__main__':\n"
            "    asyncio.run(main())\n"
        )
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\nanswer " in done.stdout

    async def test_an_adapter_is_applied_to_every_record(
        self, engine: VLLMEngine, start: Start, tmp_path: Path
    ) -> None:
        adapter = random_adapter(tmp_path / "adapter")
        adapted = await start(lora=adapter)
        question = Prompt("Ben has 3 cups and buys 4 more. How many cups has Ben?")
        (plain,) = await engine.infer([engine.prepare(question)])
        (other,) = await adapted.infer([adapted.prepare(question)])
        assert getattr(other, "text", None) != getattr(plain, "text", None)


def random_adapter(folder: Path) -> Path:
    """A LoRA adapter of rank 4, as PEFT writes it, that turns the demo model's answers into something else."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"})
    )
    return folder
