"""What a worker tells the driver about a chunk beside the counts: how its replica fared meanwhile.

Travels as one JSON text in `flyte_batch.ChunkReport`: Flyte takes 28 ms for nested dataclasses. Holds no rows: of
failed ones their number and error, a few for each cause.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flyte_batch.monitoring.gpu import GpuUse


@dataclass(frozen=True, slots=True)
class Sample:
    """A batcher's figures at one moment, all but the last three counted since its start.

    Between two samples of one batcher the differences of the four times add up to the time between them.

    Attributes:
        at: Unix time in seconds.
        busy_s: seconds with the device at work.
        starved_s: seconds with a free device and nothing waiting.
        assembling_s: seconds with a free device and records waiting for more.
        late_s: seconds with a free device that the event loop had not heard of.
        completed: records resolved.
        batches: calls of the engine.
        fill: sum of the batches' shares of what they might have held.
        queued: records waiting at that moment.
        running: records on the device at that moment.
    """

    at: float
    busy_s: float
    starved_s: float
    assembling_s: float
    late_s: float
    completed: int
    batches: int
    fill: float
    queued: int
    running: int

    def to_list(self) -> list[float]:
        """The fields in their order, as JSON holds them."""
        return [
            self.at, self.busy_s, self.starved_s, self.assembling_s, self.late_s,
            self.completed, self.batches, self.fill, self.queued, self.running,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A failed row.

    Attributes:
        row: its number in the source, from 0.
        cause: class of the error.
        message: what it says.
    """

    row: int
    cause: str
    message: str

    @property
    def gist(self) -> str:
        """The message without its numbers: rows that failed alike have it in common."""
        return re.sub(r"\d[\d,.]*", "#", self.message)


@dataclass(frozen=True, slots=True)
class Stall:
    """A time in which an event loop stood still.

    Attributes:
        at: Unix time of its end.
        seconds: how long it took.
        code: the function that held the loop.
    """

    at: float
    seconds: float
    code: str


@dataclass(frozen=True, slots=True)
class EngineLife:
    """What an engine did for a chunk before the chunk was done, or the engine had died and was built anew.

    Attributes:
        batcher: id of its batcher.
        engine: its class.
        started: Unix time when the chunk came to it: was begun, or had lost the engine before.
        loaded: Unix time when it was there.
        ended: Unix time when the chunk's part was committed, or the chunk had lost it.
        samples: of its batcher, from ``loaded`` to ``ended``.
        rows: of the chunk that it answered.
        tokens: of prompts and responses of these.
        is_told: whether its calls say when their device was at work. Of any other nobody knows, while the event loop
            stands still, whether it still is.
    """

    batcher: str
    engine: str
    started: float
    loaded: float
    ended: float
    samples: tuple[Sample, ...]
    rows: int
    tokens: int
    is_told: bool = False

    def later(self, seconds: float) -> EngineLife:
        """The same, so much later."""
        return replace(
            self,
            started=self.started + seconds,
            loaded=self.loaded + seconds,
            ended=self.ended + seconds,
            samples=tuple(replace(sample, at=sample.at + seconds) for sample in self.samples),
        )


@dataclass(frozen=True)
class ChunkDetails:
    """How a replica fared while it worked on a chunk.

    Attributes:
        process: which process: host and process id.
        lives: of the engines that worked on it: those that died, in their order, and the one that finished it.
        latencies: histogram of the chunk's records: seconds from queue to result.
        causes: class of the error -> failed rows.
        examples: some failed rows of each cause.
        prompt_lengths: histogram of prompts by tokens.
        response_lengths: histogram of responses by tokens.
        stalls: of the process' event loop.
        died: ids of batchers of this process that died meanwhile.
        gpus: what they did while the worker was at it.
    """

    process: str
    lives: tuple[EngineLife, ...]
    latencies: Mapping[float, int] = field(default_factory=dict)
    causes: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    prompt_lengths: Mapping[float, int] = field(default_factory=dict)
    response_lengths: Mapping[float, int] = field(default_factory=dict)
    stalls: tuple[Stall, ...] = ()
    died: tuple[str, ...] = ()
    gpus: tuple[GpuUse, ...] = ()

    @property
    def batcher(self) -> str:
        """Id of the batcher that finished the chunk."""
        return self.lives[-1].batcher

    @property
    def began(self) -> float:
        """Unix time when the worker began to read."""
        return self.lives[0].started

    @property
    def ended(self) -> float:
        """Unix time when the part was committed."""
        return self.lives[-1].ended

    def clock_lag(self, given: float, heard: float) -> float:
        """Seconds by which the replica's clock was behind the driver's, at least; negative if it was ahead.

        A replica can't begin with a chunk before it is given one, nor be heard of before it is done.

        Args:
            given: when the driver gave the chunk away, by its clock.
            heard: when it had the answer.
        """
        least, most = given - self.began, heard - self.ended
        return min(max(0.0, least), most) if least <= most else 0.0  # else it is an answer of another time, kept

    def later(self, seconds: float) -> ChunkDetails:
        """The same, all of it so much later, apart from what was seen of GPUs, whose times are told by themselves."""
        return replace(
            self,
            lives=tuple(life.later(seconds) for life in self.lives),
            stalls=tuple(replace(stall, at=stall.at + seconds) for stall in self.stalls),
        )

    def to_json(self) -> str:
        """One line of text."""
        lives = [asdict(replace(life, samples=())) | {"samples": _plain(life.samples)} for life in self.lives]
        return json.dumps(asdict(replace(self, lives=())) | {"lives": lives}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ChunkDetails:
        """What `to_json` gave.

        Raises:
            ValueError, TypeError, KeyError: the text is something else.
        """
        content: dict[str, Any] = json.loads(text)
        for life in content["lives"]:
            life["samples"] = tuple(Sample(*sample) for sample in life["samples"])
        content["lives"] = tuple(EngineLife(**life) for life in content["lives"])
        for name in ("latencies", "prompt_lengths", "response_lengths"):
            content[name] = {float(bound): number for bound, number in content[name].items()}
        content["examples"] = tuple(Example(**each) for each in content["examples"])
        content["died"] = tuple(content["died"])
        content["stalls"] = tuple(Stall(**each) for each in content["stalls"])
        content["gpus"] = tuple(gpu_use(each) for each in content["gpus"])
        return cls(**content)


def gpu_use(content: Mapping[str, Any]) -> GpuUse:
    """A `GpuUse` out of JSON."""
    return GpuUse(**{**content, "throttle_reasons": tuple(content["throttle_reasons"])})


def _plain(samples: tuple[Sample, ...]) -> list[list[float]]:
    return [[round(value, 6) for value in sample.to_list()] for sample in samples]
