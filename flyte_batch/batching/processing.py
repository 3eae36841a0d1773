"""Calling the user's function: in the right place, and whatever it does comes back as a value.

A plain ``def`` runs on a thread of its own, so that the event loop and all other callers go on. An ``async def`` runs
on the loop, and whoever blocks the loop in it is told so by name.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from flyte_batch.device_calls import DeviceCall, current_call
from flyte_batch.errors import BatcherError, EngineOutOfMemory

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")

ProcessFn = Callable[[list[RecordT]], Awaitable[Sequence[ResultT | Exception]] | Sequence[ResultT | Exception]]
"""Takes a batch, returns one result a record in the same order. ``async def`` or plain ``def``."""


_BEGIN_S = 0.005
"""How long the event loop waits for a batch's thread to begin, at most; some 0.05 ms suffice where a core is free."""


_on_threads: set[object] = set()
"""Calls under way on threads, of all batchers."""


def name_of(fn: object) -> str:
    """How the user would recognise the function in a message."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def is_async(fn: object) -> bool:
    """Whether calling it makes a coroutine: an ``async def``, a partial of one, an object with ``async __call__``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def checked_results(results: Any, expected: int) -> list[Any]:
    """The results as a list.

    Raises:
        TypeError: not a sequence, or one whose items are no results (text, dict, set).
        ValueError: not one result a record.
    """
    if isinstance(results, str | bytes | bytearray | Mapping | Set) or not (
        hasattr(results, "__len__") and hasattr(results, "__iter__")
    ):
        raise TypeError(
            f"process_fn returned {type(results).__name__} for a batch of {expected} records; "
            "return a list with one result a record, in the same order"
        )
    if len(results) != expected:
        raise ValueError(f"process_fn returned {len(results)} results for batch of {expected} records")
    return results if type(results) is list else list(results)


def is_out_of_memory(error: BaseException) -> bool:
    """Ours, Python's, or torch's and its like, which are known by name so that torch need not be imported."""
    return isinstance(error, EngineOutOfMemory | MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    )


