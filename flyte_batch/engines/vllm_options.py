"""`VLLMEngine`'s options in vLLM's words, and vLLM's words about memory in ours: pure functions, without vLLM.

What cannot work is found here where it can be: a mistake in an option must not cost the minutes that a model takes to
load.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flyte_batch.errors import BadInput
from flyte_batch.records import SamplingParameters

# vLLM takes one of these as the highest rank of an adapter (vllm.config.lora.MaxLoRARanks).
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Engine arguments that would break how the engine is used, and why.
_ENGINE_REFUSED = {
    "model": "name the model as the first argument of start",
    "tokenizer": "prompts are tokenised with the model's own: put the tokenizer's files into the model's folder",
    "tokenizer_mode": "prompts are tokenised with the model's own tokenizer",
    "skip_tokenizer_init": "responses are detokenised by vLLM",
    "revision": "name it with the model: owner/name@revision",
    "tokenizer_revision": "name it with the model: owner/name@revision",
    "runner": "this engine continues texts",
    "convert": "this engine continues texts",
    "enable_lora": "name the adapter as lora=",
    "data_parallel_rank": "vLLM's external load balancing has no place here: replicas are Flyte's",
    "headless": "the engine is used from its own process",
}
# Sampling parameters that have no place in a Completion, and why.
_SAMPLING_REFUSED = {
    "n": "a record has one completion: give it several times, with a seed each",
    "output_kind": "only whole responses are used",
    "detokenize": "a completion is a text",
    "logprobs": "a completion holds a text, no probabilities",
    "prompt_logprobs": "a completion holds a text, no probabilities",
    "logprob_token_ids": "a completion holds a text, no probabilities",
    "structured_outputs": "give it as SamplingParameters(structured=...), whose result is checked too",
    "skip_clone": "it is vLLM's own",
    "stream_interval": "only whole responses are used",
}


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """What `VLLMEngine.start` was given beside model and sampling; its docstring says what each means.

    Raises:
        BadInput: a value is out of range; names the option and the range.
    """

    max_model_len: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    enable_prefix_caching: bool | None = None
    load_format: str = "auto"
    trust_remote_code: bool = False
    engine_args: Mapping[str, Any] | None = None
    sampling_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least, unit in (
            ("max_model_len", 2, "a token of prompt, one of response"),
            ("tensor_parallel_size", 1, "GPUs"),
            ("max_num_seqs", 1, "records at once"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise BadInput(f"{name} must be a whole number of at least {least} ({unit}), got {value!r}")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise BadInput(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")
        for name in ("engine_args", "sampling_args"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise BadInput(f"{name} must be a mapping of names to values, got a {type(value).__name__}")
        named = {field.name for field in fields(self)}
        for name in self.engine_args or {}:
            if name in named:
                raise BadInput(f"engine_args holds {name!r}, which is an option of its own: give it as {name}=...")
            if name in _ENGINE_REFUSED:
                raise BadInput(f"engine_args must not hold {name!r}: {_ENGINE_REFUSED[name]}")
        own = {field.name for field in fields(SamplingParameters)}
        for name in self.sampling_args or {}:
            if name in own:
                raise BadInput(f"sampling_args holds {name!r}, which SamplingParameters has: give it there")
            if name in _SAMPLING_REFUSED:
                raise BadInput(f"sampling_args must not hold {name!r}: {_SAMPLING_REFUSED[name]}")


def engine_arguments(options: VLLMOptions, known: Collection[str]) -> dict[str, Any]:
    """Keyword arguments for ``AsyncEngineArgs``; what the user left out is left to vLLM.

    Args:
        options: from the user.
        known: the names that this version of vLLM has.

    Raises:
        BadInput: ``engine_args`` holds a name that vLLM does not have.
    """
    extra = dict(options.engine_args or {})
    _require_known("engine_args", extra, known, "vLLM's engine")
    named = {
        "max_model_len": options.max_model_len,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "max_num_seqs": options.max_num_seqs,
        "enable_prefix_caching": options.enable_prefix_caching,
        "load_format": options.load_format,
        "trust_remote_code": options.trust_remote_code,
    }
    return {name: value for name, value in named.items() if value is not None} | extra


def sampling_arguments(
    sampling: SamplingParameters, extra: Mapping[str, Any], known: Collection[str], special: Mapping[str, int]
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.SamplingParams``, without the seed and the form of responses.

    Args:
        sampling: from the user.
        extra: further ones, in vLLM's words.
        known: the names that this version of vLLM has.
        special: text and id of the tokenizer's special tokens. They never show up in a response's text, so only their
            ids can end one.

    Raises:
        BadInput: ``extra`` holds a name that vLLM does not have.
    """
    _require_known("sampling_args", extra, known, "vLLM's SamplingParams")
    arguments: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": [text for text in sampling.stop if text not in special],
        "stop_token_ids": [*sampling.stop_token_ids, *(special[text] for text in sampling.stop if text in special)],
        "min_tokens": sampling.min_tokens,
        "ignore_eos": sampling.ignore_eos,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "bad_words": list(sampling.bad_words),
    }
    return arguments | dict(extra)


