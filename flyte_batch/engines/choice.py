"""From a user's words (``--engine auto --model demo``) to an engine, in two steps.

`choose_engine` is quick and loads nothing: it runs where the job is submitted and rejects what cannot work before any
machine starts. `start_engine` runs in the replica and loads the model.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyte_batch.engines.base import Engine
from flyte_batch.engines.hub import HubModel
from flyte_batch.engines.stored import check_whole
from flyte_batch.errors import BadInput
from flyte_batch.records import Completion, SamplingParameters

DEMO = "demo"
_PACKAGES = {"ctranslate2": ("ctranslate2", "tokenizers"), "vllm": ("vllm",), "fake": ()}
_EXTRAS = {"ctranslate2": "cpu", "vllm": "vllm"}
# What the converter leaves behind unless told to copy it.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# What CTranslate2 reads of a converted model on Hugging Face.
_CONVERTED = ("model.bin", "*.json", "*.jinja", "vocabulary.txt")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and a model that can be expected to work together.

    Attributes:
        engine: ``ctranslate2``, ``vllm`` or ``fake``.
        model: ``demo``, a folder, a Hugging Face id with or without ``@revision``, or an object store's URI. ``demo``
            stays a word: the package's folder differs from machine to machine.
        identity: hash of what determines the outputs; equal for equal engines and model files, wherever they lie.
    """

    engine: str
    model: str
    identity: str


def choose_engine(engine: str = "auto", model: str = DEMO, here: bool = True) -> EngineChoice:
    """Decide which engine runs a model, without loading either. Reads a folder's files once, for the identity.

    ``auto`` takes vLLM for Hugging Face models where it can, and CTranslate2 for what was converted for it and for the
    demo model.

    Args:
        engine: ``auto``, ``ctranslate2``, ``vllm`` or ``fake``.
        model: ``demo`` (the packaged model), the path of a model's folder, a Hugging Face id, ``owner/name`` or
            ``owner/name@revision``, or the URI of a folder in an object store, for vLLM. The identity of the last two
            is that of the name: without a revision it holds for whatever ``main`` is, and what lies at a URI must not
            change.
        here: whether the engine will run in this environment; False where it runs in other containers, whose packages
            are not to be looked for here.

    Raises:
        BadInput: what cannot work, in one line, with the remedy.
    """
    known = ["auto", *_PACKAGES]
    if engine not in known:
        close = difflib.get_close_matches(str(engine), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"unknown engine {engine!r}: {hint}engines are {', '.join(known)}")
    if engine != "fake" and (not isinstance(model, str) or not model.strip()):
        raise BadInput("no model given: name demo, a model's folder, or a Hugging Face id (owner/name)")
    name = _engine_for(model, here) if engine == "auto" else engine
    if here:
        _require_installed(name)
    if name == "fake":
        return EngineChoice(name, model, _digest("fake", model))
    if model.startswith("file:"):
        raise BadInput(f"the model {model} is a folder of this machine: name it by its path")
    if "://" in model:
        if name != "vllm":
            raise BadInput(
                f"the model {model} is remote: download it to a folder first, name a Hugging Face id (owner/name), or "
                "take the engine vllm, which streams it"
            )
        return EngineChoice(name, model, _digest(name, model))
    folder = _local_folder(model, name)
    if folder is not None:
        check_folder(folder, name)
        return EngineChoice(name, model, _digest(name, _folder_hash(folder)))
    hub = HubModel.parse(model)
    if hub is None:
        hint = " (did you mean demo?)" if difflib.get_close_matches(model, [DEMO], 1) else ""
        raise BadInput(
            f"there is no model {model!r}{hint}: name demo, a folder that exists, or a Hugging Face id (owner/name)"
        )
    if here and importlib.util.find_spec("huggingface_hub") is None:
        raise BadInput(
            f"{model} is no folder here, and to download it huggingface_hub is missing: "
            "install flyte-batch with its extra 'hf'"
        )
    return EngineChoice(name, model, _digest(name, f"{hub.id}@{hub.revision or 'main'}"))


def _engine_for(model: str, here: bool) -> str:
    """What ``auto`` means for a model."""
    if model == DEMO:
        return "ctranslate2"
    if "://" in model:
        return "vllm"
    vllm = not here or importlib.util.find_spec("vllm") is not None
    folder = _local_folder(model, "ctranslate2")
    if folder is None:
        return "vllm" if vllm and HubModel.parse(model) is not None else "ctranslate2"
    return "vllm" if vllm and not (folder / "model.bin").is_file() and _holds_weights(folder) else "ctranslate2"


