"""What a load test asks, of whom and how fast: from a user's words, checked before a model loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from flyte_batch.batching import ContinuousBatcher, EngineBatcher
from flyte_batch.batching.checks import finite_number, whole_number
from flyte_batch.engines import ContinuousEngine, Engine, EngineChoice, check_engine_options, choose_engine
from flyte_batch.errors import BadInput, BadRecord
from flyte_batch.load.generator import check_rate, check_times
from flyte_batch.load.levels import ServiceLevel
from flyte_batch.load.limits import check_precision
from flyte_batch.options import parse_object, sampling_parameters
from flyte_batch.prompts import PromptTemplate
from flyte_batch.records import Completion, Prompt, SamplingParameters

MOST_PROMPTS = 1000
"""That are read of a source."""


@dataclass(frozen=True)
class InteractiveBatching:
    """A batcher's options for callers who wait for their answers, where `EngineBatcher`'s defaults are for datasets.

    What does not fit the queue is rejected at once (`QueueFull`), so that what was accepted is answered in time, and
    callers take turns record by record.

    Attributes:
        max_batch_size: most records in a batch, for engines that take batches. A record waits for the batch before its
            own and then for its own: so the time of two batches must be well below the p99 that is wanted. CTranslate2
            takes 32 on each core.
        batch_timeout_s: seconds that a lone record waits for company on a free device. Under load batches fill while
            the device is busy, without it.
        max_queue_size: most records that wait: what the device answers in the p99 that is wanted, or less.
    """

    max_batch_size: int = 64
    batch_timeout_s: float = 0.005
    max_queue_size: int = 256

    def __post_init__(self) -> None:
        whole_number("max_batch_size", self.max_batch_size, at_least=1, remedy="give the most records of a batch")
        finite_number("batch_timeout_s", self.batch_timeout_s, remedy="give seconds; 0 waits for nobody")
        whole_number("max_queue_size", self.max_queue_size, at_least=1, remedy="give the most records that may wait")

    def batcher(
        self, engine: Engine[Any, Completion], sampling: SamplingParameters
    ) -> ContinuousBatcher[Any] | EngineBatcher[Any, Completion]:
        """A batcher that owns a started engine; to be started by ``async with``, or returned from a `singleton`."""
        if isinstance(engine, ContinuousEngine):
            return ContinuousBatcher(engine, max_queue_size=self.max_queue_size, turn_size=1, overflow="reject")
        return EngineBatcher(
            engine,
            max_batch_size=self.max_batch_size,
            target_batch_tokens=self.max_batch_size * (sampling.max_tokens + 512),
            batch_timeout_s=self.batch_timeout_s,
            max_queue_size=self.max_queue_size,
            turn_size=1,
            overflow="reject",
        )


@dataclass(frozen=True)
class LoadTest:
    """What to ask of whom, how fast, and what is promised. Made by `plan_load_test`.

    Attributes:
        choice: engine and model.
        sampling: how responses are continued.
        engine_options: further parameters of the engine's ``start``: the text of a JSON object.
        batching: the batcher's options.
        source: rows to ask, JSONL or Parquet, at most the first `MOST_PROMPTS`; None for the demo model's problems.
        template: a text with {column} fields, for the rows of ``source``.
        prompt: one text to ask again and again instead.
        rate_per_s: requests a second; None searches the highest rate that keeps the level.
        start_per_s: the first rate of a search.
        seconds: measured, in each step of a search.
        warm_up_s: before that, not measured.
        timeout_s: seconds after which a request is given up.
        precision: of a search, as for `find_limit`.
        seed: of arrivals and records.
        level: the objectives.
    """

    choice: EngineChoice
    sampling: SamplingParameters
    engine_options: str = "{}"
    batching: InteractiveBatching = field(default_factory=InteractiveBatching)
    source: str | None = None
    template: str = "{question}"
    prompt: str | None = None
    rate_per_s: float | None = None
    start_per_s: float = 8.0
    seconds: float = 20.0
    warm_up_s: float = 5.0
    timeout_s: float = 10.0
    precision: float = 0.1
    seed: int = 0
    level: ServiceLevel = field(default_factory=ServiceLevel)

    def __post_init__(self) -> None:
        if self.rate_per_s is not None:
            check_rate("rate", self.rate_per_s)
        check_rate("start_rate", self.start_per_s)
        check_times(self.seconds, self.warm_up_s, self.timeout_s, self.level)
        check_precision(self.precision)

    def to_json(self) -> str:
        """What travels to a replica."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LoadTest:
        return cls.from_values(json.loads(text))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> LoadTest:
        """
        Args:
            values: as JSON has them.
        """
        typed = {
            "choice": EngineChoice(**values["choice"]),
            "sampling": sampling_parameters(values["sampling"]),
            "batching": InteractiveBatching(**values["batching"]),
            "level": ServiceLevel(**values["level"]),
        }
        return cls(**{**values, **typed})


