"""From a user's words (``--engine auto --model demo``) to an engine, in two steps.

`choose_engine` is quick and loads nothing: it runs where the job is submitted and rejects what cannot work before any
machine starts. `start_engine` runs in the replica and loads the model.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyte_batch.engines.base import Engine
from flyte_batch.errors import BadInput, EngineError
from flyte_batch.records import Completion, SamplingParameters

DEMO = "demo"
_PACKAGES = {"ctranslate2": ("ctranslate2", "tokenizers"), "fake": ()}
_EXTRAS = {"ctranslate2": "cpu"}
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# What the converter leaves behind unless told to copy it.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and a model that can be expected to work together.

    Attributes:
        engine: ``ctranslate2`` or ``fake``.
        model: ``demo``, a folder, or a Hugging Face id with or without ``@revision``. ``demo`` stays a word: the
            package's folder differs from machine to machine.
        identity: hash of what determines the outputs; equal for equal engines and model files, wherever they lie.
    """

    engine: str
    model: str
    identity: str


def choose_engine(engine: str = "auto", model: str = DEMO) -> EngineChoice:
    """Decide which engine runs a model, without loading either. Reads the model's files once, for the identity.

    Args:
        engine: ``auto``, ``ctranslate2`` or ``fake``.
        model: ``demo`` (the packaged model), the path of a converted model, or a Hugging Face id, ``owner/name`` or
            ``owner/name@revision``, of one. Without a revision the identity holds for whatever ``main`` is.

    Raises:
        BadInput: what cannot work, in one line, with the remedy.
    """
    known = ["auto", *_PACKAGES]
    if engine not in known:
        close = difflib.get_close_matches(str(engine), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"unknown engine {engine!r}: {hint}engines are {', '.join(known)}")
    name = "ctranslate2" if engine == "auto" else engine
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            f"the engine {name} needs {' and '.join(missing)}, not installed here: "
            f"install flyte-batch with its extra '{_EXTRAS[name]}'"
        )
    if name == "fake":
        return EngineChoice(name, model, _digest("fake", model))
    if not isinstance(model, str) or not model.strip():
        raise BadInput("no model given: name demo, the folder of a converted model, or a Hugging Face id (owner/name)")
    folder = _local_folder(model)
    if folder is not None:
        check_folder(folder)
        return EngineChoice(name, model, _digest(name, _folder_hash(folder)))
    found = _HUB_ID.fullmatch(model)
    if found is None:
        hint = " (did you mean demo?)" if difflib.get_close_matches(model, [DEMO], 1) else ""
        raise BadInput(
            f"there is no model {model!r}{hint}: name demo, a folder that exists, or a Hugging Face id (owner/name)"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BadInput(
            f"{model} is no folder here, and to download it huggingface_hub is missing: "
            "install flyte-batch with its extra 'hf'"
        )
    return EngineChoice(name, model, _digest(name, f"{found['id']}@{found['revision'] or 'main'}"))


async def start_engine(
    choice: EngineChoice, sampling: SamplingParameters | None = None, **options: Any
) -> Engine[Any, Completion]:
    """Load what `choose_engine` chose; a Hugging Face model is downloaded first.

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
    from flyte_batch.engines.ctranslate2 import CTranslate2Engine

    folder = _local_folder(choice.model)
    if folder is None:
        folder = await asyncio.to_thread(_download, choice.model)
        if not (folder / "model.bin").is_file():
            raise BadInput(
                f"{choice.model} holds no model.bin, which CTranslate2 needs: convert it and name the new folder: "
                f"{_conversion(choice.model, _BESIDE[:2])}"
            )
    check_folder(folder)
    return await CTranslate2Engine.start(folder, sampling=sampling, **options)


def check_folder(folder: Path) -> None:
    """Whether a folder holds a model that CTranslate2 can load.

    Raises:
        BadInput: what is missing and how to get it.
    """
    if not folder.is_dir():
        raise BadInput(f"the model {folder} is a file: name the folder that holds model.bin")
    if not (folder / "model.bin").is_file():
        beside = [name for name in _BESIDE if (folder / name).is_file()] or _BESIDE[:2]
        if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
            raise BadInput(
                f"{folder} holds a Hugging Face model, CTranslate2 needs a converted one (model.bin): "
                f"{_conversion(folder, beside)}"
            )
        raise BadInput(f"{folder} holds no model: looked for model.bin, as ct2-transformers-converter writes it")
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(
            f"{folder} holds model.bin but no tokenizer.json: copy it, and tokenizer_config.json, from the model that "
            "was converted"
        )


def _conversion(model: str | Path, beside: Sequence[str]) -> str:
    return f"ct2-transformers-converter --model {model} --output_dir OUT --copy_files {' '.join(beside)}"


def _local_folder(model: str) -> Path | None:
    """The folder that a model's name means here; None for what can only be a Hugging Face id."""
    if model == DEMO:
        from flyte_batch.demo import model_path

        return model_path("ctranslate2")
    if "://" in model:
        raise BadInput(
            f"the model {model} is remote: download it to a folder first, or name a Hugging Face id (owner/name)"
        )
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


def _download(model: str) -> Path:
    found = _HUB_ID.fullmatch(model)
    if found is None:
        raise BadInput(f"there is no folder {model} here, and it is no Hugging Face id (owner/name)")
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise BadInput(
            f"to download {model}, huggingface_hub is missing: install flyte-batch with its extra 'hf'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                found["id"],
                revision=found["revision"],
                allow_patterns=["model.bin", "*.json", "*.jinja", "vocabulary.txt"],
            )
        )
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"Hugging Face has no model {found['id']}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput(f"the model {found['id']} has no revision {found['revision']}") from error
    except Exception as error:  # many kinds, of several libraries: no network, no space, gated, ...
        first = str(error).strip().splitlines()[:1]
        raise EngineError(
            f"the model {model} cannot be downloaded ({type(error).__name__}: {' '.join(first)}): check the network, "
            "or download it beforehand and name its folder"
        ) from error
