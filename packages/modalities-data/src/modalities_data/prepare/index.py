"""Where the lines of a JSON Lines file begin: a flat array of positions beside it, read in place whatever its size."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import replacing, write_json
from modalities_data.disk import user_errors
from modalities_data.jsonl import BYTE_ORDER_MARK, ByteRange, blocks, failure_error

FORMAT = "modalities-lines"
VERSION = 1
WINDOW = 64 << 20
CHUNK = 512 << 10
FEW_NEWLINES = 128
"""Below so many in a chunk, one search per newline is faster than looking at every byte as a number."""


class LineManifest(msgspec.Struct, frozen=True):
    """``NAME.lines.json``, beside ``NAME.lines``, which holds little-endian uint64 positions and nothing else.

    source: the file's name without its folder.
    bytes, checksum: its size and xxh3-64.
    lines: documents: lines that are not blank.
    blank_lines: lines with nothing but white space.
    """

    source: str
    bytes: int
    checksum: str
    lines: int
    blank_lines: int
    format: str = FORMAT
    version: int = VERSION


def index_lines(
    source: Path,
    output: Path | None = None,
    validate: bool = False,
    key: str = "text",
    on_progress: Callable[[int, int, int], None] = lambda done, total, lines: None,
) -> LineManifest:
    """Write the position of every line of ``source`` that is not blank.

    A byte order mark is no part of the first line. Lines may end with CRLF.

    Args:
        source: JSON Lines, not compressed.
        output: where to; None writes ``SOURCE.lines``. The manifest gets the same name and ``.json``.
        validate: decode every line too.
        key: of the text, where lines are decoded.
        on_progress: told bytes done, bytes in all, and lines found.

    Raises:
        DataError: the file is unreadable or has no documents, or a line that is validated is none.
    """
    output = default_output(source) if output is None else output
    with user_errors(source):
        size = source.stat().st_size
        if validate:
            for block in blocks(ByteRange(source, 0, size), key):
                if block.failures:
                    raise failure_error(source, block.failures[0])
        digest = xxhash.xxh3_64()
        scan = _Scan()
        output.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb", buffering=0) as stream, replacing(output) as target:
            for starts in scan.starts(stream, digest):
                target.write(starts.astype("<u8", copy=False).data)
                on_progress(scan.position, size, scan.lines)
            if not scan.lines:
                raise DataError(f"{source} has no documents: {scan.blank_lines} blank lines")
    manifest = LineManifest(source.name, scan.position, digest.hexdigest(), scan.lines, scan.blank_lines)
    write_json(_manifest_path(output), msgspec.to_builtins(manifest))
    return manifest


def default_output(source: Path) -> Path:
    """The index of ``source`` where no other name is given."""
    return source.with_name(f"{source.name}.lines")


def _manifest_path(index: Path) -> Path:
    return index.with_name(f"{index.name}.json")


class _Scan:
    """One pass over a file; what it counts is right when the pass is over."""

    def __init__(self) -> None:
        self.position = self.lines = self.blank_lines = 0

    def starts(self, stream: FileIO, digest: xxhash.xxh3_64) -> Iterator[np.ndarray]:
        """Positions of lines that are not blank, (lines,) int64, chunk by chunk."""
        size = os.fstat(stream.fileno()).st_size
        if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            digest.update(BYTE_ORDER_MARK)
            self.position = len(BYTE_ORDER_MARK)
        at_start = True  # whether the next byte begins a line
        few = False
        for window, low, high in _chunks(stream, self.position, size):
            digest.update(memoryview(window)[low:high])
            chunk = np.frombuffer(window, np.uint8, high - low, low)
            ends = _find(window, low, high) if few else np.flatnonzero(chunk == 10)
            few = len(ends) < FEW_NEWLINES
            starts = ends + 1
            ends_with_newline = bool(len(starts)) and int(starts[-1]) == len(chunk)
            if ends_with_newline:
                starts = starts[:-1]
            if at_start:
                starts = np.concatenate([[0], starts])
            at_start = ends_with_newline
            starts = self._without_blank(stream, chunk, starts) + self.position
            self.lines += len(starts)
            self.position += len(chunk)
            yield starts

    def _without_blank(self, stream: FileIO, chunk: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Drop the lines of white space: only lines that begin with some are looked at."""
        firsts = chunk[starts]
        suspects = np.flatnonzero(firsts <= 32)
        if not len(suspects):
            return starts
        empty = firsts[suspects] == 10
        blank = np.zeros(len(starts), bool)
        blank[suspects[empty]] = True
        for number in suspects[~empty].tolist():
            blank[number] = _is_blank(stream, self.position + int(starts[number]))
        self.blank_lines += int(blank.sum())
        return starts[~blank]


