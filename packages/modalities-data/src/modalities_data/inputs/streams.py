"""Streams that count and checksum what is read, and that decompress in bounded memory."""

from __future__ import annotations

from typing import Any, BinaryIO

import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_data.inputs.remote import is_address, open_remote, remote_errors
from modalities_data.jsonl import Readable

COMPRESSED_BYTES = 1 << 17
LARGEST_WINDOW_BYTES = 1 << 31
"""What ``zstd --long=31`` may ask for."""


def open_input(name: str) -> BinaryIO:
    """Open the path or address ``name`` for reading, as it is stored."""
    return open_remote(name) if is_address(name) else open(name, "rb", buffering=0)


class Metered:
    """A stream that counts and checksums what is read through it.

    Args:
        stream: to read from.
        name: its path or address.
        digest: takes every byte.
    """

    def __init__(self, stream: BinaryIO, name: str, digest: xxhash.xxh3_64) -> None:
        """Count from zero."""
        self._stream, self._name, self._digest = stream, name, digest
        self.bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        with remote_errors(self._name):
            data = self._stream.read(size)
        self._digest.update(data)
        self.bytes += len(data)
        return data


def decompressed(stream: Metered, name: str, compression: str) -> Readable:
    """What is compressed in ``stream``.

    Args:
        stream: from its start.
        name: of the file, for messages.
        compression: ``gzip``, ``zstd``, or empty for none.

    Raises:
        ConfigError: zstd needs a package that is not installed.
    """
    if not compression:
        return stream
    return _Gzip(stream, name) if compression == "gzip" else _Zstandard(stream, name)


class _Gzip:
    """All members of a gzip file."""

    def __init__(self, stream: Metered, name: str) -> None:
        import gzip

        self._stream, self._name = gzip.GzipFile(fileobj=stream, mode="rb"), name  # type: ignore[call-overload]

    def read(self, size: int, /) -> bytes:
        import zlib

        try:
            return self._stream.read(size)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{self._name} is cut off or damaged: {error}") from error
        except OSError as error:
            if error.errno is not None:  # BadGzipFile has none
                raise
            raise DataError(f"{self._name} is no gzip file: {error}") from error


class _Zstandard:
    """All frames of a zstd file; unlike the library's own reader, it tells a cut file from a whole one."""

    def __init__(self, stream: Metered, name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError(f"reading {name} needs zstandard", hint='pip install "modalities-data[zstd]"') from None
        self._stream, self._name, self._error = stream, name, zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        self._frame: Any = None
        self._ready: list[bytes] = []

    def read(self, size: int, /) -> bytes:
        found, room = [], size
        while room:
            if not self._ready and not self._more():
                break
            part = self._ready.pop()
            if len(part) > room:
                self._ready.append(part[room:])
                part = part[:room]
            found.append(part)
            room -= len(part)
        return b"".join(found)

    def _more(self) -> bool:
        """Decompress something, or tell that nothing is left."""
        while not self._ready:
            data = self._stream.read(COMPRESSED_BYTES)
            if not data:
                if self._frame is not None:
                    raise DataError(f"{self._name} is cut off in the middle of a zstd frame")
                return False
            parts: list[bytes] = []
            while data:
                self._frame = self._frame or self._frames.decompressobj()
                try:
                    parts.append(self._frame.decompress(data))
                except self._error as error:
                    raise DataError(f"{self._name} is damaged or no zstd file: {error}") from error
                data = self._frame.unused_data
                if self._frame.eof:
                    self._frame = None
            self._ready = [part for part in reversed(parts) if part]
        return True
