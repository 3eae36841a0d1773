"""vLLM's options and messages in our words: pure, so it is tested without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.engines.vllm_options import (
    VLLMOptions,
    engine_arguments,
    lora_rank,
    memory_advice,
    mixed_seed,
    one_line,
    sampling_arguments,
)
from flyte_batch.engines.vllm_start import start_failure
from flyte_batch.errors import BadInput, EngineError, EngineOutOfMemory
from flyte_batch.records import SamplingParameters

# As vLLM 0.32 and older versions write them.
FREE = (
    "ValueError: Free memory on device cuda:0 (3.19/23.57 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 21.68 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
FREE_ON_CPU = (
    "ValueError: Available memory on node 0 (12.59/23.0 GiB) on startup is less than desired CPU memory utilization "
    "(0.92, 21.16 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory"
)
CACHE_ON_CPU = (
    "ValueError: Available memory on node 0 (12.59/23.0 GiB) on kv cache allocation is less than requested memory for "
    "kv (40.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by others."
)
NO_CACHE = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing"
LENGTH = (
    "To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (4.20 GiB). Based on the available memory, the estimated maximum model "
    "length is 34410. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
)
LENGTH_UNKNOWN = LENGTH.replace("Based on the available memory, the estimated maximum model length is 34410. ", "")
LENGTH_OLD = (
    "The model's max seq len (8192) is larger than the maximum number of tokens that can be stored in KV cache (4352). "
    "Try increasing `gpu_memory_utilization`"
)
SAMPLER = (
    "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering "
    "`max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
)
WEIGHTS = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 23.57 GiB of "
    "which 700.00 MiB is free."
)
KILLED = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
)


class TestMemoryAdvice:
    @pytest.mark.parametrize(
        ("text", "advice"),
        [
            (FREE, ["3.19 of 23.57 GiB are free", "gpu_memory_utilization=0.92 asks for 21.68", "utilization=0.11"]),
            (FREE.replace("3.19", "0.02"), ["set gpu_memory_utilization=0.01", "end what else uses the device"]),
            (FREE_ON_CPU, ["12.59 of 23.0 GiB are free", "set gpu_memory_utilization=0.52"]),
            (CACHE_ON_CPU, ["12.59 of 23.0 GiB", "'kv_cache_memory_bytes': 11 << 30"]),
            (NO_CACHE, ["raise gpu_memory_utilization", "tensor_parallel_size=2", "quantization='fp8'"]),
            (LENGTH, ["131,072 tokens needs 16.00 GiB", "4.20 GiB are left", "set max_model_len=34400"]),
            (LENGTH_UNKNOWN, ["set max_model_len=34400"]),
            (LENGTH_OLD, ["set max_model_len=4352"]),
            (SAMPLER, ["1024 records at once do not fit", "set max_num_seqs=512"]),
            (WEIGHTS, ["1.02 GiB more were asked for", "quantization='fp8'", "tensor_parallel_size=2"]),
            ("torch.OutOfMemoryError", ["memory is full"]),
            (KILLED, ["killed by the system", "more memory"]),
        ],
    )
    def test_says_what_to_set_and_to_how_much(self, text: str, advice: list[str]) -> None:
        given = memory_advice(text)
        assert given is not None
        assert [part for part in advice if part not in given] == []
        assert "\n" not in given

    @pytest.mark.parametrize(
        "text", ["", "ValueError: Model architectures ['X'] are not supported", "KeyError: 'memory'"]
    )
    def test_says_nothing_about_other_failures(self, text: str) -> None:
        assert memory_advice(text) is None


class TestStartFailure:
    def test_is_what_the_failed_process_said(self) -> None:
        parent = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        error = start_failure(parent, [LENGTH], "some/model")
        assert isinstance(error, EngineOutOfMemory)
        assert "vLLM cannot load some/model: one record of max_model_len=131,072" in str(error)
        error = start_failure(parent, ["OSError: broken file\nmore", "KeyError: 'later'"], "some/model")
        assert type(error) is EngineError
        assert str(error) == "vLLM cannot load some/model: OSError: broken file"
        error = start_failure(parent, ["BadInput: put it below a guard"], "some/model")
        assert isinstance(error, BadInput)
        assert str(error) == "put it below a guard"

    def test_is_vllms_own_where_nothing_was_said(self) -> None:
        assert str(start_failure(TimeoutError("waited\nlong"), [], "m")) == "vLLM cannot load m: waited"


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"max_model_len": 1}, "max_model_len must be a whole number of at least 2"),
            ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1"),
            ({"tensor_parallel_size": 1.5}, "tensor_parallel_size must be a whole number"),
            ({"tensor_parallel_size": True}, "tensor_parallel_size must be a whole number"),
            ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization must be above 0 and at most 1, got 1.2"),
            ({"gpu_memory_utilization": 0}, "gpu_memory_utilization must be above 0"),
            ({"engine_args": ["seed"]}, "engine_args must be a mapping of names to values, got a list"),
            ({"engine_args": {"dtype": "half"}}, "'dtype', which is an option of its own: give it as dtype="),
            ({"engine_args": {"model": "x"}}, "must not hold 'model': name the model as the first argument"),
            ({"engine_args": {"enable_lora": True}}, "name the adapter as lora="),
            ({"sampling_args": {"temperature": 1}}, "'temperature', which SamplingParameters has: give it there"),
            ({"sampling_args": {"n": 2}}, "must not hold 'n': a record has one completion"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options: dict[str, Any], why: str) -> None:
        with pytest.raises(BadInput, match=why) as caught:
            VLLMOptions(**options)
        assert "\n" not in str(caught.value)

    def test_what_is_left_out_is_left_to_vllm(self) -> None:
        known = {"max_model_len", "seed"}
        arguments = engine_arguments(VLLMOptions(max_model_len=100, engine_args={"seed": 3}), known)
        assert arguments["max_model_len"] == 100
        assert arguments["seed"] == 3
        assert not {"gpu_memory_utilization", "max_num_seqs", "quantization", "enable_prefix_caching"} & set(arguments)

    def test_an_unknown_engine_argument_gets_a_hint(self) -> None:
        with pytest.raises(BadInput, match="holds 'sed', which vLLM's engine does not have: did you mean 'seed'"):
            engine_arguments(VLLMOptions(engine_args={"sed": 3}), {"seed"})

    def test_sampling_is_passed_on_and_special_stop_texts_become_ids(self) -> None:
        sampling = SamplingParameters(stop=("<end>", "####"), stop_token_ids=(4,), top_k=3, bad_words=("no",))
        arguments = sampling_arguments(sampling, {"logit_bias": {1: 2.0}}, {"logit_bias"}, {"<end>": 7})
        assert (arguments["stop"], arguments["stop_token_ids"]) == (["####"], [4, 7])
        assert (arguments["top_k"], arguments["bad_words"], arguments["logit_bias"]) == (3, ["no"], {1: 2.0})
        assert not {"seed", "structured"} & set(arguments)
        with pytest.raises(BadInput, match="vLLM's SamplingParams does not have"):
            sampling_arguments(sampling, {"temprature": 2}, {"temperature"}, {})


class TestSeeds:
    def test_are_stable_across_runs_and_versions(self) -> None:
        assert mixed_seed(7, 0) == 7985665222500292864
        code = "from flyte_batch.engines.vllm_options import mixed_seed; print(mixed_seed(7, 0))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) == mixed_seed(7, 0)

    def test_differ_by_engine_and_by_record(self) -> None:
        seeds = {mixed_seed(engine, record) for engine in range(30) for record in range(-10, 20)}
        assert len(seeds) == 900
        assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
        assert mixed_seed(1, 12) != mixed_seed(11, 2)

    def test_without_one_of_the_two(self) -> None:
        assert mixed_seed(None, 3) is None
        assert mixed_seed(5, None) == 5


class TestLora:
    @pytest.mark.parametrize(("rank", "taken"), [(4, 8), (8, 8), (17, 32), (512, 512)])
    def test_the_rank_is_rounded_up_to_one_that_vllm_takes(self, tmp_path: Path, rank: int, taken: int) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
        assert lora_rank(tmp_path) == taken

    @pytest.mark.parametrize(
        ("config", "why"),
        [("{}", "names no rank 'r'"), ("[", "names no rank 'r'"), ('{"r": 1000}', "rank 1000, vLLM takes 512 at most")],
    )
    def test_a_rank_that_cannot_work(self, tmp_path: Path, config: str, why: str) -> None:
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(BadInput, match=why):
            lora_rank(tmp_path)


class TestOneLine:
    def test_of_a_message_of_many(self) -> None:
        assert one_line(ValueError("\n  first thing \nsecond")) == "first thing"
        assert one_line(ValueError()) == "ValueError"

    def test_of_pydantics_only_what_is_wrong(self) -> None:
        class Several(ValueError):
            def errors(self) -> list[dict[str, Any]]:
                return [
                    {"loc": ("dtype",), "msg": "Value error, unknown dtype"},
                    {"loc": (), "msg": "Value error, and more"},
                ]

        assert one_line(Several("1 validation error for EngineArgs\n  see https://errors")) == (
            "dtype: unknown dtype; and more"
        )
