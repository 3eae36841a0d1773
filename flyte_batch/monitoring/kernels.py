"""Where a model's time goes: seconds by class of kernel, from traces of the torch profiler.

``flyte batch kernels TRACE...`` prints the table of traces that are there. This makes some:

    engine = await fb.VLLMEngine.start(model, engine_args=profiler_options("/tmp/traces"))
    async with profiled(engine, "profile") as profile:
        ...  # some seconds of the usual work: traces are large, and writing them holds the engine up
    print(kernel_table(*profile.traces))

Upstream: https://docs.pytorch.org/docs/stable/profiler.html, https://docs.vllm.ai/en/latest/contributing/profiling.html.
Traces are read event by event, with ijson: those of a GPU take memory only for the kernels' names, those of a CPU some
dozens of bytes for each operation.
"""

from __future__ import annotations

import asyncio
import gzip
import importlib
import re
import shutil
import zlib
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, Protocol

from flyte_batch.errors import BadInput, EngineError

KernelClass = Literal[
    "attention",
    "matmul",
    "normalisation",
    "activation",
    "sampling",
    "routing",
    "communication",
    "memory copy",
    "quantisation",
    "other",
]
"""What a kernel is for.

``attention`` includes what serves it (rotary embeddings, the KV cache's upkeep) and what stands in for it (state-space
and linear attention); ``sampling`` a softmax of its own, because attention kernels have theirs inside; ``routing`` is
the choice of experts, whose products are ``matmul``. A kernel that does several things at once counts as the first of
them in the order of the patterns below. ``other`` is mostly elementwise arithmetic, index and view operations.
"""

_PATTERNS: tuple[tuple[KernelClass, re.Pattern[str]], ...] = (
    (
        "communication",
        re.compile(
            r"nccl|rccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|cross_device_reduce|multimem|sendrecv"
            r"|nvshmem|deep_?ep::|c10d::|gloo:"
        ),
    ),
    (
        "routing",
        re.compile(
            r"topk_?softmax|topk_?gating|grouped_?topk|group_idx_and_topk|moe_(align|sum|permute|unpermute|sort)"
            r"|expert_tokens?|expandinputrows|buildexpertmaps|moe_?routing|routingkernel"
        ),
    ),
    (
        "attention",
        re.compile(
            r"attn|attention|flash_fwd|fmha|flash_?mla|flash::|pagedkvcache|scaled_dot_product|mqa_logits"
            r"|reshape_and_cache|concat_and_cache|kv_?cache|dequant_cache|slot_mapping|get_scheduler_metadata"
            r"|rotary|rope(?!rt)|_fwd_(grouped_)?kernel_stage|gated_delta|selective_scan|kda_fwd|gdn_"
        ),
    ),
    ("normalisation", re.compile(r"norm(?!al)|rsqrt")),
    (
        "matmul",
        re.compile(
            r"gemm|gemv|matmul|nvjet|cutlass::(kernel|device_kernel)|xmma|splitkreduce|marlin|machete|fused_moe_kernel"
            r"|(?<![a-z])(add|baddb|b)?mm(?![a-z])|(?<!bi)linear|cijk_|wvsplitk|einsum|convol|conv[123]d"
        ),
    ),
    ("activation", re.compile(r"silu|gelu|swiglu|relu|act_and_mul|sigmoid|doactivation|tanh")),
    (
        "sampling",
        re.compile(
            r"(?<!up)sampl|argmax|multinomial|softmax|top_?[kp]|sort|gumbel|penalt|rejection|distribution_|bincount"
        ),
    ),
    ("quantisation", re.compile(r"quant")),
    (
        "memory copy",
        re.compile(r"memcpy|memset|(?<!_to_)copy|aten::(_to_copy|to|cat|clone|contiguous|fill_)$|catarray|fillfunctor"),
    ),
)
# Inductor names a fused elementwise kernel or reduction after all that it fuses and what came before: none of these.
_FUSED_BY_INDUCTOR = re.compile(r"triton_(poi|red|per)_fused")
_NOT_FUSED: frozenset[KernelClass] = frozenset({"communication", "routing", "attention", "matmul"})

