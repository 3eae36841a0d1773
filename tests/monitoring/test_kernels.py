"""Time by class of kernel: the names that kernels really have, and traces as the torch profiler writes them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyte_batch.cli import batch
from flyte_batch.engines.fake import FakeEngine
from flyte_batch.errors import BadInput, EngineError
from flyte_batch.monitoring.kernels import (
    KernelTime,
    kernel_class,
    kernel_table,
    profiled,
    profiler_options,
    trace_files,
)
from tests.helpers import ENVIRONMENT, ROOT

pytest.importorskip("ijson", reason="ijson comes with the extra 'monitoring'")

# As traces, profiler tables and Nsight reports of vLLM and SGLang on A100, H100, B200 and MI300 show them in public:
# on GitHub vllm-project/vllm issue 9471 and pull request 28130, neuralmagic/nm-vllm pull request 332,
# sgl-project/sglang pull request 22353, vllm-project/vllm-omni pull request 553; names from the sources of vLLM,
# FlashInfer, FlashAttention, PyTorch and NCCL. Some template arguments are cut.
NAMES = {
    "attention": [
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<192, 128, 64, 8, false, false, cutlass::bfloat16_t>>",
        "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>",
        "void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64, 128, 8>, 4, false>",
        "void pytorch_flash::flash_fwd_kernel<traits>(pytorch_flash::Flash_fwd_params)",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<cutlass::bfloat16_t>>>",
        "flash::prepare_varlen_num_blocks_kernel(int, int)",
        "void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel<T>",
        "fmhaSm100fKernel_QkvBfloat16OBfloat16HQk576HV512PagedKvDenseP64VarSeqQ8Kv128PersistentSwapsAbForGen",
        "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2, 4, 8, 8, 1, 16>",
        "kernel_unified_attention_2d",
        "void vllm::merge_attn_states_kernel<c10::BFloat16, 128>",
        "void vllm::paged_attention_v2_kernel<__nv_bfloat16, __nv_bfloat16, 128, 16, 128>",
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>",
        "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>",
        "void vllm::gather_and_maybe_dequant_cache_page<__nv_bfloat16, __nv_bfloat16, 0>",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*, c10::BFloat16*)",
        "_fwd_grouped_kernel_stage1",
        "_fp8_paged_mqa_logits_kernel",
        "fused_recurrent_gated_delta_rule_packed_decode_kernel",
        "_C::cpu_attention_with_kv_cache",
        "aten::scaled_dot_product_attention",
    ],
    "matmul": [
        "ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_relu_f2f_stages_64x5_tn",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage3_warpsize2x2x1",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
        "nvjet_sm100_tst_32x64_64x16_4x1_v_bz_splitK_bias_TNN",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_tn_align8>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int> >>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16>",
        "void marlin::Marlin<(long)1125899906910725, (long)1125899906843648, (long)1125899906910725>",
        "void marlin_moe_wna16::Marlin<1125899906909960l, 562949953487106l, 1125899906909960l>",
        "bmm_Bfloat16_E2m1E2m1_Fp32_bA16_bB16_clmp_dynB_sm100f",
        "fused_moe_kernel",
        "_w8a8_block_fp8_matmul",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT128x128x64",
        "_C::cutlass_scaled_mm",
        "_C::onednn_mm",
        "aten::mm",
        "aten::addmm",
        "aten::linear",
    ],
    "normalisation": [
        "void vllm::rms_norm_kernel<c10::BFloat16>(c10::BFloat16*, c10::BFloat16 const*)",
        "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>",
        "void flashinfer::norm::RMSNormKernel<8u, __nv_bfloat16>",
        "kernel_cutlass_kernel_flashinfernormkernelsfused_add_rmsnorm",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_red_fused_rms_norm_0",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        "aten::native_layer_norm",
    ],
    "activation": [
        "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel<c10::BFloat16>, (bool)1>",
        "triton_poi_fused_mul_silu_1",
        "triton_poi_fused_mul_rocm_unquantized_gemm_silu_slice_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
        "aten::silu",
    ],
    "sampling": [
        "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u, (cub::BlockScanAlgorithm)2, 4u, true, float>",
        "_topk_topp_kernel",
        "_gumbel_sample_kernel",
        "rejection_greedy_sample_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<float, long>",
        "_C::greedy_argmax",
        "aten::multinomial",
    ],
    "routing": [
        "void vllm::moe::topk_softmax_kernel<float, int>",
        "void tensorrt_llm::kernels::topkGatingSoftmax<8, 64, 4, 16>",
        "void vllm::moe::moe_align_block_size_kernel<int>",
        "void vllm::moe::count_and_sort_expert_tokens_kernel<int>",
        "void vllm::moe::moe_sum_kernel<c10::BFloat16, 4>",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*, vllm::RankSignals)",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<__nv_bfloat16>",
        "c10d::allreduce_",
    ],
    "memory copy": [
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<unsigned int, 1>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul>>",
        "aten::copy_",
        "aten::_to_copy",
    ],
    "quantisation": [
        "void vllm::scaled_fp8_quant_kernel_strided<c10::BFloat16>(int)",
        "void per_token_group_quant_8bit_kernel<c10::BFloat16, c10::Float8_e4m3fn, true, true, float>",
        "_fp8_activation_quantize_kernel",
        "quantize_with_block_size",
    ],
    "other": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long, unsigned int, 2, 2, -2>",
        "triton_poi_fused__to_copy_add_mul_0",
        "triton_poi_fused_mul_sum_0",
        "aten::slice",
        "aten::embedding",
        "aten::upsample_bilinear2d",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("expected", "name"), [(each, name) for each, names in NAMES.items() for name in names])
def test_a_kernel_has_the_class_of_what_it_is_for(expected: str, name: str) -> None:
    assert kernel_class(name) == expected


def event(name: str, start: float, took: float, category: str = "kernel", thread: object = 7) -> dict[str, Any]:
    """Times in microseconds, as in a trace."""
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": thread, "ts": start, "dur": took, "args": {}}


def write(path: Path, events: Sequence[dict[str, Any]]) -> Path:
    """As torch does it: members before the events, marks without a duration among them."""
    trace = {
        "schemaVersion": 1,
        "deviceProperties": [],
        "distributedInfo": {"backend": "gloo", "rank": 0},
        "traceEvents": [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}, *events],
        "traceName": str(path),
    }
    text = json.dumps(trace)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


GPU_EVENTS = [
    event("aten::mm", 0, 900, "cpu_op"),
    event("nvjet_tst_64x8", 10, 500_000),
    event("nvjet_tst_64x8", 600_000, 100_000),
    event("flash_fwd_splitkv_kernel", 700_000, 300_000),
    event("Memcpy DtoH (Device -> Pinned)", 800_000, 60_000, "gpu_memcpy"),
    event("Memset (Device)", 900_000, 40_000, "gpu_memset"),
    event("generation step", 0, 1_000_000, "gpu_user_annotation"),
    event("cudaLaunchKernel", 0, 5_000, "cuda_runtime"),
]


class TestTable:
    @pytest.mark.parametrize("name", ["rank0.1.pt.trace.json", "rank0.1.pt.trace.json.gz"])
    def test_kernels_and_copies_of_a_gpu_by_class(self, name: str, tmp_path: Path) -> None:
        table = kernel_table(write(tmp_path / name, GPU_EVENTS))
        assert (table.source, table.seconds) == ("gpu", pytest.approx(1.0))
        rows = [(row.kernel_class, row.seconds, row.share, row.calls) for row in table.rows]
        assert rows == [
            ("matmul", pytest.approx(0.6), pytest.approx(0.6), 2),
            ("attention", pytest.approx(0.3), pytest.approx(0.3), 1),
            ("memory copy", pytest.approx(0.1), pytest.approx(0.1), 2),
        ]
        assert table.rows[2].biggest == (
            KernelTime("Memcpy DtoH (Device -> Pinned)", pytest.approx(0.06), 1),
            KernelTime("Memset (Device)", pytest.approx(0.04), 1),
        )

    def test_without_a_gpu_operations_of_the_cpu_without_those_they_call(self, tmp_path: Path) -> None:
        events = [  # in no order, as in a trace; a second thread does its own at the same time
            event("aten::t", 100, 10, "cpu_op"),  # begins with its caller
            event("aten::mm", 120, 700, "cpu_op"),
            event("aten::linear", 100, 800, "cpu_op"),
            event("aten::silu", 900, 100, "cpu_op"),  # begins where its neighbour ends
            event("aten::copy_", 150, 300, "cpu_op", thread=8),
            event("forward.py(7): run", 0, 5000, "python_function"),
        ]
        table = kernel_table(write(tmp_path / "trace.json", events))
        assert (table.source, table.seconds) == ("cpu", pytest.approx(1200e-6))
        assert {row.kernel_class: row.seconds for row in table.rows} == pytest.approx(
            {"matmul": 790e-6, "memory copy": 300e-6, "activation": 100e-6, "other": 10e-6}
        )
        (mm, linear) = table.rows[0].biggest
        assert (mm.name, mm.seconds, linear.name, linear.seconds) == (
            *("aten::mm", pytest.approx(700e-6)),
            *("aten::linear", pytest.approx(90e-6)),
        )

    def test_the_traces_of_several_workers_are_one_table(self, tmp_path: Path) -> None:
        traces = [write(tmp_path / f"rank{rank}.pt.trace.json", GPU_EVENTS) for rank in range(2)]
        table = kernel_table(*traces)
        assert table.seconds == pytest.approx(2.0)
        assert table.rows[0].calls == 4
        traces = [
            write(tmp_path / f"cpu{rank}.json", [event("aten::mm", rank * 1000, 100, "cpu_op")]) for rank in range(3)
        ]
        assert kernel_table(*traces).seconds == pytest.approx(300e-6)

    def test_operations_of_the_cpu_in_one_trace_do_not_mix_with_kernels_in_another(self, tmp_path: Path) -> None:
        cpu = write(tmp_path / "rank0.pt.trace.json", [event("aten::mm", 0, 900, "cpu_op")])
        gpu = write(tmp_path / "rank1.pt.trace.json", GPU_EVENTS)
        assert kernel_table(cpu, gpu) == kernel_table(gpu, cpu) == kernel_table(gpu)

    def test_the_text_says_what_was_measured(self, tmp_path: Path) -> None:
        lines = str(kernel_table(write(tmp_path / "trace.json", GPU_EVENTS))).splitlines()
        assert lines[0] == "1.000 s in kernels on GPUs"
        assert lines[2].split() == ["matmul", "60.0%", "0.600", "2", "nvjet_tst_64x8", "60.0%"]
        cpu = str(kernel_table(write(tmp_path / "cpu.json", [event("aten::mm", 0, 9, "cpu_op")])))
        assert "operations on a CPU: the traces have none of a GPU" in cpu

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"no trace", "is no trace of the torch profiler"),
            (b'{"traceEvents": [{"ph": "X", "cat": "kernel"', "or only a part of one"),
            (gzip.compress(b'{"traceEvents": []}' * 1000)[:40], "or only a part of one"),
            (b'{"traceEvents": []}', "no kernel and no operation in it"),
            (b"{}", "no kernel and no operation in it"),
        ],
    )
    def test_what_is_no_trace_is_named(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "trace.json").write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            kernel_table(tmp_path / "trace.json")
        assert str(tmp_path / "trace.json") in str(caught.value)

    def test_a_large_trace_takes_little_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "large.pt.trace.json.gz"
        one = json.dumps(
            event("nvjet_tst_64x8", 1.5, 2.5) | {"args": {"External id": 1, "stream": 7, "text": "x" * 999}}
        )

        def lines() -> Iterator[str]:
            yield '{"traceEvents": ['
            for _ in range(50_000):  # 60 MB
                yield one + ","
            yield one + "]}"

        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(lines())
        program = (
            "import resource, sys; from flyte_batch.monitoring.kernels import kernel_table, _events\n"
            "kernel_table(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "table = kernel_table(sys.argv[2]); print(table.rows[0].calls, before)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        small = write(tmp_path / "small.json", GPU_EVENTS)
        run = subprocess.run(
            [sys.executable, "-c", program, str(small), str(path)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        calls, _, more_kib = run.stdout.split()
        assert int(calls) == 50_001
        assert int(more_kib) < 10_000


class Engine:
    """Writes a trace for each of two workers, as vLLM does, and one of its frontend."""

    def __init__(self, folder: Path | None, *, writes: bool = True) -> None:
        self._folder = folder
        self._writes = writes
        self.profiling = False

    @property
    def profile_folder(self) -> Path | None:
        return self._folder

    async def start_profile(self) -> None:
        self.profiling = True

    async def stop_profile(self) -> None:
        self.profiling = False
        if self._folder is not None and self._writes:
            for name in ("rank0.2", "rank1.2", "host_1.async_llm.2"):
                write(self._folder / f"{name}.pt.trace.json.gz", GPU_EVENTS)


class TestProfiled:
    async def test_the_traces_of_the_workers_come_into_the_folder(self, tmp_path: Path) -> None:
        engine = Engine(tmp_path)
        earlier = write(tmp_path / "rank0.1.pt.trace.json.gz", GPU_EVENTS)
        async with profiled(engine, tmp_path / "new" / "profile") as profile:
            assert engine.profiling
            assert profile.traces == ()
        folder = tmp_path / "new" / "profile"
        assert profile.traces == (folder / "rank0.2.pt.trace.json.gz", folder / "rank1.2.pt.trace.json.gz")
        assert trace_files(folder) == list(profile.traces)
        assert trace_files(tmp_path) == [earlier]

    async def test_the_profiler_is_stopped_when_the_work_fails(self, tmp_path: Path) -> None:
        engine = Engine(tmp_path)
        with pytest.raises(ZeroDivisionError):
            async with profiled(engine, tmp_path / "profile"):
                raise ZeroDivisionError
        assert not engine.profiling
        assert len(trace_files(tmp_path / "profile")) == 2

    async def test_a_profiler_that_wrote_nothing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="wrote no trace into"):
            async with profiled(Engine(tmp_path, writes=False), tmp_path / "profile"):
                pass

    async def test_an_engine_without_a_profiler_is_refused_with_the_option(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"profiler_options\(FOLDER\).*'torch_profiler_dir': FOLDER"):
            async with profiled(Engine(None), tmp_path):
                pass

    async def test_an_engine_that_runs_no_torch_is_refused(self, tmp_path: Path) -> None:
        async with await FakeEngine.start() as engine:
            with pytest.raises(BadInput, match="a FakeEngine cannot be profiled"):
                async with profiled(engine, tmp_path):  # type: ignore[arg-type]
                    pass

    def test_the_folder_is_named_in_full(self) -> None:
        (config,) = profiler_options("traces").values()
        assert config["torch_profiler_dir"] == str(Path.cwd() / "traces")


class TestCommand:
    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(batch, ["kernels", *arguments])

    def test_a_file_or_a_folder_gives_the_table(self, tmp_path: Path) -> None:
        trace = write(tmp_path / "rank0.1.pt.trace.json.gz", GPU_EVENTS)
        write(tmp_path / "host_1.async_llm.1.pt.trace.json.gz", [event("aten::mm", 0, 1, "cpu_op")])
        done = self.run(str(tmp_path))
        assert (done.exit_code, done.stdout) == (0, f"{kernel_table(trace)}\n")
        assert self.run(str(trace)).stdout == done.stdout

    def test_what_is_not_there_is_one_line(self, tmp_path: Path) -> None:
        for name in ("gone.json", "."):
            done = self.run(str(tmp_path / name))
            assert (done.exit_code, done.stdout) == (1, "")
            assert done.stderr == (
                f"Error: {tmp_path / name}: there is no such trace, nor a folder with *.pt.trace.json* in it\n"
            )
