"""From image files and a list of captions to a folder of equally large images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from modalities_core.errors import DataError
from modalities_data.disk import user_errors
from modalities_data.image_text import ImageTextManifest, write_image_text
from modalities_data.tokenizers.extras import optional

MODES = {1: "L", 3: "RGB"}
"""Channels to Pillow's name for them."""


def image_text(
    source: Path,
    output: Path,
    size: int | None = None,
    channels: int = 3,
    image_key: str = "image",
    text_key: str = "text",
    overwrite: bool = False,
) -> ImageTextManifest:
    """Write the images and captions that ``source`` lists to the folder ``output``.

    Args:
        source: a JSONL file; every line has the path of an image, relative to the file, and its caption or a list of
            captions. Images are .npy files, (height, width) or (height, width, channels) uint8, or whatever Pillow
            reads.
        output: the folder, whole or not at all.
        size: height and width to scale to: the shorter side by bicubic interpolation, then the middle square. None
            takes images as they are; they then have to be equally large.
        channels: 1 for grey, 3 for red, green and blue.
        image_key: the JSON key of the path.
        text_key: the JSON key of the caption.
        overwrite: replace such a folder.

    Raises:
        DataError: a line or an image cannot be read, images differ in size, or the folder exists.
        ConfigError: Pillow is needed and not installed.
    """
    return write_image_text(output, _pairs(source, size, channels, image_key, text_key), overwrite)


def _pairs(
    source: Path, size: int | None, channels: int, image_key: str, text_key: str
) -> Iterator[tuple[np.ndarray, str | list[str]]]:
    with user_errors(source), source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, texts = _parsed(line, f"{source}:{number}", image_key, text_key)
            yield read_image(source.parent / name, size, channels), texts


def _parsed(line: bytes, where: str, image_key: str, text_key: str) -> tuple[str, str | list[str]]:
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise DataError(f"{where}: {error}", hint="every line is a JSON object") from None
    name, texts = record.get(image_key), record.get(text_key)
    if not isinstance(name, str):
        raise DataError(f"{where}: {image_key!r} is not the path of an image", hint="--image-key names another key")
    if not isinstance(texts, str | list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {text_key!r} is neither text nor a list of texts", hint="--key names another key")
    return name, texts


def read_image(path: Path, size: int | None = None, channels: int = 3) -> np.ndarray:
    """An image as (height, width, channels) uint8, as for :func:`image_text`.

    Raises:
        DataError: the file is no image.
        ConfigError: Pillow is needed and not installed.
    """
    pixels = _array(path) if path.suffix == ".npy" else None
    if pixels is not None and size is None and pixels.shape[2] in (1, channels):
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], channels)))
    pillow = optional("PIL.Image", "images", f"reading {path.name}")
    if pixels is not None:
        picture = pillow.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    else:
        with user_errors(path):
            try:
                with pillow.open(path) as opened:
                    picture = opened.convert(MODES[channels])
            except (pillow.UnidentifiedImageError, pillow.DecompressionBombError) as error:
                raise DataError(f"{path} is no image: {error}") from None
    picture = picture.convert(MODES[channels])
    if size is not None:
        picture = _middle_square(pillow, picture, size)
    return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)


def _array(path: Path) -> np.ndarray:
    """(height, width, channels) uint8."""
    with user_errors(path):
        try:
            pixels = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path} is no array of pixels: {error}") from None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in MODES:
        raise DataError(
            f"{path} is {pixels.dtype} of shape {pixels.shape}; an image is uint8 (height, width), with 1 or 3 channels"
        )
    return pixels


def _middle_square(pillow: Any, picture: Any, size: int) -> Any:
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return square.resize((size, size), pillow.Resampling.BICUBIC)
