"""From a model's name and options to a running ``AsyncLLM``, or to one clear error with no process left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import process
from pathlib import Path
from typing import Any, Literal

from flyte_batch.engines.hub import HubModel
from flyte_batch.engines.stored import LIST_NAME
from flyte_batch.engines.tokenising import ModelFolder, PromptTokeniser
from flyte_batch.engines.vllm_options import (
    VLLMOptions,
    engine_arguments,
    lora_rank,
    memory_advice,
    one_line,
    sampling_arguments,
)
from flyte_batch.engines.vllm_processes import EngineProcesses, read_errors
from flyte_batch.errors import BadInput, EngineError, EngineOutOfMemory, FlyteBatchError
from flyte_batch.records import SamplingParameters, StructuredOutput

_log = logging.getLogger(__name__)

# Set before vLLM is imported, unless the user did. spawn: a fork of a process with threads, as ours always is, may
# deadlock. The log level: vLLM writes some sixty lines to the terminal at every start.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_LEVEL": "WARNING"}
_ERRORS = "FLYTE_BATCH_ENGINE_ERRORS"  # tells the engine's processes where to write what went wrong
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
# vLLM on a CPU takes most of the machine's memory for its cache unless told otherwise, as if it were a GPU's.
_CPU_CACHE_BYTES = 1 << 30
_LOOK_EVERY_S = 0.3
_GRACE_S = 5.0
_NO_JSON = re.compile(r"\(char \d+\)$")  # how every JSONDecodeError ends
# One start at a time: which processes are new is told by comparing, and vLLM measures the device's free memory.
_STARTING = threading.Lock()
# What a process says that only repeats that another one failed.
_ECHOES = ("See root cause above", "See stack trace for root cause", "initialization failed", "EngineDeadError")


@dataclass(slots=True)
class Launch:
    """One start: what it was asked, and what has to be cleaned up after it.

    Attributes:
        model: a folder, a Hugging Face id, or an object store's URI.
        processes: those of vLLM, from the moment it starts any.
        folder: temporary, for the errors of the engine's processes and the small files of a streamed model.
    """

    model: str
    options: VLLMOptions
    sampling: SamplingParameters
    chat: bool | Literal["auto"]
    lora: str | None
    streamed: Mapping[str, Any] | None = None
    processes: EngineProcesses | None = None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="flyte-batch-vllm-")))
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def said(self) -> list[str]:
        """What vLLM's processes logged as errors so far, the first one first, without those that only repeat it."""
        lines = list(read_errors(self.folder / "errors.jsonl"))
        return [line for line in lines if not any(echo in line for echo in _ECHOES)] or lines

    def clean(self) -> list[int]:
        """End every process and delete the folder; blocks for some seconds where one does not want to end.

        Returns:
            Ids of processes that had to be killed.
        """
        killed = self.processes.end(_GRACE_S) if self.processes is not None else []
        if killed:
            _log.warning("processes of the vLLM engine of %s did not end and were killed: %s", self.model, killed)
        shutil.rmtree(self.folder, ignore_errors=True)
        return killed


@dataclass(frozen=True, slots=True)
class Started:
    """A running engine and what goes with it.

    Attributes:
        engine: vLLM's ``AsyncLLM``.
        tokeniser: prompts to token ids.
        sampling: ``SamplingParams`` that each record's are copied from.
        lora: ``LoRARequest`` of every record, or None.
        image_tokens: most tokens that a picture takes; None where the model takes no pictures.
        slots: most records that are computed at once.
        capacity_tokens: tokens that the KV cache holds.
    """

    engine: Any
    tokeniser: PromptTokeniser
    sampling: Any
    lora: Any
    image_tokens: int | None
    slots: int
    capacity_tokens: int


def refuse_import_of_main() -> None:
    """Raise in a process that vLLM started and that is importing the user's script, as spawned processes do.

    Raises:
        BadInput: the script starts an engine when it is imported; says what to write.
    """
    if not getattr(process.current_process(), "_inheriting", False):
        return
    message = (
        "the script starts an engine while vLLM's own process imports it: put the call below "
        "`if __name__ == '__main__':`, as for any use of multiprocessing"
    )
    path = os.environ.get(_ERRORS)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"message": message, "error": "BadInput", "text": message}) + "\n")
    raise BadInput(message)


