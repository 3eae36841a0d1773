"""CTranslate2: small and quantised language models on a CPU, or on a GPU, without torch.

Upstream: https://opennmt.net/CTranslate2/python/ctranslate2.Generator.html. `CTranslate2Engine` splits each batch into
sub-batches of prompts of like length (CTranslate2 feeds whatever a prompt has beyond the shortest of its
sub-batch token by token), runs them on the library's own workers, and detokenises one sub-batch while the next one
runs. Everything happens off the event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flyte_batch.cores import available_cores
from flyte_batch.device_calls import device_at_work
from flyte_batch.engines.checks import require_no_images, require_options
from flyte_batch.engines.tokenising import ModelFolder, PromptTokeniser, TokenisedPrompt
from flyte_batch.errors import BadInput, EngineDead, EngineError, EngineOutOfMemory
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# One thread a worker, a worker a core, sub-batches of 32. Measured with the demo model's shape on two cores another
# job used too, best of two, rows/s float32 / int8: 1 worker x 1 thread 379 / 613, 2 x 1 360 / 542, 1 x 2 155 / 234.
# Idle cores are not measured: there, threads of one worker may do better. With one thread a worker, 16 rows were within
# 9 % of 32 either way, 64 cost 8 to 17 %, 128 11 to 28 %.
_CPU_SUB_BATCH = 32
# CTranslate2 feeds what a prompt has beyond the shortest of its sub-batch token by token, for all rows. Prompts of 34
# to 1,530 tokens, one run each on the same busy cores, rows/s: 54 whatever the span, 92 with at most 32 tokens. With
# 1 worker x 2 threads: any 31, 64 tokens 50, 32 tokens 58, 16 tokens 58, 8 tokens 54.
_CPU_SPAN = 32
_CUDA_SUB_BATCH = 256
_MISSING = ("min_p", "presence_penalty", "frequency_penalty", "structured")
_SEEDING = threading.Lock()
_REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to


def check_sampling(sampling: SamplingParameters) -> None:
    """Raise if the engine cannot sample like this.

    Raises:
        BadInput: names the parameter and the remedy.
    """
    require_options(sampling, _MISSING, "the CTranslate2 engine")
    if sampling.min_tokens and sampling.stop:
        raise BadInput(
            "the CTranslate2 engine cannot hold a stop text back until min_tokens: "
            "leave one of stop and min_tokens out, or use vLLM"
        )


class CTranslate2Engine:
    """Continues prompts with a model that was converted by ``ct2-transformers-converter``.

    Made by `start`, closed by `aclose` or ``async with``. Reproducible: greedy decoding (``temperature=0``) always;
    sampling with a ``seed`` gives the same texts for the same batches in the same order (the engine then runs one
    worker, because each worker of CTranslate2 draws from a generator of its own). A prompt's own ``seed`` has no
    effect: CTranslate2 cannot seed a single row.

    Of `SamplingParameters`, it has no ``min_p``, ``presence_penalty``, ``frequency_penalty`` and ``structured``; its
    ``repetition_penalty`` looks at the response only; ``bad_words`` are kept out as the tokens they are usually
    written with, as in vLLM.
    """

    def __init__(self, generator: Any, tokeniser: PromptTokeniser, plan: _Plan, model: str) -> None:
        self._generator = generator
        self._tokeniser = tokeniser
        self._plan = plan
        self._model = model
        self._closed = False
        self._unloading = threading.Lock()
        vocabulary = tokeniser.tokenizer.get_vocab(with_added_tokens=True)
        self._tokens = [""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            self._tokens[index] = token
        # One call more than there are workers: it detokenises while the others compute.
        self._threads = ThreadPoolExecutor(plan.workers + 1, thread_name_prefix="ctranslate2-engine")

    @classmethod
    async def start(
        cls,
        model: str | Path,
        *,
        sampling: SamplingParameters | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        device_index: int = 0,
        compute_type: str = "default",
        inter_threads: int | None = None,
        intra_threads: int | None = None,
        sub_batch: int | None = None,
        chat: bool | Literal["auto"] = "auto",
        max_model_len: int | None = None,
    ) -> CTranslate2Engine:
        """Load a model folder off the event loop.

        Args:
            model: folder with ``model.bin`` and ``tokenizer.json``; ``tokenizer_config.json``, ``chat_template.jinja``
                and ``generation_config.json`` are used where they exist.
            sampling: how to continue prompts; greedy with 256 tokens by default. The class says what it can't do.
            device: ``auto`` takes a GPU where CTranslate2 sees one.
            device_index: which GPU.
            compute_type: ``default`` keeps the one the model was saved in where the device can compute it, else
                ``float32``, ``float16``, ``int8``, ...: https://opennmt.net/CTranslate2/quantization.html.
            inter_threads: sub-batches computed at the same time; by default one for every core on a CPU, one on a GPU.
            intra_threads: cores for one sub-batch; by default one on a CPU; more only pays for a large
                model that has its cores for itself.
            sub_batch: most prompts computed together; by default 32 on a CPU, 256 on a GPU.
            chat: render the model's chat template; ``auto`` does where the model has one, True insists on it.
            max_model_len: most tokens of prompt and response together; by default the model's own limit
                (``model_max_length`` of its tokenizer configuration), and needed where it names none.

        Raises:
            BadInput: an option or the folder cannot work; the message names it and the remedy.
            EngineOutOfMemory: the model does not fit the device.
            EngineError: CTranslate2 cannot load the model.
        """
        options = _Options(
            device, device_index, compute_type, inter_threads, intra_threads, sub_batch, chat, max_model_len
        )
        return await asyncio.to_thread(cls._load, Path(model), sampling or SamplingParameters(), options)

    @classmethod
    def _load(cls, folder: Path, sampling: SamplingParameters, options: _Options) -> CTranslate2Engine:
        ctranslate2 = _import_ctranslate2()
        check_sampling(sampling)
        if not (folder / "model.bin").is_file():
            raise BadInput(f"{folder} holds no model.bin: it is not a model that ct2-transformers-converter wrote")
        files = ModelFolder.read(folder)
        template = files.template if options.chat else None
        if options.chat is True and template is None:
            raise BadInput(f"chat=True, but {folder} has no chat template: leave chat out to feed the plain text")
        context = _context(folder, files.context, options.max_model_len)
        device, gpus = options.device, ctranslate2.get_cuda_device_count()
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        if device == "cuda" and not gpus:
            raise BadInput(
                "device is cuda, but CTranslate2 sees no GPU: ask for one in the task's resources, or use cpu"
            )
        workers, cores = _threads(device, options.inter_threads, options.intra_threads, sampling)
        sub_batch = options.sub_batch
        if sub_batch is None:
            sub_batch = _CUDA_SUB_BATCH if device == "cuda" else _CPU_SUB_BATCH
        if sub_batch < 1:
            raise BadInput(f"sub_batch must be at least 1, got {sub_batch}")
        level = ctranslate2.get_log_level()
        try:
            if options.compute_type == "default":  # what it warns of is what `default` is documented to do
                ctranslate2.set_log_level(logging.ERROR)
            generator = ctranslate2.Generator(
                str(folder),
                device=device,
                device_index=options.device_index,
                compute_type=options.compute_type,
                inter_threads=workers,
                intra_threads=cores,
                max_queued_batches=-1,
            )
        except ValueError as error:
            raise BadInput(f"CTranslate2 refuses to load {folder} on {device}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            raise _translated(error, f"CTranslate2 cannot load {folder} on {device}") from error
        finally:
            ctranslate2.set_log_level(level)
        if sampling.seed is not None and sampling.temperature > 0:
            _seed(ctranslate2, generator, sampling.seed, files)
        tokeniser = PromptTokeniser(files.tokenizer, template, context, sampling.max_tokens)
        # On a GPU a step takes nearly the same time for any number of rows: a split costs a response's steps.
        span = max(_CPU_SPAN, sampling.max_tokens) if device == "cuda" else _CPU_SPAN
        if sampling.repetition_penalty != 1 or sampling.bad_words:
            # These look at the tokens that were fed one by one: with prompts of several lengths together, at the end of
            # the longer ones too, so that a response would depend on its neighbours.
            span = 0
        plan = _Plan.build(sampling, files, workers, sub_batch, span)
        _log.info(
            "loaded %s on %s as %s: %d workers of %d threads, context %d",
            *(folder, device, generator.compute_type, workers, cores, context),
        )
        return cls(generator, tokeniser, plan, str(folder))

    @property
    def context(self) -> int:
        """Most tokens of prompt and response together."""
        return self._tokeniser.context

    def prepare(self, prompt: Prompt | Chat) -> TokenisedPrompt:
        """Render the chat template and tokenise; for threads. A prompt must leave room for a token of response.

        Raises:
            BadRecord: the prompt can never be inferred, or has images; the message says why.
        """
        require_no_images(prompt, "CTranslate2")
        return self._tokeniser.prepare(prompt)

    def estimate_cost(self, record: TokenisedPrompt) -> int:
        """Tokens of the prompt plus tokens the record may generate."""
        return record.estimate_cost()

    async def infer(self, batch: Sequence[TokenisedPrompt]) -> list[Completion | Exception]:
        """Continue every prompt; one `Completion` a record, in the batch's order.

        Cancelling is safe: sub-batches that run are finished and dropped, the others never start.

        Raises:
            EngineDead: the engine was closed, or its GPU failed for good.
            EngineOutOfMemory: the batch was too large; a smaller one may fit.
            EngineError: CTranslate2 could not compute the batch.
        """
        if self._closed:
            raise EngineDead(f"the CTranslate2 engine of {self._model} was closed: start a new one")
        cancelled = threading.Event()
        try:
            context = contextvars.copy_context()
            call = asyncio.get_running_loop().run_in_executor(
                self._threads, context.run, self._at_work, tuple(batch), cancelled
            )
        except RuntimeError as error:  # closed between the check and here, by another thread's loop
            raise EngineDead(f"the CTranslate2 engine of {self._model} was closed: start a new one") from error
        try:
            return await call
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def _at_work(self, batch: Sequence[TokenisedPrompt], cancelled: threading.Event) -> list[Completion | Exception]:
        with device_at_work():
            return self._infer(batch, cancelled)

    def _infer(self, batch: Sequence[TokenisedPrompt], cancelled: threading.Event) -> list[Completion | Exception]:
        results: list[Completion | Exception] = [_UNFINISHED] * len(batch)
        running: list[_SubBatch] = []
        failure: EngineError | None = None
        waiting = self._sub_batches(batch)
        # Two a worker are enough to keep it busy; the rest waits here, where a cancellation can still stop it.
        while True:
            while failure is None and not cancelled.is_set() and len(running) < 2 * self._plan.workers:
                indices = next(waiting, None)
                if indices is None:
                    break
                try:
                    running.append(self._submit(indices, batch))
                except (RuntimeError, ValueError, MemoryError) as error:
                    failure = _translated(error, "CTranslate2 cannot compute the batch")
            if not running:
                break
            done = running.pop(0)
            try:
                self._finish(done, batch, results)
            except (RuntimeError, ValueError, MemoryError) as error:
                failure = failure or _translated(error, "CTranslate2 cannot compute the batch")
        if isinstance(failure, EngineDead):
            self._closed = True
        if failure is not None:
            raise failure
        return results

    def _sub_batches(self, batch: Sequence[TokenisedPrompt]) -> Iterator[list[int]]:
        """Indices into the batch, the longest prompts first so that no worker is left with them at the end."""
        return _split([len(record.ids) for record in batch], self._plan)

    def _submit(self, indices: list[int], batch: Sequence[TokenisedPrompt]) -> _SubBatch:
        tokens = self._tokens
        prompts = [[tokens[i] for i in batch[index].ids] for index in indices]
        limits = [batch[index].limit for index in indices]
        callback = self._plan.callback(self._tokeniser, limits)
        handles = self._generator.generate_batch(
            prompts,
            max_length=max(limits),
            min_length=min(self._plan.min_tokens, max(limits)),
            callback=callback,
            **self._plan.arguments,
        )
        return _SubBatch(indices, handles)

    def _finish(self, done: _SubBatch, batch: Sequence[TokenisedPrompt], results: list[Completion | Exception]) -> None:
        end_ids, stop = self._plan.end_ids, self._plan.stop
        responses = [handle.result().sequences_ids[0] for handle in done.handles]  # waits without holding the GIL
        ended = [bool(ids) and ids[-1] in end_ids for ids in responses]
        responses = [ids[:-1] if end else ids for ids, end in zip(responses, ended, strict=True)]
        texts = self._tokeniser.tokenizer.decode_batch(responses, skip_special_tokens=True)
        for index, ids, end, text in zip(done.indices, responses, ended, texts, strict=True):
            at = min((found for found in map(text.find, stop) if found >= 0), default=-1)
            reason = "stop" if end or at >= 0 else "length"
            results[index] = Completion(text if at < 0 else text[:at], reason, len(batch[index].ids), len(ids))

    async def aclose(self) -> None:
        """Wait for the running calls, then free the model. Closing twice, or by two callers at once, is fine."""
        self._closed = True
        await asyncio.to_thread(self._unload)

    def _unload(self) -> None:
        with self._unloading:  # a second caller, maybe of another loop, waits for the first
            self._threads.shutdown(wait=True)
            self._generator.unload_model()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"the CTranslate2 engine of {self._model} was not closed", ResourceWarning, stacklevel=2)

    async def __aenter__(self) -> CTranslate2Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


_UNFINISHED = EngineError("the batch was cancelled before this record was computed")


@dataclass(frozen=True, slots=True)
class _Options:
    device: Literal["auto", "cpu", "cuda"]
    device_index: int
    compute_type: str
    inter_threads: int | None
    intra_threads: int | None
    sub_batch: int | None
    chat: bool | Literal["auto"]
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class _SubBatch:
    indices: list[int]
    handles: list[Any]


def _split(lengths: Sequence[int], plan: _Plan) -> Iterator[list[int]]:
    """Indices grouped by length: groups of at most ``sub_batch`` rows and ``span`` tokens from shortest to longest.

    Even shares, as many as there are workers or a multiple of it, so that all of them are busy until the end.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    shares = -(-len(order) // plan.sub_batch)
    shares = max(1, min(len(order), -(-shares // plan.workers) * plan.workers))
    size = max(1, -(-len(order) // shares))
    start = 0
    for at in range(1, len(order) + 1):
        full = at == len(order) or at - start == size or lengths[order[start]] - lengths[order[at]] > plan.span
        if full:
            yield order[start:at]
            start = at


@dataclass(frozen=True, slots=True)
class _Plan:
    """`SamplingParameters` in CTranslate2's words, worked out once."""

    arguments: dict[str, Any]
    stop: tuple[str, ...]
    end_ids: frozenset[int]
    suspects: frozenset[int]  # tokens that may complete a stop text
    workers: int
    sub_batch: int  # most rows computed together
    span: int  # most tokens between the shortest and the longest prompt of them
    min_tokens: int = 0

    @classmethod
    def build(cls, sampling: SamplingParameters, files: ModelFolder, workers: int, sub_batch: int, span: int) -> _Plan:
        tokenizer = files.tokenizer
        size = tokenizer.get_vocab_size()
        special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        # A special token never shows up in the text, so only its id can end a response. A normal token cannot stand
        # for a text: the same text also comes as other tokens.
        end_ids = frozenset(special[text] for text in sampling.stop if text in special) | _stop_ids(sampling, size)
        if not sampling.ignore_eos:
            end_ids |= frozenset(files.end_ids)
        stop = tuple(text for text in sampling.stop if text not in special)
        arguments: dict[str, Any] = {
            "asynchronous": True,
            "include_prompt_in_result": False,
            "return_end_token": True,
            "repetition_penalty": sampling.repetition_penalty,
            "sampling_topk": 1,
        }
        if end_ids or sampling.ignore_eos:  # left out, the model's own; an empty list is none at all
            arguments["end_token"] = sorted(end_ids)
        if sampling.bad_words:
            arguments["suppress_sequences"] = _spellings(tokenizer, sampling.bad_words)
        if sampling.temperature > 0:
            arguments |= {
                "sampling_topk": min(sampling.top_k, size),
                "sampling_topp": sampling.top_p,
                "sampling_temperature": sampling.temperature,
            }
        suspects = _suspects(tokenizer, stop)
        return cls(arguments, stop, end_ids, suspects, workers, sub_batch, span, sampling.min_tokens)

    def callback(self, tokeniser: PromptTokeniser, limits: list[int]) -> Callable[[Any], bool] | None:
        """What ends single responses early; None where nothing can, because it costs a call into Python a token."""
        longest = max(limits)
        if not self.stop and min(limits) == longest:
            return None
        responses: list[list[int]] = [[] for _ in limits]
        suspects, stop, tokenizer = self.suspects, self.stop, tokeniser.tokenizer

        def ends(step: Any) -> bool:
            row = step.batch_id
            response = responses[row]
            token = step.token_id
            response.append(token)
            if len(response) >= limits[row]:
                return True
            if token in suspects:
                text = tokenizer.decode(response, skip_special_tokens=True)
                return any(end in text for end in stop)
            return False

        return ends


def _stop_ids(sampling: SamplingParameters, size: int) -> frozenset[int]:
    unknown = [index for index in sampling.stop_token_ids if not 0 <= index < size]
    if unknown:
        raise BadInput(f"stop_token_ids has {unknown[0]}, the model's tokens are 0 to {size - 1}")
    return frozenset(sampling.stop_token_ids)


def _spellings(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[list[str]]:
    """The tokens of each text as it stands at the beginning of a line, and after a space, as vLLM does it."""
    spellings = [
        tokenizer.encode(space + text.lstrip(), add_special_tokens=False).tokens
        for text in texts
        for space in ("", " ")
    ]
    return [tokens for at, tokens in enumerate(spellings) if tokens and tokens not in spellings[:at]]


def _suspects(tokenizer: Tokenizer, stop: tuple[str, ...]) -> frozenset[int]:
    """Tokens whose text may hold the last character of a stop text, or a piece of one."""
    if not stop:
        return frozenset()
    last = {text[-1] for text in stop}
    ids = list(range(tokenizer.get_vocab_size()))
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    # Some tokenizers strip a token's leading space when it stands alone: then all tokens count.
    if any(character.isspace() for character in last):
        return frozenset(ids)
    return frozenset(i for i, text in zip(ids, texts, strict=True) if _REPLACEMENT in text or not last.isdisjoint(text))


def _threads(device: str, inter: int | None, intra: int | None, sampling: SamplingParameters) -> tuple[int, int]:
    """(workers, threads of each)."""
    for name, value in (("inter_threads", inter), ("intra_threads", intra)):
        if value is not None and value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}")
    reproducible = sampling.seed is not None and sampling.temperature > 0
    if reproducible and inter not in (None, 1):
        raise BadInput(
            "a seed needs inter_threads=1 (each worker draws from a generator of its own): leave one of them out"
        )
    if device == "cuda":
        return inter or 1, intra or 0
    if inter is None:
        inter = 1 if reproducible else max(1, available_cores() // (intra or 1))
    return inter, intra or 1


def _seed(ctranslate2: Any, generator: Any, seed: int, files: ModelFolder) -> None:
    """Make the engine's only worker draw from a generator of this seed, and no other engine's.

    Upstream the seed is the process's, and a worker reads it when it first samples: so it samples now.
    """
    with _SEEDING:
        ctranslate2.set_random_seed(seed % (1 << 32))
        token = files.tokenizer.id_to_token(0)
        generator.generate_batch([[token]], max_length=1, sampling_topk=0)
        ctranslate2.set_random_seed(secrets.randbits(32))


def _context(folder: Path, known: int | None, asked: int | None) -> int:
    if asked is not None and asked < 2:
        raise BadInput(f"max_model_len must be at least 2 (a token of prompt, one of response), got {asked}")
    if known is None and asked is None:
        raise BadInput(f"{folder} does not say how long its context is: pass max_model_len (tokens)")
    if known is not None and asked is not None and asked > known:
        raise BadInput(f"max_model_len is {asked}, the model in {folder} has a context of {known} tokens: lower it")
    return asked or known or 0


def _import_ctranslate2() -> Any:
    try:
        import ctranslate2  # type: ignore[import-untyped]
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise BadInput("the engine ctranslate2 is not installed: install flyte-batch with its extra 'cpu'") from error
    return ctranslate2


def _translated(error: Exception, doing: str) -> EngineError:
    """Which error of ours CTranslate2's is; it raises RuntimeError for nearly everything."""
    text = str(error)
    translated = EngineError(f"{doing}: {text}")
    if isinstance(error, MemoryError) or any(words in text.lower() for words in ("out of memory", "bad_alloc")):
        translated = EngineOutOfMemory(
            f"{doing}: out of memory ({text}); use smaller batches or a smaller compute_type"
        )
    elif "CUDA failed" in text or "unloaded" in text:
        translated = EngineDead(f"{doing}: {text}")
    translated.__cause__ = error
    return translated
