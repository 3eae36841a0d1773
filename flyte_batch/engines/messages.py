"""A prompt as messages: what chat templates are given, and the pictures that go with it.

A `Chat` comes as JSON or as a list of structs from a Parquet file, where each struct has the keys of all others with a
null in what it does not use: a key that is None counts as one that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flyte_batch.errors import BadImage, BadRecord, MissingValue
from flyte_batch.records import Chat, Prompt

# Where an image part may keep its picture: OpenAI's spelling first, then those of transformers' chat templates.
_IMAGE_KEYS = {"image_url": ("image_url",), "image": ("image", "url", "path")}
# What an image itself is, where it is an object: OpenAI's {"url"} or datasets' {"bytes", "path"}.
_OBJECT_KEYS = ("url", "bytes", "path")


def messages_of(prompt: Prompt | Chat) -> list[dict[str, Any]]:
    """The messages as chat templates know them: ``{"role": ..., "content": ...}`` and what else a `Chat`'s have.

    A content is a text wherever it can be (a list of texts is joined by line breaks, as vLLM does). One with images
    is a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``: `images_of` has the pictures.

    Raises:
        BadRecord: as `content_parts`, of a `Chat`.
    """
    if isinstance(prompt, Prompt):
        content: Any = prompt.text
        if prompt.images:
            content = [{"type": "image"} for _ in prompt.images]
            content += [{"type": "text", "text": prompt.text}] if prompt.text else []
        system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        return [*system, {"role": "user", "content": content}]
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(prompt.messages):
        parts = content_parts(message, f"messages[{index}]")
        given = {key: value for key, value in message.items() if value is not None}
        if any(kind == "image" for kind, _ in parts):
            content = [{"type": kind} | ({"text": value} if kind == "text" else {}) for kind, value in parts]
            messages.append(given | {"content": content})
        else:
            messages.append(given | {"content": "\n".join(str(text) for _, text in parts)})
    return messages


def images_of(prompt: Prompt | Chat) -> Iterator[bytes | str]:
    """The pictures in the order in which the messages show them: bytes of an encoded picture, paths or URLs.

    Raises:
        BadRecord: as `messages_of`.
    """
    if isinstance(prompt, Prompt):
        yield from prompt.images
        return
    for index, message in enumerate(prompt.messages):
        for kind, value in content_parts(message, f"messages[{index}]"):
            if kind == "image":
                yield value


def content_parts(message: Mapping[str, Any], where: str) -> list[tuple[str, str | bytes]]:
    """A message's content as (``text``, its text) and (``image``, its picture), in order.

    Args:
        message: ``content`` may be missing where there are ``tool_calls``: such a message has no words.
        where: names the message in errors.

    Raises:
        MissingValue: there is no content, or a part without its text or image.
        BadImage: a part has something else for an image.
        BadRecord: the content is no text, or has a part that is neither text nor image.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    if content is None:
        raise MissingValue(f"{where} has no content: give it a text, or leave the message out")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadRecord(f"{where}.content is of type {type(content).__name__}, neither a text nor a list of parts")
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: object, where: str) -> tuple[str, str | bytes]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, Mapping):
        raise BadRecord(f"{where} is of type {type(part).__name__}, not a part such as {{'type': 'text', 'text': ...}}")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if text is None:
            raise MissingValue(f"{where} is a text part without a text")
        if not isinstance(text, str):
            raise BadRecord(f"{where}.text is of type {type(text).__name__}, not a text")
        return "text", text
    if kind not in _IMAGE_KEYS:
        raise BadRecord(f"{where} has the type {kind!r}; a part is of type 'text', 'image_url' or 'image'")
    image = _first(part, _IMAGE_KEYS[kind])
    if isinstance(image, Mapping):
        image = _first(image, _OBJECT_KEYS)
    return "image", checked_image(image, f"the image of {where}")


def checked_image(image: object, what: str) -> str | bytes:
    """The image, if it may be one.

    Args:
        image: anything.
        what: names it in errors.

    Raises:
        MissingValue: it is None or empty.
        BadImage: it is of a type that no image has.
    """
    if isinstance(image, str | bytes) and image:
        return image
    if image is None or isinstance(image, str | bytes):
        raise MissingValue(f"{what} is missing or empty: give the bytes, a path or a data: URL of one")
    raise BadImage(f"{what} is of type {type(image).__name__}: give the bytes, a path or a data: URL of one")


def _first(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)
