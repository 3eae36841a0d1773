"""Options of an engine's ``start``, checked where a job is submitted: a typing error must not cost a model's load."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flyte_batch.errors import BadInput
from flyte_batch.records import SamplingParameters


def check_engine_options(engine: str, options: Mapping[str, Any], sampling: SamplingParameters) -> None:
    """Whether an engine has these options, and, as far as it is known without loading it, takes their values.

    Args:
        engine: ``ctranslate2``, ``vllm`` or ``fake``.
        options: of its ``start``, by name.
        sampling: how it is to continue prompts.

    Raises:
        BadInput: names the option and the remedy.
    """
    parameters = inspect.signature(_start_of(engine)).parameters
    known = [name for name, each in parameters.items() if each.kind == each.KEYWORD_ONLY and name != "sampling"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            more = "; anything else of vLLM's goes into engine_args" if engine == "vllm" else ""
            raise BadInput(
                f"the engine {engine} has no option {name!r}: {hint}its options are {', '.join(known)}{more}"
            )
    if engine == "ctranslate2":
        from flyte_batch.engines.ctranslate2 import check_sampling

        check_sampling(sampling)
    elif engine == "vllm":
        from flyte_batch.engines.structured import ResponseCheck
        from flyte_batch.engines.vllm_options import VLLMOptions

        if sampling.structured is not None:
            ResponseCheck(sampling.structured)
        VLLMOptions(**{name: value for name, value in options.items() if name not in ("chat", "lora")})


def _start_of(engine: str) -> Callable[..., Any]:
    if engine == "vllm":
        from flyte_batch.engines.vllm import VLLMEngine

        return VLLMEngine.start
    if engine == "ctranslate2":
        from flyte_batch.engines.ctranslate2 import CTranslate2Engine

        return CTranslate2Engine.start
    from flyte_batch.engines.fake import FakeEngine

    return FakeEngine.start