async def stream_arguments(uri: str, options: VLLMOptions, folder: Path) -> Mapping[str, Any]:
    """Engine arguments that stream the weights of ``uri`` into the device; other files are downloaded to ``folder``.

    Raises:
        BadInput: flyteplugins-vllm is missing, or there is no model at ``uri``.
        EngineError: the object store cannot be read.
    """
    if uri.startswith("file:"):
        raise BadInput(f"{uri} is no object store: name the folder itself")
    try:
        from flyteplugins.vllm.model_streamer import LOAD_FORMAT, engine_args
    except ImportError as error:
        raise BadInput(
            f"to stream {uri}, flyteplugins-vllm is missing: install flyte-batch with its extra 'vllm', or download "
            "the model and name its folder"
        ) from error
    if options.load_format not in ("auto", LOAD_FORMAT):
        raise BadInput(f"a model in an object store is streamed: leave load_format={options.load_format!r} out")
    try:
        arguments: Mapping[str, Any] = await engine_args(uri, local_dir=folder)
    except Exception as error:  # many kinds, of the object store's libraries
        raise EngineError(f"the model {uri} cannot be read ({type(error).__name__}: {one_line(error)})") from error
    if not (folder / "config.json").is_file():
        if (folder / LIST_NAME).is_file():
            raise BadInput(f"the model at {uri} is copied by half: wait for its prefetch to end, or run it again")
        raise BadInput(f"there is no model at {uri}: looked for config.json below it")
    return arguments


