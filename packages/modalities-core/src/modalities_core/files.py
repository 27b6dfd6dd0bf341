"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

CHUNK_BYTES = 4 << 20


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of ``path`` for writing; on success it becomes ``path``, on failure it vanishes.

    The bytes are on disk before the name is: write, fsync, rename, fsync of the folder. Unless ``durable``, nothing
    waits for the disk: readers still see the file whole, but after a power cut it may be an older one, or empty.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with replacing(path, durable) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """xxh3-64 of a file as 16 hexadecimal digits, read in chunks."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
