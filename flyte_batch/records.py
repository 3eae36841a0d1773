"""The words that travel: a record's input, its result, and what is asked of the engine.

Leaf module: it imports nothing of flyte_batch, so that every room can speak of the same types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class CostEstimator(Protocol):
    """A record that knows what it takes of the device, in the batcher's unit.

    Same protocol as ``flyte.extras.CostEstimator``.
    """

    def estimate_cost(self) -> int: ...


@runtime_checkable
class TokenEstimator(Protocol):
    """A record that knows its number of tokens. Same protocol as ``flyte.extras.TokenEstimator``."""

    def estimate_tokens(self) -> int: ...


@dataclass(slots=True)
class Prompt:
    """The usual record: a text to answer. A drop-in for ``flyte.extras.Prompt``.

    Attributes:
        text: what the model is asked.
        system: instructions that a chat model gets before ``text``; None for none.
        images: pictures for a vision model, before the text: each the bytes of an encoded picture (PNG, JPEG, ...), a
            path, or a ``data:`` URL.
        seed: tells this record from others when sampling: an engine started with a seed mixes the two, so that a row
            is sampled alike in every run, whatever its neighbours. None uses the engine's seed as it is.
    """

    text: str
    system: str | None = None
    images: tuple[bytes | str, ...] = ()
    seed: int | None = None

    def estimate_tokens(self) -> int:
        """A rough number of tokens, at four characters each; engines replace it by the exact one."""
        return (len(self.text) + len(self.system or "")) // 4 + 1


@dataclass(slots=True)
class Chat:
    """A record with turns: a conversation whose next message the model writes.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` each, as in OpenAI's chat format. A content is a text, or a list of
            parts: ``{"type": "text", "text": ...}``, ``{"type": "image_url", "image_url": {"url": "data:..."}}``.
        seed: as in `Prompt`.
    """

    messages: Sequence[Mapping[str, Any]]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A form that every response has to have; exactly one of these. An engine decodes within it and checks the result.

    Attributes:
        json_schema: the text of a JSON schema.
        regex: a regular expression that the whole response matches.
        choice: the response is one of these.
        grammar: a context-free grammar in GBNF (https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md).

    Raises:
        ValueError: none is given, or several.
    """

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if getattr(self, each.name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of json_schema, regex, choice, grammar; got {' and '.join(given) or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How an engine continues a prompt; names and meanings are those of vLLM's ``SamplingParams``.

    https://docs.vllm.ai/en/stable/api/vllm/sampling_params.html. An engine that has no such option refuses a value
    other than the default.

    Attributes:
        max_tokens: most tokens to generate for a record, at least 1.
        temperature: 0 is greedy (deterministic); above it, tokens are sampled.
        top_p: sample from the smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: sample from the k likeliest tokens; 0 means all of them.
        min_p: sample from tokens at least so likely as this share of the likeliest one, in [0, 1].
        stop: texts that end a response; the text itself is left out of it.
        stop_token_ids: tokens that end a response, besides the model's own end.
        min_tokens: an end before so many tokens is not allowed.
        ignore_eos: go on to ``max_tokens`` whatever the model says: for benchmarks.
        repetition_penalty: above 1 discourages tokens that already occurred in prompt or response.
        presence_penalty: above 0 discourages tokens that already occurred in the response, in [-2, 2].
        frequency_penalty: the same for each time that they occurred, in [-2, 2].
        bad_words: texts that are never generated.
        seed: for sampling; the same seed and engine give the same texts where the engine allows it.
        structured: a form that responses must have.

    Raises:
        ValueError: names the parameter that is out of range and its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    min_tokens: int = 0
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[str, ...] = field(default=())
    seed: int | None = None
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        for name in ("stop", "bad_words"):
            if any(not text for text in getattr(self, name)):
                raise ValueError(f"{name} must not hold an empty text: it would be found in every response")


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine made of one record.

    Attributes:
        text: the response, detokenised, without the prompt and the stop text.
        finish_reason: ``stop`` (the model or a stop text ended it) or ``length`` (``max_tokens`` or the context did).
        prompt_tokens: tokens of the prompt as the model saw it, template included.
        response_tokens: tokens generated, the end token not counted.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    response_tokens: int