def plan_load_test(
    *,
    source: str | None = None,
    prompt: str | None = None,
    prompt_column: str = "question",
    prompt_template: str | None = None,
    engine: str = "auto",
    model: str = "demo",
    engine_options: str = "{}",
    max_tokens: int = 256,
    sampling_options: str = "{}",
    batching: InteractiveBatching | None = None,
    here: bool = True,
    **options: Any,
) -> LoadTest:
    """Check a user's words, without loading a model.

    Args:
        source: as in `LoadTest`; with ``prompt_column`` or ``prompt_template``.
        prompt: one text to ask.
        prompt_column: the column to ask, where no template is given.
        prompt_template: text with {column} fields.
        engine: as for `choose_engine`.
        model: as for `choose_engine`.
        engine_options: further options of the engine, a JSON object.
        max_tokens: most tokens of a response.
        sampling_options: further sampling parameters, a JSON object.
        batching: the batcher's options.
        here: whether the engine will run in this environment.
        options: `LoadTest`'s other attributes.

    Raises:
        TypeError, BadInput: what cannot work, in one line, with the remedy.
    """
    if source is not None and prompt is not None:
        raise BadInput("both a source and a prompt are given: leave one out")
    test = LoadTest(
        choice=choose_engine(engine, model, here=here),
        sampling=sampling_parameters({"max_tokens": max_tokens} | parse_object("sampling_options", sampling_options)),
        engine_options=json.dumps(parse_object("engine_options", engine_options), sort_keys=True),
        batching=batching or InteractiveBatching(),
        source=source,
        template=prompt_template if prompt_template is not None else PromptTemplate.for_column(prompt_column).text,
        prompt=prompt,
        **options,
    )
    check_engine_options(test.choice.engine, json.loads(test.engine_options), test.sampling)
    return test


def read_prompts(test: LoadTest) -> list[Prompt]:
    """What the test asks. Blocks on files.

    Raises:
        BadInput: the source cannot be read, or a row of it makes no prompt; the message says which.
    """
    if test.prompt is not None:
        return [Prompt(test.prompt)]
    if test.source is None:
        from flyte_batch.demo.problems import generate

        return [Prompt(problem.question) for problem in generate(MOST_PROMPTS, test.seed)]
    from flyte_batch.data.sources import open_source

    template = PromptTemplate(test.template)
    rows = open_source(test.source, columns=template.columns).head(MOST_PROMPTS).to_pylist()
    return each_of(template, rows, "row")


def each_of(make: Callable[[Any], Any], items: list[Any], what: str) -> list[Any]:
    """What ``make`` makes of every item.

    Raises:
        BadInput: names the first that it makes nothing of.
    """
    made = []
    for number, item in enumerate(items):
        try:
            made.append(make(item))
        except BadRecord as error:
            raise BadInput(
                f"{what} {number} (counted from 0) cannot be asked ({error}), and a request that fails at once is no "
                "load: leave it out"
            ) from error
    return made