_GPU_EVENTS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_BIGGEST = 3


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel, or operation of a CPU.

    Attributes:
        name: as the trace has it.
        seconds: of all calls.
        calls: how many.
    """

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class ClassTime:
    """One class of kernels.

    Attributes:
        kernel_class: which.
        seconds: of all its kernels; what runs side by side counts twice.
        share: of the seconds of all classes, 0 to 1.
        calls: how many.
        biggest: the kernels that took most.
    """

    kernel_class: KernelClass
    seconds: float
    share: float
    calls: int
    biggest: tuple[KernelTime, ...]


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Time by class of kernel; ``str()`` makes a text of it.

    Attributes:
        source: ``gpu``: kernels and copies on GPUs. ``cpu``: operations on a CPU without those that they call, because
            the traces have none of a GPU.
        seconds: of all of them.
        rows: the classes that occur, the one that took most first.
    """

    source: Literal["gpu", "cpu"]
    seconds: float
    rows: tuple[ClassTime, ...]

    def __str__(self) -> str:
        what = "kernels on GPUs" if self.source == "gpu" else "operations on a CPU: the traces have none of a GPU"
        lines = [f"{self.seconds:.3f} s in {what}", f"{'class':<14} {'share':>6} {'seconds':>9} {'calls':>9}  biggest"]
        for row in self.rows:
            names = ", ".join(f"{kernel.name:.48} {kernel.seconds / self.seconds:.1%}" for kernel in row.biggest)
            lines.append(f"{row.kernel_class:<14} {row.share:>6.1%} {row.seconds:>9.3f} {row.calls:>9,}  {names}")
        return "\n".join(lines)


class Profilable(Protocol):
    """An engine that the torch profiler can watch: `flyte_batch.VLLMEngine`.

    Attributes:
        profile_folder: where its traces go; None if it was not started with a profiler.
    """

    @property
    def profile_folder(self) -> Path | None: ...

    async def start_profile(self) -> None: ...

    async def stop_profile(self) -> None: ...


@dataclass
class Profile:
    """What `profiled` makes.

    Attributes:
        traces: a file for each of the engine's workers; there when the block has ended.
    """

    traces: tuple[Path, ...] = ()


def profiler_options(folder: str | Path) -> dict[str, Any]:
    """``engine_args`` of a `VLLMEngine` that can be profiled; nothing is slower until it is.

    Args:
        folder: where vLLM writes its traces, on a disk of the machine that it runs on.
    """
    # Neither Python's stack nor this process: a trace with them takes vLLM a hundred times as long to write.
    return {
        "profiler_config": {
            "profiler": "torch",
            "torch_profiler_dir": str(Path(folder).absolute()),
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
        }
    }


@asynccontextmanager
async def profiled(engine: Profilable, folder: str | Path) -> AsyncIterator[Profile]:
    """Profile what an engine computes meanwhile, whoever asked for it.

    While a trace is written, when the block has ended, the engine answers nobody; some seconds of work take some
    seconds.

    Args:
        engine: a `VLLMEngine` that was started with `profiler_options`.
        folder: gets the traces; is made if it is not there.

    Raises:
        BadInput: the engine was not started with a torch profiler, or can't be profiled at all.
        EngineError: it is being profiled already, or wrote no trace.
        EngineDead: the engine was closed or died.
    """
    source = getattr(engine, "profile_folder", None)
    if source is None:
        if not hasattr(engine, "start_profile"):
            raise BadInput(f"a {type(engine).__name__} cannot be profiled: it runs no torch; a VLLMEngine can")
        raise BadInput(
            "the engine was not started with a profiler that writes to a folder: start it with "
            "engine_args=profiler_options(FOLDER), which is {'profiler_config': {'profiler': 'torch', "
            "'torch_profiler_dir': FOLDER, ...}}"
        )
    before = set(trace_files(source))
    profile = Profile()
    await engine.start_profile()
    try:
        yield profile
    finally:
        await engine.stop_profile()
        profile.traces = await asyncio.to_thread(_moved, set(trace_files(source)) - before, Path(folder))
    if not profile.traces:
        raise EngineError(f"the profiler wrote no trace into {source}: the engine's log says why")


def trace_files(path: str | Path) -> list[Path]:
    """The traces of workers in a folder, or the file itself.

    What vLLM's frontend did, in files named ``async_llm``, is Python, not kernels.
    """
    path = Path(path)
    if not path.is_dir():
        return [path] if path.exists() else []
    return sorted(file for file in path.glob("*.pt.trace.json*") if ".async_llm." not in file.name)