def build(launch: Launch) -> Started:
    """Start vLLM; blocks until the model is loaded.

    Raises:
        BadInput: an option or the model cannot work.
        EngineOutOfMemory: the model or its cache does not fit; the message says what to lower, and to how much.
        EngineError: vLLM could not start for another reason, as it says it.
    """
    import_vllm()
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if not current_platform.device_type:
        raise BadInput(
            "vLLM sees no GPU here, nor any other device it was built for: ask for one in the task's resources "
            "(gpu='A10G:1'), or take the engine ctranslate2"
        )
    options, model = launch.options, launch.model
    arguments = engine_arguments(options, {f.name for f in dataclasses.fields(AsyncEngineArgs)})
    folder, place = _locate(launch)
    files = _read_files(folder, options.trust_remote_code)
    if launch.chat is True and files.template is None:
        raise BadInput(f"chat=True, but {model} has no chat template: leave chat out to feed the plain text")
    template = sampling_template(launch, files)
    lora = _lora_arguments(launch.lora)
    arguments |= {**place, **lora}
    if current_platform.is_cpu() and _cache_unsized(arguments):
        arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    # Before the configuration is made: it is what tells vLLM's processes how to log.
    with _STARTING, _errors_to(launch.folder / "errors.jsonl", arguments):
        config = _configuration(AsyncEngineArgs, arguments, model)
        verify(template, config)
        if launch.cancelled.is_set():
            raise EngineError(f"the start of {model} was cancelled")
        launch.processes = EngineProcesses()
        try:
            with _watched(launch):
                engine = AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.get("disable_log_stats", False))
        except Exception as error:
            raise start_failure(error, launch.said, model) from error
    cache, scheduler = config.cache_config, config.scheduler_config
    engines = config.parallel_config.data_parallel_size
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    capacity = tokens * engines if tokens else (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    context = config.model_config.max_model_len
    tokeniser = PromptTokeniser(
        files.tokenizer, files.template if launch.chat else None, context, launch.sampling.max_tokens
    )
    return Started(
        engine=engine,
        tokeniser=tokeniser,
        sampling=template,
        lora=_lora_request(launch.lora),
        image_tokens=_image_tokens(config),
        slots=scheduler.max_num_seqs * engines,
        capacity_tokens=capacity or scheduler.max_num_seqs * context,
    )


def start_failure(error: BaseException, said: Sequence[str], model: str) -> FlyteBatchError:
    """Why vLLM did not start, as one of our errors.

    Args:
        error: what vLLM raised here; it rarely says more than that another process failed.
        said: what the other processes logged, the first failure first.
        model: for the message.
    """
    texts = [*said, f"{type(error).__name__}: {error}"]
    for text in texts:
        advice = memory_advice(text)
        if advice is not None:
            return EngineOutOfMemory(f"vLLM cannot load {model}: {advice}")
    first = texts[0].strip().splitlines()[0] if said else one_line(error)
    if first.startswith("BadInput: "):
        return BadInput(first.removeprefix("BadInput: "))
    return EngineError(f"vLLM cannot load {model}: {first}")


def import_vllm() -> None:
    """Import vLLM with what it reads from the environment set, where the user left it out.

    Raises:
        BadInput: it is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise BadInput(
                f"vLLM is installed, but {error.name}, which it needs, is not: install vllm again"
            ) from error
        raise BadInput("vllm is not installed here: install flyte-batch with its extra 'vllm'") from error
    except (ImportError, OSError) as error:  # a CUDA library that is missing or too old
        raise BadInput(f"vLLM is installed but cannot be loaded: {one_line(error)}") from error


def _locate(launch: Launch) -> tuple[Path, dict[str, Any]]:
    """The folder of tokenizer and configuration, and the engine arguments that say where the model is."""
    if launch.streamed is not None:
        return Path(launch.streamed["model"]), dict(launch.streamed)
    folder = Path(launch.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            converted = " (it is one for CTranslate2)" if (folder / "model.bin").is_file() else ""
            raise BadInput(f"{folder} holds no Hugging Face model{converted}: looked for config.json")
        if not any(folder.glob("*.safetensors")) and (folder / "model.bin").is_file():
            raise BadInput(f"{folder} holds a model converted for CTranslate2: name the folder it was converted from")
        return folder, {"model": str(folder)}
    hub = HubModel.parse(launch.model)
    if hub is None or folder.exists():
        raise BadInput(
            f"there is no model {launch.model!r}: name a folder that exists, a Hugging Face id (owner/name) or the URI "
            "of a folder in an object store"
        )
    place = {"model": hub.id} | ({"revision": hub.revision, "tokenizer_revision": hub.revision} if hub.revision else {})
    return hub.download(_SMALL_FILES), place


def _read_files(folder: Path, trust_remote_code: bool) -> ModelFolder:
    """Tokenizer and chat template; a tokenizer of an older format is converted by transformers."""
    if (folder / "tokenizer.json").is_file():
        return ModelFolder.read(folder)
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code).backend_tokenizer
    except Exception as error:  # whatever the model's own code raises
        raise BadInput(
            f"{folder} holds no tokenizer.json, and transformers cannot make one of what is there ({one_line(error)}): "
            "add the tokenizer's files"
            + ("" if trust_remote_code else ", or allow its own code: trust_remote_code=True")
        ) from error
    with tempfile.TemporaryDirectory(prefix="flyte-batch-tokenizer-") as converted:
        for path in (*folder.glob("*.json"), *folder.glob("*.jinja")):
            shutil.copy(path, converted)
        backend.save(str(Path(converted) / "tokenizer.json"))
        return ModelFolder.read(Path(converted))


def sampling_template(launch: Launch, files: ModelFolder) -> Any:
    """vLLM's ``SamplingParams`` for a launch, without what differs from record to record.

    Raises:
        BadInput: a parameter is out of vLLM's range, or unknown to it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    special = {token.content: i for i, token in files.tokenizer.get_added_tokens_decoder().items() if token.special}
    arguments = sampling_arguments(
        launch.sampling, launch.options.sampling_args or {}, SamplingParams.__struct_fields__, special
    )
    try:
        form = launch.sampling.structured
        if form is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**_form_arguments(form))
        return SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
    except Exception as error:  # VLLMValidationError, TypeError, pydantic's
        raise BadInput(f"vLLM refuses the sampling parameters: {one_line(error)}") from error


