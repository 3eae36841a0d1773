"""From what a record says of a picture (bytes, a path, a ``data:`` URL) to the decoded picture, or a clear error."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from flyte_batch.errors import BadImage

_WHITE = (255, 255, 255)


def decode_picture(picture: bytes | str, number: int) -> Any:
    """The picture as an RGB ``PIL.Image.Image``, transparency on white as in vLLM. CPU work, for threads.

    Args:
        picture: bytes of an encoded picture (PNG, JPEG, ...), a path, or a ``data:`` URL.
        number: which of the record's pictures it is, from 1, for messages.

    Raises:
        BadImage: there is no such file, it is no picture, or it is broken.
    """
    from PIL import Image

    content = picture if isinstance(picture, bytes) else _content(picture, number)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode == "RGB":
                return image.copy()
            if "A" not in image.getbands() and "transparency" not in image.info:
                return image.convert("RGB")
            layer = image.convert("RGBA")
            opaque = Image.new("RGB", layer.size, _WHITE)
            opaque.paste(layer, mask=layer.getchannel("A"))
            return opaque
    except Image.DecompressionBombError as error:
        raise BadImage(f"image {number} is too large: {error}") from error
    except Exception as error:  # each decoder raises its own kinds: OSError, SyntaxError, struct.error, ...
        kind = "cannot be decoded" if len(content) else "is empty"
        raise BadImage(
            f"image {number} {kind} ({type(error).__name__}: {error}): it is broken, or no picture"
        ) from error


def _content(picture: str, number: int) -> bytes:
    if picture.startswith("data:"):
        head, comma, body = picture.partition(",")
        if not comma:
            raise BadImage(f"image {number} is a data: URL without a comma before its data")
        try:
            return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
        except (binascii.Error, ValueError) as error:
            raise BadImage(f"image {number} is a data: URL whose base64 is broken: {error}") from error
    if "://" in picture:
        raise BadImage(
            f"image {number} is remote ({picture[:100]}): nothing is downloaded while a device waits; fetch the "
            "pictures beforehand and give their bytes or paths"
        )
    try:
        return Path(picture).read_bytes()
    except (OSError, ValueError) as error:
        raise BadImage(f"image {number} cannot be read: {error}") from error