def mixed_seed(engine: int | None, record: int | None) -> int | None:
    """The seed of one record: a stable hash of the engine's and the record's, in [0, 2**63).

    The same pair gives the same seed in every run, process and version of Python; None where the engine has none.
    """
    if engine is None or record is None:
        return engine
    return int.from_bytes(hashlib.blake2b(f"{engine}:{record}".encode(), digest_size=8).digest(), "big") >> 1


def lora_rank(folder: Path) -> int:
    """``max_lora_rank`` for an adapter's folder, from its ``adapter_config.json``.

    Raises:
        BadInput: the folder holds no LoRA adapter, or one of a rank that vLLM does not take.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise BadInput(
            f"lora: {folder} holds no adapter_config.json: name the folder of a LoRA adapter as PEFT saves it, "
            "with adapter_config.json and adapter_model.safetensors"
        )
    try:
        rank = json.loads(path.read_text(encoding="utf-8"))["r"]
        return next(allowed for allowed in _LORA_RANKS if allowed >= rank)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"lora: {path} names no rank 'r' ({type(error).__name__}): save the adapter again") from error
    except StopIteration:
        raise BadInput(f"lora: {path} has the rank {rank}, vLLM takes {_LORA_RANKS[-1]} at most") from None


def one_line(error: BaseException) -> str:
    """The first line of an error that says something; of pydantic's only what is wrong."""
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic.ValidationError: several lines, with links to its own documentation
        found = [str(each.get("msg", "")).removeprefix("Value error, ") for each in details() if isinstance(each, dict)]
        names = [".".join(map(str, each.get("loc", ()))) for each in details() if isinstance(each, dict)]
        text = "; ".join(f"{name}: {message}" if name else message for name, message in zip(names, found, strict=True))
    else:
        text = str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def memory_advice(text: str) -> str | None:
    """What to lower, and to how much, if vLLM's message says that memory was short; None if it says something else.

    Written after the messages of vLLM 0.32 (``vllm/v1/worker/utils.py``, ``gpu_worker.py``, ``cpu_worker.py``,
    ``vllm/v1/core/kv_cache_utils.py``) and of older versions.

    Args:
        text: the message, maybe with the exception's name before it.
    """
    for pattern, advise in _ADVICE:
        found = pattern.search(text)
        if found is not None:
            return advise(found)
    return None


def _share_below(free: str, total: str) -> float:
    """What to ask for where so much is free: two hundredths less, for what the others still take."""
    return max(math.floor((float(free) / float(total) - 0.02) * 100), 1) / 100


def _advise_free(found: re.Match[str]) -> str:
    share = _share_below(found["free"], found["total"])
    return (
        f"only {found['free']} of {found['total']} GiB are free, and gpu_memory_utilization={found['asked']} asks for "
        f"{found['wanted']} GiB: set gpu_memory_utilization={share}, or end what else uses the device"
    )


