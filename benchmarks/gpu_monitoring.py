"""What the GPU monitoring says of a vLLM at work, next to what nvidia-smi says of the same time.

    python benchmarks/gpu_monitoring.py [--model MODEL] [--records 20000] [--max-tokens 256]

Prints each device's figures from `GpuSampler` and from ``nvidia-smi``, which is asked twice a second meanwhile,
watt-hours for a million tokens, what one look of the sampler takes, and the time by class of kernel while some more
records are answered. Needs a GPU and the extras vllm and monitoring.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import flyte_batch as fb
from flyte_batch.demo import model_path
from flyte_batch.demo.problems import generate
from flyte_batch.load.report import conditions
from flyte_batch.monitoring.gpu import GpuSampler, energy_j, gpu_totals, wh_per_million_tokens
from flyte_batch.monitoring.kernels import kernel_table, profiled, profiler_options

LOOKS = 200


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path("hf")), help="a folder or a Hugging Face id (demo model)")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    prompts = [fb.Prompt(problem.question) for problem in generate(options.records, 1)]
    with GpuSampler() as sampler, tempfile.TemporaryDirectory() as folder:
        looks = []
        for _ in range(LOOKS):
            started = time.perf_counter()
            sampler.sample()
            looks.append(time.perf_counter() - started)
        print(f"one look at {len(sampler.latest())} GPUs: {statistics.median(looks) * 1e3:.2f} ms")
        sampling = fb.SamplingParameters(max_tokens=options.max_tokens)
        engine = await fb.VLLMEngine.start(options.model, sampling=sampling, engine_args=profiler_options(folder))
        print(f"{conditions()}; {options.model}")
        async with fb.ContinuousBatcher(engine) as batcher:
            records = [engine.prepare(prompt) for prompt in prompts]
            await batcher.map(records[:100])  # what is compiled by the first requests
            smi, started = Smi(), time.time()
            results = await batcher.map(records)
            ended = time.time()
            uses, theirs = sampler.use_between(started, ended), smi.stop()
            async with profiled(engine, Path(folder) / "profile") as profile:
                await batcher.map(records[:500])
            table = kernel_table(*profile.traces)
    totals = gpu_totals(uses)
    for total in totals:
        print(f"{total.name} {total.uuid}, {total.seconds:.1f} s, energy by {total.energy_source}")
        print(f"  utilization {_share(total.mean_utilization)}, power {_of(total.mean_power_w)} W")
        memory = None if total.peak_memory_bytes is None else total.peak_memory_bytes / 2**30
        print(f"  energy {_of(total.energy_j)} J, peak memory {_of(memory)} GiB")
        print(f"  at most {_of(total.max_temperature_c)} C, {', '.join(total.throttle_reasons) or 'not throttled'}")
        if total.uuid in theirs:
            utilization, power, samples = theirs[total.uuid]
            print(f"  nvidia-smi, {samples} samples: utilization {_share(utilization)}, power {_of(power)} W")
    tokens = sum(result.prompt_tokens + result.response_tokens for result in results)
    print(f"{len(results) / (ended - started):.0f} records/s, {tokens / (ended - started):.0f} tokens/s")
    print(f"{_of(wh_per_million_tokens(energy_j(totals), tokens))} Wh for a million tokens")
    print(table)


class Smi:
    """nvidia-smi, asked twice a second until it is stopped; none where it is not installed."""

    def __init__(self) -> None:
        program = shutil.which("nvidia-smi")
        query = ["--query-gpu=uuid,utilization.gpu,power.draw", "--format=csv,noheader,nounits", "--loop-ms=500"]
        self._process = program and subprocess.Popen([program, *query], stdout=subprocess.PIPE, text=True)

    def stop(self) -> dict[str, tuple[float, float, int]]:
        """Mean utilization (0 to 1), mean power (W) and number of samples, by UUID."""
        if not self._process:
            return {}
        self._process.terminate()
        output, _ = self._process.communicate()
        samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for line in output.splitlines():
            uuid, *values = line.split(", ")
            if len(values) == 2 and "N/A" not in line:
                samples[uuid].append((float(values[0]) / 100, float(values[1])))
        return {
            uuid: (statistics.mean(u for u, _ in each), statistics.mean(p for _, p in each), len(each))
            for uuid, each in samples.items()
        }


def _of(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    asyncio.run(main())
