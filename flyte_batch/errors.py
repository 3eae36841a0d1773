"""Every error of ours, as one tree; a message says what is wrong and what to do about it.

FlyteBatchError
├── BadInput (ValueError)            an option, file or column that cannot work; raised before an engine starts
├── BatcherError (RuntimeError)
│   ├── BatcherNotRunning            submit before start() or after stop()
│   ├── BatcherDied                  the batcher cannot go on; what was pending fails with this, so do later submits
│   ├── QueueFull                    overflow="reject" and no room: shed this load or come back later
│   └── DeadlineExceeded (TimeoutError)  a record had no result, or a chunk no part, when its timeout_s was over
├── EngineError (RuntimeError)
│   ├── EngineDead                   the engine is gone; its singleton rebuilds it
│   ├── EngineOutOfMemory            the batch did not fit; a batcher halves it and goes on
│   └── BadRecord (ValueError)       this record cannot be inferred; its neighbours can
│       ├── MissingValue             a column is null, a prompt or a message is empty, an image is missing
│       ├── PromptTooLong            the model's context has no room for the prompt and one token of response
│       ├── BadImage                 an image cannot be read or decoded, or is too large
│       └── BadResponse              its response does not have the form that was asked for (cut, no valid JSON)
└── RunError (RuntimeError)
    ├── ChunkFailed                  chunks failed after all retries; the others are committed, run again to finish
    └── TooManyFailures              more rows failed than max_failure_rate allows

Failures are counted by class, so a class is worth its name where the remedy is another one.
"""

from __future__ import annotations

MOST_CAUSES = 20
"""Classes of errors that are told apart where failures are counted; the others are `OTHER_CAUSES`."""
OTHER_CAUSES = "other"
MESSAGE_CHARS = 200
"""Of an error's message, where logs and traces quote it and nobody said how much of it."""


def counted_as(cause: str, known: set[str]) -> str:
    """The name under which a failure is counted, so that code which makes classes on the fly fills no memory.

    Args:
        cause: class of the error.
        known: the causes that are counted already; a new one is added, as long as there are fewer than `MOST_CAUSES`.

    Returns:
        The cause, or `OTHER_CAUSES` where there was no more room for it.
    """
    if cause not in known and len(known - {OTHER_CAUSES}) >= MOST_CAUSES:
        return OTHER_CAUSES
    known.add(cause)
    return cause


class FlyteBatchError(Exception):
    """Base of all errors that flyte_batch raises on its own account."""


class BadInput(FlyteBatchError, ValueError):
    """Something the user gave cannot work; the message names it and the remedy."""


class BatcherError(FlyteBatchError, RuntimeError):
    """A batcher could not take or finish a record."""


class BatcherNotRunning(BatcherError):
    """The batcher was not started, or was stopped."""


class BatcherDied(BatcherError):
    """The batcher cannot go on; ``__cause__`` says why."""


class QueueFull(BatcherError):
    """``overflow="reject"`` and the queue has no room for the record."""


class DeadlineExceeded(BatcherError, TimeoutError):
    """No result when ``timeout_s`` was over; a record was taken back from queue or device, a chunk was given up."""


class EngineError(FlyteBatchError, RuntimeError):
    """An engine could not infer."""


class EngineDead(EngineError):
    """The engine will never answer again; whoever owns it has to build a new one."""


class EngineOutOfMemory(EngineError):
    """A batch was too large for the device; a smaller one may fit."""


class BadRecord(EngineError, ValueError):
    """One record that cannot be inferred; the others of its batch are unaffected."""


class MissingValue(BadRecord):
    """What the record needs is null or empty: a column, the prompt, the conversation, a message, an image."""


class PromptTooLong(BadRecord):
    """The model's context has no room for the prompt and a single token of response."""


class BadImage(BadRecord):
    """An image that cannot be read or decoded, is too large, or is given in a form that is none of an image's."""


class BadResponse(BadRecord):
    """The model's response does not have the form that was asked for: it was cut, or is no valid JSON."""


class RunError(FlyteBatchError, RuntimeError):
    """A run over a dataset ended without a complete output."""


class ChunkFailed(RunError):
    """Chunks that failed after all retries. What the others wrote stays, and a re-run does only what is missing."""


class TooManyFailures(RunError):
    """More rows failed than ``max_failure_rate`` allows."""
