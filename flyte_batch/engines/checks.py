"""What no engine can infer, whatever its model: one place, so that every engine rejects the same prompts alike."""

from __future__ import annotations

from flyte_batch.errors import BadRecord
from flyte_batch.records import Prompt


def require_text(prompt: Prompt) -> None:
    """Raise unless the prompt is a text with something in it; the system text may be None or empty.

    Raises:
        BadRecord: the text is missing, of another type, empty, only white space, or no valid Unicode.
    """
    text, system = prompt.text, prompt.system
    if not isinstance(text, str):
        raise BadRecord(f"the prompt is {_kind(text)}, not a text")
    if not text or text.isspace():
        raise BadRecord("the prompt is empty")
    if system is not None and not isinstance(system, str):
        raise BadRecord(f"the system text is {_kind(system)}, not a text")
    try:
        text.encode()
        (system or "").encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"the prompt is no valid Unicode: {error.object[error.start]!r} at character {error.start} is half of "
            "a surrogate pair; it was cut or decoded wrongly before it got here"
        ) from error


def _kind(value: object) -> str:
    return "missing (None)" if value is None else f"of type {type(value).__name__}"