def _require_installed(name: str) -> None:
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            f"the engine {name} needs {' and '.join(missing)}, not installed here: "
            f"install flyte-batch with its extra '{_EXTRAS[name]}'"
        )


async def start_engine(
    choice: EngineChoice, sampling: SamplingParameters | None = None, **options: Any
) -> Engine[Any, Completion]:
    """Load what `choose_engine` chose; a model of Hugging Face or of an object store is fetched first.

    Args:
        choice: from `choose_engine`, maybe made on another machine.
        sampling: how prompts are continued.
        options: further parameters of the engine's ``start``.

    Raises:
        BadInput: the model's files or an option cannot work.
        EngineError: the model cannot be fetched or loaded; trying again may help.
    """
    if choice.engine == "fake":
        from flyte_batch.engines.fake import FakeEngine

        return await FakeEngine.start(sampling=sampling, **options)
    folder = None if "://" in choice.model else _local_folder(choice.model, choice.engine)
    if folder is not None:
        check_folder(folder, choice.engine)
    if choice.engine == "vllm":
        from flyte_batch.engines.vllm import VLLMEngine

        return await VLLMEngine.start(folder or choice.model, sampling=sampling, **options)
    from flyte_batch.engines.ctranslate2 import CTranslate2Engine

    if folder is None:
        folder = await asyncio.to_thread(_download_converted, choice.model)
    return await CTranslate2Engine.start(folder, sampling=sampling, **options)


def _download_converted(model: str) -> Path:
    hub = HubModel.parse(model)
    if hub is None:
        raise BadInput(f"there is no folder {model} here, and it is no Hugging Face id (owner/name)")
    folder = hub.download(_CONVERTED)
    if not (folder / "model.bin").is_file():
        raise BadInput(
            f"{model} holds no model.bin, which CTranslate2 needs: convert it and name the new folder: "
            f"{_conversion(model, _BESIDE[:2])}; or take the engine vllm"
        )
    check_folder(folder, "ctranslate2")
    return folder


def check_folder(folder: Path, engine: str = "ctranslate2") -> None:
    """Whether a folder holds a model that an engine can load.

    Args:
        folder: exists.
        engine: ``ctranslate2`` or ``vllm``.

    Raises:
        BadInput: what is missing and how to get it; also of a prefetched model that is copied by half.
    """
    if not folder.is_dir():
        raise BadInput(f"the model {folder} is a file: name the folder that holds it")
    check_whole(folder)
    if engine == "vllm":
        _check_weights(folder)
    else:
        _check_converted(folder)


def _check_weights(folder: Path) -> None:
    if not _holds_weights(folder) and (folder / "model.bin").is_file():
        raise BadInput(f"{folder} holds a model converted for CTranslate2: name the folder it was converted from")
    for what, there in (("config.json", (folder / "config.json").is_file()), ("weights", _holds_weights(folder))):
        if not there:
            raise BadInput(f"{folder} holds no {what}: vLLM needs a Hugging Face model (config.json, *.safetensors)")


def _check_converted(folder: Path) -> None:
    if not (folder / "model.bin").is_file():
        beside = [name for name in _BESIDE if (folder / name).is_file()] or _BESIDE[:2]
        if _holds_weights(folder):
            raise BadInput(
                f"{folder} holds a Hugging Face model, CTranslate2 needs a converted one (model.bin): "
                f"{_conversion(folder, beside)}; or take the engine vllm (flyte-batch's extra 'vllm'), which runs it "
                "as it is"
            )
        raise BadInput(f"{folder} holds no model: looked for model.bin, as ct2-transformers-converter writes it")
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(
            f"{folder} holds model.bin but no tokenizer.json: copy it, and tokenizer_config.json, from the model that "
            "was converted"
        )


def _holds_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))


def _conversion(model: str | Path, beside: Sequence[str]) -> str:
    return f"ct2-transformers-converter --model {model} --output_dir OUT --copy_files {' '.join(beside)}"


def _local_folder(model: str, engine: str) -> Path | None:
    """The folder that a model's name means here; None for what can only be a Hugging Face id."""
    if model == DEMO:
        from flyte_batch.demo import model_path

        return model_path("hf" if engine == "vllm" else "ctranslate2")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or (model.count("/") > 1 and "@" not in model):
        raise BadInput(f"there is no folder {model}: check the path; a relative one counts from {Path.cwd()}")
    return None


def _folder_hash(folder: Path) -> str:
    """Hash of names and contents of the files of a folder, subfolders excluded."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:  # whole: two fine-tunes of one model may differ only somewhere in the middle
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest(engine: str, model: str) -> str:
    return hashlib.sha256(f"{engine}\0{model}".encode()).hexdigest()[:16]
