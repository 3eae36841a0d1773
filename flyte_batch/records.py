"""The words that travel: a record's input, its result, and what is asked of the engine.

Leaf module: it imports nothing of flyte_batch, so that every room can speak of the same types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


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
    """

    text: str
    system: str | None = None

    def estimate_tokens(self) -> int:
        """A rough number of tokens, at four characters each; engines replace it by the exact one."""
        return (len(self.text) + len(self.system or "")) // 4 + 1


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How an engine continues a prompt; the names are those of vLLM's ``SamplingParams``.

    Attributes:
        max_tokens: most tokens to generate for a record, at least 1.
        temperature: 0 is greedy (deterministic); above it, tokens are sampled.
        top_p: sample from the smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: sample from the k likeliest tokens; 0 means all of them.
        stop: texts that end a response; the text itself is left out of it.
        repetition_penalty: above 1 discourages tokens that already occurred.
        seed: for sampling; the same seed and engine give the same texts where the engine allows it.

    Raises:
        ValueError: names the parameter that is out of range and its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = field(default=())
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty text: it would end every response at once")


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