def _form_arguments(form: StructuredOutput) -> dict[str, Any]:
    if form.choice:
        return {"choice": list(form.choice)}
    named = {"json": form.json_schema, "regex": form.regex, "grammar": form.grammar}
    return {name: value for name, value in named.items() if value is not None}


def _configuration(kind: Any, arguments: Mapping[str, Any], model: str) -> Any:
    try:
        return kind(**arguments).create_engine_config()
    except Exception as error:  # pydantic's, ValueError, OSError, ... : all about the model's files or the options
        advice = memory_advice(str(error))
        if advice is not None:
            raise EngineOutOfMemory(f"vLLM cannot load {model}: {advice}") from error
        if _NO_JSON.search(one_line(error)):  # vLLM does not say which file; pydantic hides that it was a file
            raise BadInput(f"a file of {model} is broken: JSON was expected in it ({one_line(error)})") from error
        raise BadInput(f"vLLM refuses {model} with these options: {one_line(error)}") from error


def verify(template: Any, config: Any) -> None:
    """What vLLM checks of every record's parameters, once and before anything starts.

    Raises:
        BadInput: vLLM would refuse every record.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    model = config.model_config
    tokenizer = cached_tokenizer_from_config(model)
    try:
        probe = copy.deepcopy(template)
        probe.verify(model, config.speculative_config, config.structured_outputs_config, tokenizer)
        probe.update_from_tokenizer(tokenizer)
    except Exception as error:
        raise BadInput(f"vLLM refuses the sampling parameters: {one_line(error)}") from error


def _cache_unsized(arguments: Mapping[str, Any]) -> bool:
    named = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"} & set(arguments)
    return not named and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")


def _lora_folder(lora: str) -> Path:
    folder = Path(lora).expanduser()
    if folder.is_dir():
        return folder
    hub = HubModel.parse(lora)
    if hub is None or folder.exists():
        raise BadInput(f"lora: there is no folder {lora}: check the path, or name a Hugging Face id (owner/name)")
    return hub.download(["*.json", "*.safetensors", "*.bin"])


def _lora_arguments(lora: str | None) -> dict[str, Any]:
    if lora is None:
        return {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(_lora_folder(lora))}


def _lora_request(lora: str | None) -> Any:
    if lora is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=lora, lora_int_id=1, lora_path=str(_lora_folder(lora)))


def _image_tokens(config: Any) -> int | None:
    if not config.model_config.supports_multimodal_inputs:
        return None
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY)
    budget.reset_cache()
    tokens = budget.mm_max_toks_per_item.get("image")
    return int(tokens) if tokens else None


@contextmanager
def _errors_to(path: Path, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the processes that vLLM starts meanwhile write their errors to a file, unless the user set up its logging."""
    from vllm import logger

    ours = {_ERRORS: str(path)}
    asked = any(
        (
            os.environ.get("VLLM_LOGGING_CONFIG_PATH"),
            os.environ.get("VLLM_CONFIGURE_LOGGING") == "0",
            {"logging_config", "log_config_file", "log_level"} & set(arguments),
        )
    )
    default = getattr(logger, "DEFAULT_LOGGING_CONFIG", None)
    if default is not None and not asked:
        logging_config = copy.deepcopy(default)
        logging_config["handlers"]["flyte_batch"] = {
            "()": "flyte_batch.engines.vllm_processes.ErrorFile", "path": str(path), "parent": os.getpid(),
        }  # fmt: skip
        logging_config["loggers"]["vllm"]["handlers"].append("flyte_batch")
        file = path.with_name("logging.json")
        file.write_text(json.dumps(logging_config), encoding="utf-8")
        ours["VLLM_LOGGING_CONFIG_PATH"] = str(file)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _watched(launch: Launch) -> Iterator[None]:
    """Take note of the processes while they come, and kill them as soon as the start is cancelled.

    A core that dies while it starts leaves its workers to nobody: they have to be known before.
    """
    processes, over = launch.processes, threading.Event()
    assert processes is not None  # noqa: S101  for the type checker: build has just made it

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            processes.look()
            if launch.cancelled.is_set():
                processes.end(0)

    thread = threading.Thread(target=watch, name="vllm-start-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        processes.started()
