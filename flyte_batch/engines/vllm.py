"""vLLM: language models on GPUs, with continuous batching.

Upstream: ``vllm.v1.engine.async_llm.AsyncLLM``, https://docs.vllm.ai. The model runs in processes of its own; this one
tokenises on threads, sends records one by one and gets each whole response as soon as it is done. What vLLM computes
together is its scheduler's choice; `ContinuousBatcher` keeps it full without flooding it.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import logging
import threading
import warnings
import weakref
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from flyte_batch.device_calls import device_worked
from flyte_batch.engines.checks import require_no_images
from flyte_batch.engines.messages import images_of
from flyte_batch.engines.pictures import decode_picture
from flyte_batch.engines.structured import ResponseCheck
from flyte_batch.engines.tokenising import TokenisedPrompt
from flyte_batch.engines.vllm_options import VLLMOptions, mixed_seed, one_line
from flyte_batch.engines.vllm_start import Launch, Started, build, refuse_import_of_main, stream_arguments
from flyte_batch.errors import BadInput, BadRecord, EngineDead, EngineError, PromptTooLong
from flyte_batch.records import Chat, Completion, Prompt, SamplingParameters

T = TypeVar("T")

_log = logging.getLogger(__name__)

_ALIVE_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class VLLMRecord:
    """A prepared prompt: token ids, and the decoded pictures that go with it.

    Attributes:
        prompt: the tokens; of pictures only their places.
        text: what the tokens say; only with pictures, whose places vLLM finds in it.
        images: ``PIL.Image.Image`` each.
        image_tokens: most tokens that the pictures take together.
    """

    prompt: TokenisedPrompt
    text: str = ""
    images: tuple[Any, ...] = ()
    image_tokens: int = 0

    def estimate_cost(self) -> int:
        """Tokens of the prompt, pictures included, plus tokens it may generate."""
        return self.prompt.estimate_cost() + self.image_tokens


class VLLMEngine:
    """Continues prompts with any model that vLLM runs. Made by `start`, closed by `aclose` or ``async with``.

    A `ContinuousEngine`: give it to a `ContinuousBatcher`. It is used from the event loop that it was started on; it
    may be closed from another one.

    Attributes:
        slots: most records computed at once (``max_num_seqs``).
        capacity_tokens: tokens of prompts and responses that the KV cache holds.
    """

    def __init__(self, launch: Launch, started: Started, check: ResponseCheck | None) -> None:
        self.slots = started.slots
        self.capacity_tokens = started.capacity_tokens
        self._launch = launch
        self._started = started
        self._check = check
        self._engine = started.engine
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._closed = False
        self._closing = threading.Lock()
        self._ended = False
        self._at_exit = functools.partial(_end_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    @classmethod
    async def start(
        cls,
        model: str | Path,
        *,
        sampling: SamplingParameters | None = None,
        chat: bool | Literal["auto"] = "auto",
        max_model_len: int | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool | None = None,
        lora: str | Path | None = None,
        load_format: str = "auto",
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
        sampling_args: Mapping[str, Any] | None = None,
    ) -> VLLMEngine:
        """Load a model off the event loop; takes from half a minute to many. What is None is left to vLLM.

        Args:
            model: a folder with ``config.json`` and weights; a Hugging Face id, ``owner/name`` or
                ``owner/name@revision``; or the URI of such a folder in an object store (``s3://...``), whose weights
                are streamed to the device without touching a disk.
            sampling: how to continue prompts; greedy with 256 tokens by default.
            chat: render the model's chat template; ``auto`` does where the model has one, True insists on it.
            max_model_len: most tokens of prompt and response together; by default the model's own limit.
            dtype: of weights and activations: ``auto``, ``bfloat16``, ``float16``, ``float32``.
            quantization: ``fp8``, ``awq``, ``gptq``, ``bitsandbytes``, ...; by default what the model's files say.
            kv_cache_dtype: ``auto``, ``fp8``, ...: of the cache.
            tensor_parallel_size: GPUs that share the model.
            gpu_memory_utilization: share of the device's memory that vLLM takes, above 0, at most 1.
            max_num_seqs: most records computed at once.
            enable_prefix_caching: keep the computed beginnings of prompts for others that begin alike.
            lora: folder, or Hugging Face id, of a LoRA adapter that every record uses.
            load_format: how weights are read: ``auto``, ``safetensors``, ``gguf``, ``dummy``, ...
            trust_remote_code: run code that comes with the model.
            engine_args: anything else of vLLM's ``EngineArgs``.
            sampling_args: anything else of vLLM's ``SamplingParams``.

        Raises:
            BadInput: an option or the model cannot work; the message names it and the remedy.
            EngineOutOfMemory: the model or its cache does not fit; the message says what to lower, and to how much.
            EngineError: vLLM could not start for another reason.
        """
        refuse_import_of_main()
        options = VLLMOptions(
            max_model_len=max_model_len,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            load_format=load_format,
            trust_remote_code=trust_remote_code,
            engine_args=engine_args,
            sampling_args=sampling_args,
        )
        sampling = sampling or SamplingParameters()
        check = ResponseCheck(sampling.structured) if sampling.structured is not None else None
        launch = Launch(str(model), options, sampling, chat, str(lora) if lora is not None else None)
        try:
            if "://" in launch.model:
                launch.streamed = await stream_arguments(launch.model, options, launch.folder / "model")
            started = await _uninterrupted(launch)
        except BaseException:
            await asyncio.to_thread(launch.clean)
            raise
        engine = cls(launch, started, check)
        try:
            await engine._settle()
        except BaseException:
            await engine.aclose()
            raise
        _log.info(
            "loaded %s in vLLM: %d records at once, %d tokens of KV cache, context %d",
            *(model, engine.slots, engine.capacity_tokens, engine.context),
        )
        return engine

    @property
    def context(self) -> int:
        """Most tokens of prompt and response together."""
        return self._started.tokeniser.context

    @property
    def errored(self) -> bool:
        """Whether the engine will never answer again: it was closed, or a process of it died."""
        return self._closed or bool(self._engine.errored)

    def prepare(self, prompt: Prompt | Chat) -> VLLMRecord:
        """Render the chat template, tokenise, decode pictures; for threads.

        Raises:
            BadRecord: the prompt can never be inferred (empty, too long, a broken picture, a picture for a model that
                takes none); the message says why.
        """
        tokeniser, each = self._started.tokeniser, self._started.image_tokens
        if each is None:
            require_no_images(prompt, f"the model {self._launch.model}")
            return VLLMRecord(tokeniser.prepare(prompt))
        record = tokeniser.prepare(prompt)
        pictures = tuple(images_of(prompt))
        if not pictures:
            return VLLMRecord(record)
        images = tuple(decode_picture(picture, number) for number, picture in enumerate(pictures, 1))
        return VLLMRecord(record, tokeniser.render(prompt), images, each * len(images))

    def estimate_cost(self, record: VLLMRecord) -> int:
        """Tokens of the prompt plus tokens the record may generate."""
        return record.estimate_cost()

    def prompt_ids(self, record: VLLMRecord) -> array[int]:
        """The tokens of the prompt; a picture counts as the one that marks its place."""
        return record.prompt.ids

    async def generate(self, record: VLLMRecord) -> Completion:
        """Continue one prompt. Cancelling makes vLLM drop it at once.

        Raises:
            EngineDead: the engine was closed or died.
            PromptTooLong: with its pictures, the prompt is longer than the context.
            BadRecord: vLLM refuses this record.
            BadResponse: the response does not have the form that was asked for.
            EngineError: vLLM failed on this record; the engine goes on.
        """
        if self._closed:
            raise self._dead()
        if asyncio.get_running_loop() is not self._loop:
            raise EngineDead(f"the vLLM engine of {self._launch.model} belongs to another event loop: start a new one")
        number = f"fb-{next(self._numbers)}"
        try:
            stream = self._engine.generate(
                self._prompt(record), self._parameters(record), number, lora_request=self._started.lora,
                tokenization_kwargs={"add_special_tokens": self._started.tokeniser.template is None},
            )  # fmt: skip
            async with aclosing(stream) as outputs:
                finals = [output async for output in outputs]  # one: only the final output is asked for
        except asyncio.CancelledError:
            # vLLM drops a cancelled request itself, except while it is being handed over.
            if not self.errored:
                await self._engine.abort(number)
            raise
        except Exception as error:
            raise self._translated(error) from error
        final = finals[-1]
        if (times := final.metrics) is not None:  # the core's own; none with disable_log_stats
            device_worked(times.scheduled_ts, times.last_token_ts)
        return self._completion(final)

    async def infer(self, batch: Sequence[VLLMRecord]) -> list[Completion | Exception]:
        """Continue every prompt, side by side; one result a record, in the batch's order.

        Raises:
            EngineDead: the engine was closed or died.
        """
        if self._closed:
            raise self._dead()
        results = await asyncio.gather(*map(self.generate, batch), return_exceptions=True)
        found: list[Completion | Exception] = []
        for result in results:
            if isinstance(result, EngineDead) or not isinstance(result, Completion | Exception):
                raise result
            found.append(result)
        return found

    @property
    def profile_folder(self) -> Path | None:
        """Where vLLM's torch profiler writes its traces; None without one, or if it writes to an object store."""
        config = self._engine.vllm_config.profiler_config
        local = config.profiler == "torch" and "://" not in config.torch_profiler_dir
        return Path(config.torch_profiler_dir) if local else None

    async def start_profile(self) -> None:
        """Let vLLM's profiler record; see `flyte_batch.monitoring.kernels.profiled`.

        Raises:
            EngineDead: the engine was closed or died.
            EngineError: the profiler records already, or vLLM was started without one.
        """
        await self._profile(self._engine.start_profile)

    async def stop_profile(self) -> None:
        """Write what was recorded; nobody gets an answer meanwhile.

        Raises:
            EngineDead: the engine was closed or died.
            EngineError: vLLM was started without a profiler.
        """
        await self._profile(self._engine.stop_profile)

    async def aclose(self) -> None:
        """End vLLM and all its processes. Running calls get `EngineDead`. Closing twice, or twice at once, is fine."""
        self._closed = True
        await asyncio.to_thread(self._end)

    async def __aenter__(self) -> VLLMEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"the vLLM engine of {self._launch.model} was not closed", ResourceWarning, stacklevel=2)

    async def _settle(self) -> None:
        """The first exchange with the core: from now on its death is noticed, also while nothing runs.

        vLLM never answers such a call once the core is dead, so none is made later.
        """
        tasks = await self._while_alive(self._engine.get_supported_tasks())
        if "generate" not in tasks:
            raise BadInput(f"{self._launch.model} does not generate texts; vLLM runs it for {', '.join(tasks)}")
        if self._started.lora is not None:
            try:
                await self._while_alive(self._engine.add_lora(self._started.lora))
            except EngineDead:
                raise
            except Exception as error:
                raise BadInput(f"lora: vLLM cannot load {self._launch.lora}: {one_line(error)}") from error

    async def _profile(self, call: Callable[[], Awaitable[None]]) -> None:
        if self.errored:
            raise self._dead()
        try:
            await self._while_alive(call())
        except EngineDead:
            raise
        except Exception as error:  # vLLM's own, and what it takes over from its workers
            raise EngineError(f"vLLM's profiler failed: {one_line(error)}") from error

    async def _while_alive(self, call: Awaitable[T]) -> T:
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([task], timeout=_ALIVE_EVERY_S))[0]:
                if self.errored:
                    raise self._dead()
            return await task
        finally:
            task.cancel()

    def _prompt(self, record: VLLMRecord) -> Any:
        from vllm.inputs import TextPrompt, TokensPrompt, tokens_input

        if record.images:
            return TextPrompt(prompt=record.text, multi_modal_data={"image": list(record.images)})
        ids = record.prompt.ids.tolist()
        # With a form to keep, vLLM compiles a grammar to check it: it then does so on a thread.
        return tokens_input(ids) if self._check is None else TokensPrompt(prompt_token_ids=ids)

    def _parameters(self, record: VLLMRecord) -> Any:
        parameters = self._started.sampling.clone()
        parameters.skip_clone = True  # it is this record's alone
        parameters.max_tokens = record.prompt.limit
        parameters.min_tokens = min(parameters.min_tokens, record.prompt.limit)
        parameters.seed = mixed_seed(self._launch.sampling.seed, record.prompt.seed)
        return parameters

    def _completion(self, output: Any) -> Completion:
        result = output.outputs[0]
        reason = result.finish_reason
        if reason == "abort" or reason is None:
            raise self._dead() if self.errored else EngineError("vLLM dropped the record before it was finished")
        if reason == "error":
            raise EngineError("vLLM failed on this record; its log says why")
        # The last token is the one that ended the response, unless a text or the limit did.
        ended = reason == "stop" and not isinstance(result.stop_reason, str)
        tokens = len(result.token_ids) - ended
        finish = "stop" if reason == "stop" else "length"
        completion = Completion(result.text, finish, len(output.prompt_token_ids or ()), tokens)
        if self._check is not None:
            self._check(completion)
        return completion

    def _translated(self, error: Exception) -> Exception:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if isinstance(error, EngineDeadError) or self.errored:
            return self._dead()
        if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, VLLMClientError | ValueError | TypeError | OverflowError):
            kind = PromptTooLong if _is_of_length(error) else BadRecord
            return kind(f"vLLM refuses the record: {one_line(error)}")
        return EngineError(f"vLLM failed on the record ({type(error).__name__}): {one_line(error)}")

    def _dead(self) -> EngineDead:
        if self._closed:
            return EngineDead(f"the vLLM engine of {self._launch.model} was closed: start a new one")
        said = self._launch.said
        why = f" ({said[0].strip().splitlines()[0]})" if said else ", or was killed"
        return EngineDead(f"the vLLM engine of {self._launch.model} died{why}: start a new one")

    def _fail_running(self) -> None:
        """Running calls end with `EngineDead`: vLLM's own shutdown may leave them waiting for ever.

        Its task for outputs is ended too: it would log the shutdown as a failure, with a traceback.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        self._engine.output_processor.propagate_error(EngineDeadError())
        if self._engine.output_handler is not None:
            self._engine.output_handler.cancel()

    def _end(self) -> None:
        """End vLLM; blocks for some seconds, on any thread but the event loop's."""
        with self._closing:  # a second caller, maybe of another loop, waits for the first
            if self._ended:
                return
            self._closed = True
            atexit.unregister(self._at_exit)
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._fail_running)
            try:
                self._engine.shutdown()
            except Exception:
                _log.exception("vLLM's shutdown failed; its processes are ended nevertheless")
            with suppress(RuntimeError):  # once more, for those that were being handed over
                self._loop.call_soon_threadsafe(self._fail_running)
            # AsyncLLM.__del__ shuts down again, at the interpreter's end with half of its modules gone.
            self._engine.shutdown = _nothing
            self._launch.clean()
            self._ended = True


def _end_at_exit(engine: weakref.ref[VLLMEngine]) -> None:
    """Flyte's local mode closes nothing when it is done, and vLLM alone would end with an error in the log."""
    found = engine()
    if found is not None:
        found._end()


def _is_of_length(error: Exception) -> bool:
    """Whether vLLM refused a prompt for its length; it names what it measured, or says so in words."""
    measured = getattr(error, "parameter", None)
    return measured in ("input_text", "input_tokens") or "longer than the maximum model length" in str(error)


def _nothing(*_: object, **__: object) -> None:
    """Instead of a second shutdown."""


async def _uninterrupted(launch: Launch) -> Started:
    """`build` on a thread; a cancellation kills what it started and waits until it is gone."""
    work = asyncio.ensure_future(asyncio.to_thread(build, launch))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        launch.cancelled.set()
        with suppress(Exception):
            (await work).engine.shutdown()
        raise
