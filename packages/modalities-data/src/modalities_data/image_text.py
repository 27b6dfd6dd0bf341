"""A folder of images and their captions, as it lies on disk.

    images.bin       uint8, image after image, each (height, width, channels), without any header
    captions.jsonl   one caption a line: {"image": number of its image, "text": ...}; an image may have several
    manifest.json    counts, shape and checksums, written last

Plain ``numpy.fromfile`` reads the images; nothing in the folder can run code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import checksum, sync_folder, write_json
from modalities_data.disk import user_errors

FORMAT = "modalities-image-text"
VERSION = 1
IMAGES, CAPTIONS, MANIFEST = "images.bin", "captions.jsonl", "manifest.json"

CHECKED_WHEN_OPENED = 128 << 20
"""Bytes of images up to which a dataset checks all of them at the start, as with packed folders."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
Shape = tuple[int, int, int]
"""Height, width, channels."""


class ImageTextManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder holds.

    images, captions: how many there are.
    height, width, channels: of every image.
    images_checksum, captions_checksum: xxh3-64 of the two files.
    """

    images: Positive
    captions: Positive
    height: Positive
    width: Positive
    channels: Positive
    images_checksum: str
    captions_checksum: str
    format: str = FORMAT
    version: int = VERSION

    @property
    def shape(self) -> Shape:
        """Of one image: height, width, channels."""
        return self.height, self.width, self.channels

    @property
    def bytes(self) -> int:
        """Of all images."""
        return self.images * self.height * self.width * self.channels

    @property
    def fingerprint(self) -> str:
        """Changes whenever images or captions do."""
        content = f"{self.shape} {self.images_checksum} {self.captions_checksum}"
        return xxhash.xxh3_64_hexdigest(content.encode())


class Caption(msgspec.Struct, frozen=True):
    """A line of captions.jsonl."""

    image: Annotated[int, msgspec.Meta(ge=0)]
    text: str


def write_image_text(
    folder: Path, pairs: Iterable[tuple[np.ndarray, str | list[str]]], overwrite: bool = False
) -> ImageTextManifest:
    """Write images and captions to ``folder``, which appears whole or not at all.

    Args:
        folder: where to; its parent has to exist.
        pairs: images (height, width, channels) uint8, all of one shape, each with its caption or captions; read once.
        overwrite: replace such a folder.

    Raises:
        DataError: the folder exists, there is no image, images differ in shape or dtype, or one has no caption.
        ResourceError: the disk is full.
    """
    _check_replaceable(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    with user_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            made = _write(partial, pairs)
            sync_folder(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return made


def read_manifest(folder: Path) -> ImageTextManifest:
    """The manifest of ``folder``, its files' sizes checked.

    Raises:
        DataError: it is no such folder, or not whole.
    """
    path = folder / MANIFEST
    with user_errors(path):
        content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=ImageTextManifest)
    except msgspec.DecodeError as error:
        hint = "`modalities-data image-text` makes one"
        raise DataError(f"{path} is not the manifest of a folder of images and captions: {error}", hint=hint) from None
    if (found.format, found.version) != (FORMAT, VERSION):
        raise DataError(f"{path} is {found.format!r}, version {found.version}; known is {FORMAT!r}, version {VERSION}")
    with user_errors(folder / IMAGES):
        size = (folder / IMAGES).stat().st_size
    if size != found.bytes:
        raise DataError(f"{folder / IMAGES} has {size} bytes, its manifest says {found.bytes}", hint="prepare it again")
    return found


def is_image_text(folder: Path) -> bool:
    """Whether ``folder`` says that it holds images and captions."""
    try:
        found = msgspec.json.decode((folder / MANIFEST).read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def verify(folder: Path, manifest: ImageTextManifest) -> None:
    """Check every byte of images and captions.

    Raises:
        DataError: a file was changed.
    """
    for name, expected in ((IMAGES, manifest.images_checksum), (CAPTIONS, manifest.captions_checksum)):
        with user_errors(folder / name):
            found = checksum(folder / name)
        if found != expected:
            raise DataError(
                f"{folder / name} was changed: its checksum is {found}, the manifest says {expected}",
                hint="prepare the folder again",
            )


def open_images(folder: Path, manifest: ImageTextManifest) -> np.ndarray:
    """All images, (images, height, width, channels) uint8, mapped from the file and read-only."""
    return np.memmap(folder / IMAGES, np.uint8, "r", shape=(manifest.images, *manifest.shape))


def read_captions(folder: Path, manifest: ImageTextManifest) -> list[Caption]:
    """All captions, in the order of the file.

    Raises:
        DataError: the file is not what the manifest says, or names an image that is not there.
    """
    path = folder / CAPTIONS
    with user_errors(path):
        content = path.read_bytes()
    if xxhash.xxh3_64_hexdigest(content) != manifest.captions_checksum:
        raise DataError(f"{path} was changed: its checksum is not the manifest's", hint="prepare the folder again")
    captions = msgspec.json.Decoder(Caption).decode_lines(content)
    if len(captions) != manifest.captions or max(caption.image for caption in captions) >= manifest.images:
        raise DataError(f"{path} does not have {manifest.captions} captions of {manifest.images} images")
    return captions


def _write(folder: Path, pairs: Iterable[tuple[np.ndarray, str | list[str]]]) -> ImageTextManifest:
    shape: Shape | None = None
    images = written = 0
    encoder = msgspec.json.Encoder()
    with ExitStack() as files:
        pixels = files.enter_context((folder / IMAGES).open("wb"))
        lines = files.enter_context((folder / CAPTIONS).open("wb"))
        for image, texts in pairs:
            shape = _checked(image, shape, images)
            texts = [texts] if isinstance(texts, str) else texts
            if not texts:
                raise DataError(f"image {images} has no caption")
            pixels.write(np.ascontiguousarray(image).data)
            for text in texts:
                lines.write(encoder.encode(Caption(images, text)) + b"\n")
            images, written = images + 1, written + len(texts)
    if shape is None:
        raise DataError("there is no image to write")
    digests = checksum(folder / IMAGES), checksum(folder / CAPTIONS)
    manifest = ImageTextManifest(images, written, *shape, *digests)
    write_json(folder / MANIFEST, msgspec.to_builtins(manifest))
    return manifest


def _checked(image: np.ndarray, shape: Shape | None, number: int) -> Shape:
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
        raise DataError(
            f"image {number} is {image.dtype} of shape {image.shape}; images are uint8 (height, width, channels)"
        )
    height, width, channels = image.shape
    if shape is not None and shape != image.shape:
        raise DataError(
            f"image {number} has the shape {image.shape}, those before it {shape}", hint="give all of them one size"
        )
    return height, width, channels


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise DataError(f"{folder} exists already", hint="choose another name, or pass --overwrite to replace it")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is no folder of images and captions, so --overwrite does not replace it")
