"""What no engine can infer, and what one engine has not: one place, so that all of them refuse alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from flyte_batch.engines.messages import checked_image, content_parts, images_of
from flyte_batch.errors import BadImage, BadInput, BadRecord, MissingValue
from flyte_batch.records import Chat, Prompt, SamplingParameters


def require_text(prompt: Prompt | Chat) -> None:
    """Raise unless the prompt asks something: a text or, as a `Chat`, messages whose last one has a text or an image.

    The system text of a `Prompt` may be None or empty, and so may its text where it has images.

    Raises:
        MissingValue: a text is missing, empty or only white space; there are no messages, or one has no content; an
            image is missing.
        BadImage: an image is of a type that none has.
        BadRecord: a text is of another type, or no valid Unicode; messages are no list of mappings with a role and a
            content. The message names the one at fault by its index, from 0.
    """
    if isinstance(prompt, Chat):
        _require_messages(prompt.messages)
    elif isinstance(prompt, Prompt):
        _require_prompt(prompt)
    else:
        raise _no("a text, a Prompt or a Chat", prompt, "the prompt")


def require_no_images(prompt: Prompt | Chat, engine: str) -> None:
    """`require_text`, for engines that take texts only.

    Args:
        prompt: any.
        engine: its name, for the message.

    Raises:
        BadRecord: as `require_text`, or the prompt has an image.
    """
    require_text(prompt)
    if any(True for _ in images_of(prompt)):
        raise BadRecord(f"the prompt has an image, and {engine} takes texts only: use a vision model with vLLM")


def require_options(sampling: SamplingParameters, missing: Sequence[str], engine: str) -> None:
    """Raise if a sampling parameter that the engine has not differs from its default.

    Args:
        sampling: what the user asks for.
        missing: names of the parameters that vLLM has and this engine has not.
        engine: its name, for the message.

    Raises:
        BadInput: names the parameter, its value and the engine that has it.
    """
    for option in fields(sampling):
        value = getattr(sampling, option.name)
        if option.name in missing and value != option.default:
            raise BadInput(f"{engine} has no {option.name} (got {value!r}): leave it out, or use vLLM, which has it")


def _require_prompt(prompt: Prompt) -> None:
    text, system, images = prompt.text, prompt.system, prompt.images
    if not isinstance(text, str):
        raise _no("a text", text, "the prompt")
    if not isinstance(images, tuple | list):
        raise _no("a tuple of bytes, paths or data: URLs", images, "Prompt.images", BadImage)
    for number, image in enumerate(images, 1):
        checked_image(image, f"image {number}")
    if (not text or text.isspace()) and not images:
        raise MissingValue("the prompt is empty")
    if system is not None and not isinstance(system, str):
        raise _no("a text", system, "the system text")
    _require_unicode(text, "the prompt")
    _require_unicode(system or "", "the prompt")


def _require_messages(messages: Sequence[Mapping[str, object]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _no("a list of messages", messages, "the conversation")
    if not messages:
        raise MissingValue("the conversation is empty")
    asked = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _no("a mapping with 'role' and 'content'", message, where)
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise BadRecord(f"{where} has no role: it must be a text such as 'user', it is {_kind(role)}")
        _require_unicode(role, f"{where}.role")
        asked = False
        for kind, value in content_parts(message, where):
            if isinstance(value, str):
                _require_unicode(value, f"{where}.content")
            asked = asked or kind == "image" or bool(value and not value.isspace())
    if not asked:
        raise MissingValue(f"messages[{len(messages) - 1}], which the model is to answer, is empty")


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where} is no valid Unicode: {error.object[error.start]!r} at character {error.start} is half of "
            "a surrogate pair; it was cut or decoded wrongly before it got here"
        ) from error


def _no(wanted: str, value: object, what: str, kind: type[BadRecord] = BadRecord) -> BadRecord:
    return (MissingValue if _is_missing(value) else kind)(f"{what} is {_kind(value)}, not {wanted}")


def _kind(value: object) -> str:
    if _is_missing(value):
        return "missing (None)" if value is None else "an empty text"
    return f"of type {type(value).__name__}"


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)
