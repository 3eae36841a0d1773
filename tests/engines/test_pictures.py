"""What a record says of a picture becomes the picture, or an error that says which one and why."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest

from flyte_batch.engines.pictures import decode_picture
from flyte_batch.errors import BadImage

image_module = pytest.importorskip("PIL.Image", reason="pillow comes with the extra vllm: make test-vllm")


def encoded(mode: str = "RGB", color: object = (255, 0, 0), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image_module.new(mode, (4, 3), color).save(file, kind)
    return file.getvalue()


def test_bytes_paths_and_data_urls_are_the_same_picture(tmp_path: Path) -> None:
    content = encoded()
    (tmp_path / "a.png").write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for picture in (content, str(tmp_path / "a.png"), url):
        image = decode_picture(picture, 1)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (255, 0, 0))


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("L", 7, (7, 7, 7)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (9, 255), (9, 9, 9)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_with_transparency_on_white(mode: str, color: object, seen: object) -> None:
    image = decode_picture(encoded(mode, color), 1)
    assert (image.mode, image.getpixel((1, 1))) == ("RGB", seen)


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (b"", "image 3 is empty"),
        (b"not a picture", "image 3 cannot be decoded .*broken, or no picture"),
        (encoded()[:45], "image 3 cannot be decoded"),
        (encoded(kind="JPEG")[:200], "image 3 cannot be decoded"),
        ("/nowhere.png", "image 3 cannot be read: .*No such file"),
        ("a\0b", "image 3 cannot be read"),
        ("https://example.org/a.png", "image 3 is remote .*fetch the pictures beforehand"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,!!!", "whose base64 is broken"),
    ],
)
def test_what_is_no_picture_says_which_and_why(picture: bytes | str, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        decode_picture(picture, 3)


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(BadImage, match="image 1 is too large"):
        decode_picture(encoded(), 1)