def kernel_class(name: str) -> KernelClass:
    """The class of a kernel on a GPU, or of an operation on a CPU, by its name in a trace."""
    lower = name.lower()
    fused = _FUSED_BY_INDUCTOR.match(lower) is not None
    for found, pattern in _PATTERNS:
        if not (fused and found in _NOT_FUSED) and pattern.search(lower):
            return found
    return "other"


def kernel_table(*traces: str | Path) -> KernelTable:
    """Time by class of kernel, of all traces together: the workers of one engine, for instance.

    Args:
        traces: what the torch profiler wrote (``.json`` or ``.json.gz``), at least one.

    Raises:
        BadInput: a file is not there or no trace, or nothing was computed; names it.
    """
    gpu: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    cpu = _Operations()
    for trace in traces:
        for event in _events(Path(trace)):
            category = event.get("cat")
            if category in _GPU_EVENTS:
                time = gpu[event["name"]]
                time[0] += event.get("dur", 0.0)
                time[1] += 1
            elif category == "cpu_op" and not gpu:
                cpu.add(event)
        cpu.finish()
    times = gpu or cpu.times
    if not times:
        names = ", ".join(map(str, traces))
        raise BadInput(f"{names}: no kernel and no operation in it: profile while the engine is at work")
    return _table("gpu" if gpu else "cpu", [KernelTime(name, us / 1e6, int(n)) for name, (us, n) in times.items()])


def _table(source: Literal["gpu", "cpu"], kernels: Iterable[KernelTime]) -> KernelTable:
    classes: dict[KernelClass, list[KernelTime]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda kernel: -kernel.seconds):
        classes[kernel_class(kernel.name)].append(kernel)
    seconds = sum(kernel.seconds for each in classes.values() for kernel in each)
    rows = [
        ClassTime(
            kernel_class=name,
            seconds=(taken := sum(kernel.seconds for kernel in each)),
            share=taken / seconds if seconds else 0.0,
            calls=sum(kernel.calls for kernel in each),
            biggest=tuple(each[:_BIGGEST]),
        )
        for name, each in classes.items()
    ]
    return KernelTable(source, seconds, tuple(sorted(rows, key=lambda row: -row.seconds)))


class _Operations:
    """Operations of a CPU, each without the time of those that it calls.

    Attributes:
        times: name -> microseconds and calls, of the traces that are finished.
    """

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._names: dict[str, int] = {}
        self._threads: dict[tuple[Any, Any], tuple[array[float], array[float], array[int]]] = {}

    def add(self, event: dict[str, Any]) -> None:
        key = (event.get("pid"), event.get("tid"))
        starts, ends, names = self._threads.setdefault(key, (array("d"), array("d"), array("l")))
        starts.append(event["ts"])
        ends.append(event["ts"] + event.get("dur", 0.0))
        names.append(self._names.setdefault(event["name"], len(self._names)))

    def finish(self) -> None:
        """Take a trace's operations as complete: who called whom is known only then."""
        by_number = list(self._names)
        for starts, ends, names in self._threads.values():
            callers: list[int] = []
            for at in sorted(range(len(starts)), key=lambda i: (starts[i], -ends[i])):
                while callers and ends[callers[-1]] <= starts[at]:
                    callers.pop()
                took = ends[at] - starts[at]
                if callers:
                    self.times[by_number[names[callers[-1]]]][0] -= took
                time = self.times[by_number[names[at]]]
                time[0] += took
                time[1] += 1
                callers.append(at)
        self._threads.clear()


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace that took time, in the file's order.

    Raises:
        BadInput: it is not there, or no trace.
    """
    try:
        ijson = importlib.import_module("ijson")
    except ImportError as error:
        raise BadInput("ijson is not installed: install flyte-batch with its extra 'monitoring'") from error
    try:
        with _opened(path) as file:
            for event in ijson.items(file, "traceEvents.item", use_float=True):
                if event.get("ph") == "X":
                    yield event
    except (ijson.JSONError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no trace of the torch profiler, or only a part of one: {error}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzip else path.open("rb")


def _moved(traces: Iterable[Path], folder: Path) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(Path(shutil.move(trace, folder / trace.name)) for trace in sorted(traces))