def _chunks(stream: FileIO, start: int, size: int) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Parts of the file, mapped a window at a time, which is twice as fast as reading and keeps memory bounded."""
    for offset in range(0, size, WINDOW):
        length = min(WINDOW, size - offset)
        window = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=offset)
        for low in range(max(0, start - offset), length, CHUNK):
            yield window, low, min(low + CHUNK, length)


def _find(window: mmap.mmap, low: int, high: int) -> np.ndarray:
    """Positions of newlines from ``low``, by searching for one after the other."""
    found = []
    position = window.find(b"\n", low, high)
    while position >= 0:
        found.append(position)
        position = window.find(b"\n", position + 1, high)
    return np.array(found, np.int64) - low


def _is_blank(stream: FileIO, position: int) -> bool:
    """Whether the line at ``position`` has nothing but white space."""
    size = 256
    while True:
        stream.seek(position)
        part = stream.read(size)
        end = part.find(b"\n")
        if end >= 0 or not part:
            return end <= 0 or part[:end].isspace()
        if not part.isspace():
            return False
        position += len(part)
        size = 1 << 16


class Lines(NamedTuple):
    """An opened index.

    source: the indexed file's bytes, mapped.
    starts: (lines,) uint64 positions, mapped.
    """

    source: memoryview
    starts: np.ndarray

    def line(self, number: int) -> bytes:
        """The bytes of line ``number`` without its end."""
        if not 0 <= number < len(self.starts):
            raise IndexError(f"line {number} of {len(self.starts)}")
        start = int(self.starts[number])
        # Blank lines are not indexed, so the next start need not be the end.
        stop = int(self.starts[number + 1]) if number + 1 < len(self.starts) else len(self.source)
        return bytes(self.source[start:stop]).split(b"\n", 1)[0].removesuffix(b"\r")


def open_lines(source: Path, index: Path | None = None) -> Lines:
    """Map a file and its index into memory.

    Args:
        source: the indexed file.
        index: its index; None looks for ``SOURCE.lines``.

    Raises:
        DataError: the index is missing or damaged, or the file's size is not what was indexed.
    """
    index = default_output(source) if index is None else index
    path = _manifest_path(index)
    with user_errors(path):
        content = path.read_bytes()
    try:
        manifest = msgspec.json.decode(content, type=LineManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise DataError(f"{path}: expected {FORMAT} version {VERSION}, found {manifest.format} {manifest.version}")
    with user_errors(source):
        for file, expected in ((source, manifest.bytes), (index, 8 * manifest.lines)):
            if (found := os.stat(file).st_size) != expected:
                raise DataError(
                    f"{file}: {path.name} expects {expected} bytes, the file has {found}",
                    hint=f"index it again: modalities-data index {source} --overwrite",
                )
        starts = np.frombuffer(_mapped(index), "<u8")
        data = _mapped(source)
    if int(starts[-1]) >= len(data) or np.any(starts[1:] <= starts[:-1]):
        raise DataError(f"{index}: positions do not rise or lie behind the end of {source}")
    return Lines(data, starts)


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def describe(manifest: LineManifest, output: Path) -> dict[str, Any]:
    """The facts for programs."""
    return {"output": str(output), **msgspec.to_builtins(manifest)}