def _advise_length(found: re.Match[str]) -> str:
    most = (
        int(found["most"]) if found["most"] else int(int(found["length"]) * float(found["has"]) / float(found["needs"]))
    )
    most = most // 16 * 16 if most >= 16 else most  # whole blocks of the cache
    lower = f"set max_model_len={most}" if most > 1 else "the model leaves no room: take a smaller or quantised one"
    return (
        f"one record of max_model_len={int(found['length']):,} tokens needs {found['needs']} GiB of KV cache, "
        f"{found['has']} GiB are left: {lower}, or kv_cache_dtype='fp8', or a larger gpu_memory_utilization"
    )


def _advise_old_length(found: re.Match[str]) -> str:
    return (
        f"max_model_len={int(found['length']):,} is more than the {int(found['most']):,} tokens that the KV cache "
        f"holds: set max_model_len={int(found['most'])}, or a larger gpu_memory_utilization"
    )


def _advise_no_cache(found: re.Match[str]) -> str:
    return (
        "the model's weights leave no memory for the KV cache: raise gpu_memory_utilization (0.95 where nothing else "
        "uses the GPU), shard the model with tensor_parallel_size=2, quantise it (quantization='fp8'), or lower "
        "max_num_seqs"
    )


def _advise_seqs(found: re.Match[str]) -> str:
    fewer = max(int(found["requests"]) // 2, 1)
    return (
        f"{found['requests']} records at once do not fit: set max_num_seqs={fewer}, or a lower gpu_memory_utilization"
    )


def _advise_cache_size(found: re.Match[str]) -> str:
    gib = max(math.floor(float(found["free"]) * 0.9), 1)
    return (
        f"only {found['free']} of {found['total']} GiB of memory are available for the KV cache: set "
        f"engine_args={{'kv_cache_memory_bytes': {gib} << 30}} or less, or end what else uses memory"
    )


def _advise_weights(found: re.Match[str]) -> str:
    tried = found.groupdict().get("tried")
    return (
        f"the device's memory is full{f' ({tried} more were asked for)' if tried else ''}: lower max_num_seqs or "
        "gpu_memory_utilization, quantise the model (quantization='fp8'), or shard it with tensor_parallel_size=2"
    )


def _advise_host(found: re.Match[str]) -> str:
    return (
        "its process was killed by the system, usually because the container's memory (not the GPU's) ran out: give "
        "the task more memory than the weights take"
    )


_GIB = r"[\d.]+"
_ADVICE: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(
            rf"(?:Free|Available) memory on (?:device|node)\s*\S*\s*\((?P<free>{_GIB})/(?P<total>{_GIB}) GiB\) on "
            rf"startup is less than desired [GC]PU memory utilization \((?P<asked>{_GIB}), (?P<wanted>{_GIB}) GiB\)"
        ),
        _advise_free,
    ),
    (
        re.compile(
            rf"max seq len \((?P<length>\d+)\), \((?P<needs>{_GIB}) GiB KV cache is needed, which is larger than the "
            rf"available KV cache memory \((?P<has>{_GIB}) GiB\)"
            r"(?:.*?estimated maximum model length is (?P<most>\d+))?",
            re.DOTALL,
        ),
        _advise_length,
    ),
    (
        re.compile(
            r"max seq len \((?P<length>\d+)\) is larger than the maximum number of tokens that can be stored in KV "
            r"cache \((?P<most>\d+)\)"
        ),
        _advise_old_length,
    ),
    (
        re.compile(rf"Available memory on node \S+ \((?P<free>{_GIB})/(?P<total>{_GIB}) GiB\) on kv cache allocation"),
        _advise_cache_size,
    ),
    (re.compile(r"No available memory for the cache blocks"), _advise_no_cache),
    (re.compile(r"warming up sampler with (?P<requests>\d+) dummy requests"), _advise_seqs),
    (re.compile(r"(?i)out of memory(?:.*?Tried to allocate (?P<tried>[\d.]+ \w+))?", re.DOTALL), _advise_weights),
    (re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b"), _advise_host),
    (re.compile(r"OutOfMemoryError|not enough GPU memory|CUBLAS_STATUS_ALLOC_FAILED"), _advise_weights),
)


def _require_known(option: str, given: Mapping[str, Any], known: Collection[str], owner: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), list(known), 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise BadInput(f"{option} holds {name!r}, which {owner} does not have: {hint}see vLLM's documentation")