def as_failure(error: BaseException) -> Exception:
    """What a record's caller is shown.

    A future cannot carry StopIteration; a cancellation or exit inside process_fn is not the caller's own.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    failure = BatcherError(f"the call with this record raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def copy_of(error: Exception) -> Exception:
    """The same error for one more record: whoever raises it adds to its own traceback only.

    An error that cannot be copied faithfully is shared, as it would be without us.
    """
    for duplicate in (copy.copy, _copy_without_init):
        try:
            twin = duplicate(error)
            faithful = type(twin) is type(error) and twin.args == error.args and str(twin) == str(error)
        except Exception:  # noqa: S112 - an exception's constructor is the user's code; anything may happen in it
            continue
        if faithful:
            twin.__cause__, twin.__context__ = error.__cause__, error.__context__
            twin.__suppress_context__ = error.__suppress_context__
            return twin.with_traceback(error.__traceback__)
    return error


def _copy_without_init(error: Exception) -> Exception:
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


class LoopWatch:
    """Notices code that holds the event loop for long, and names it.

    Args:
        name: how the user would recognise the code.
        threshold_s: how long one step may hold the loop before a warning, seconds.
    """

    def __init__(self, name: str, threshold_s: float) -> None:
        self.blocked_s = 0.0
        self._name = name
        self._threshold_s = threshold_s
        self._warned = False

    def over(self, awaitable: Awaitable[T]) -> Awaitable[T]:
        """The awaitable, each of its steps timed."""
        return _Timed(awaitable, self._step_took)

    def _step_took(self, seconds: float) -> None:
        if seconds <= self._threshold_s:
            return
        self.blocked_s += seconds
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s blocked the event loop for %.3f s: all other callers stood still meanwhile. "
                "Make it a plain `def` (it then runs on a thread), or await the slow part. "
                "Further occurrences are only counted, in stats.loop_blocked_s.",
                self._name,
                seconds,
            )


class Processor(Generic[RecordT, ResultT]):
    """Runs ``process_fn`` on one batch at a time.

    Args:
        fn: the user's function.
        blocked_loop_warning_s: how long one step of an ``async`` function may hold the loop before a warning, seconds.
    """

    def __init__(self, fn: ProcessFn[RecordT, ResultT], *, blocked_loop_warning_s: float) -> None:
        self.name = name_of(fn)
        self.watch = LoopWatch(self.name, blocked_loop_warning_s)
        self._fn = fn
        self._on_loop = is_async(fn)
        self._thread: ThreadPoolExecutor | None = None

    async def call(self, records: list[RecordT], device_call: DeviceCall) -> list[ResultT] | BaseException:
        """The results, or what was raised instead. It raises only if the calling task itself is cancelled.

        Args:
            records: the batch.
            device_call: hears when the device is at work on it. On a thread that is the whole function, unless that
                says more itself.
        """
        task = asyncio.current_task()
        current_call.set(device_call)
        try:
            answer: Any
            if self._on_loop:
                answer = self._fn(records)
            else:
                # Errors of the thread travel as values too: a future, or a coroutine, would mistake StopIteration.
                answer, error, began, ended = await self._in_thread(records)
                if device_call.ended is None and not inspect.isawaitable(answer):
                    device_call.worked(began, ended)
                if error is not None:
                    return error
            if inspect.isawaitable(answer):
                # A lambda or a wrapper around an async function. From now on it is called where it belongs.
                self._on_loop = True
                answer = await self.watch.over(answer)
            return checked_results(answer, len(records))
        except asyncio.CancelledError as leaked:
            if task is not None and task.cancelling():
                raise
            return leaked
        except GeneratorExit:
            raise
        except BaseException as raised:
            return raised

    def close(self) -> None:
        """Let the thread go once it is idle."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _in_thread(self, records: list[RecordT]) -> tuple[Any, BaseException | None, float, float]:
        if self._thread is None:
            # One thread, always the same: engines keep per-thread state, and a batch at a time is the contract.
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"batcher-{self.name}")
        context, begun = contextvars.copy_context(), threading.Event()
        is_alone = not _on_threads
        outcome = asyncio.get_running_loop().run_in_executor(
            self._thread, context.run, _outcome_of, self._fn, records, begun
        )
        # To begin, the thread needs the interpreter's lock, which the many that wait for their turn on this loop would
        # hold for milliseconds. The device goes first; not where other batchers' threads may hold it as long.
        if is_alone:
            begun.wait(_BEGIN_S)
        _on_threads.add(begun)
        try:
            return await outcome
        finally:
            _on_threads.discard(begun)


def _outcome_of(
    fn: Callable[[list[RecordT]], Any], records: list[RecordT], begun: threading.Event
) -> tuple[Any, BaseException | None, float, float]:
    begun.set()
    answer: Any = None
    began = time.monotonic()
    try:
        answer, error = fn(records), None
    except BaseException as raised:
        error = raised
    return answer, error, began, time.monotonic()


class _Timed:
    """An awaitable, and for how long each of its steps held the loop.

    A timer on the loop would also see the steps of other tasks, and blame the wrong function.
    """

    def __init__(self, awaitable: Awaitable[Any], report: Callable[[float], None]) -> None:
        self._awaitable = awaitable
        self._report = report

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        resume: Callable[[], Any] = functools.partial(next, steps)
        while True:
            started = time.perf_counter()
            try:
                waits_for = resume()
            except StopIteration as end:
                return end.value
            finally:
                self._report(time.perf_counter() - started)
            try:
                yield waits_for
            except BaseException as error:
                throw = getattr(steps, "throw", None)
                if throw is None:
                    raise
                resume = functools.partial(throw, error)
            else:
                resume = functools.partial(next, steps)
