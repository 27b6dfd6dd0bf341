"""JSON Lines: newline-aligned byte ranges, bounded-memory reading, and errors that name ``file:line``.

Every line is one JSON object with the document's text under one key. Blank lines, CRLF line ends and a UTF-8 byte
order mark at the start of the file are no errors. A line belongs to the range its first byte lies in, so any cut of a
file into ranges gives the same documents in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import msgspec

from modalities_core.errors import ConfigError, DataError
from modalities_data.disk import user_errors

BLOCK_BYTES = 4 << 20
LONGEST_LINE_BYTES = 2 << 30
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINE_HINT = 'each line is one JSON object with the document under the text key, such as {"text": "..."}'


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, none at the end only."""
        ...


class ByteRange(NamedTuple):
    """Whole lines of a file: bytes ``start`` to ``end``."""

    path: Path
    start: int
    end: int


class Failure(NamedTuple):
    """A record that is no document.

    offset: where a line starts in the file, in bytes; the row of a Parquet file.
    reason: what is wrong with it.
    record: its number in the block.
    """

    offset: int
    reason: str
    record: int = 0


@dataclass(slots=True)
class Block:
    """Some consecutive records of a file, which are lines of JSON, rows of Parquet, or a whole text.

    start: byte position of the first line.
    bytes: their length in the file, compressed where the file is.
    lines: the raw line of each document, without its newline; empty for inputs other than JSON Lines.
    texts: the text of each document, in order.
    blank_lines: lines with nothing but white space.
    failures: records that are no documents.
    first: records before this block, since reading began.
    gaps: numbers in the block of the records without a document: blank lines and failures.
    records: how many there are.
    """

    start: int
    bytes: int
    lines: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    blank_lines: int = 0
    failures: list[Failure] = field(default_factory=list)
    first: int = 0
    gaps: list[int] = field(default_factory=list)
    records: int = 0

    def record(self, document: int) -> int:
        """The number in the block of the record that holds document number ``document``."""
        for gap in self.gaps:
            if gap > document:
                break
            document += 1
        return document


class LineTooLong(Exception):
    """A line is longer than LONGEST_LINE_BYTES; where it starts, and how many lines lie before it."""

    def __init__(self, start: int, lines: int) -> None:
        super().__init__(start, lines)
        self.start, self.lines = start, lines


def byte_ranges(path: Path, target_bytes: int) -> list[ByteRange]:
    """Cut ``path`` behind newlines into ranges of at least ``target_bytes``, the last one excepted.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    with user_errors(path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            cuts = newline_cuts(stream, size, target_bytes)
    if not size:
        raise DataError(f"{path} is empty", hint="expected one JSON object per line")
    return [ByteRange(path, start, end) for start, end in pairwise(cuts)]


def newline_cuts(stream: BinaryIO, size: int, target_bytes: int) -> list[int]:
    """Positions behind newlines, at least ``target_bytes`` apart but for the last, from 0 to ``size``."""
    cuts = [0]
    while cuts[-1] + target_bytes < size:
        # One byte early, so that a newline just before the target is a cut already.
        cut = _after_newline(stream, cuts[-1] + target_bytes - 1)
        if cut >= size:
            break
        cuts.append(cut)
    return [*cuts, size]


def _after_newline(stream: BinaryIO, position: int) -> int:
    """The position after the first newline at or behind ``position``, or the end of the file."""
    stream.seek(position)
    while chunk := stream.read(1 << 20):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position


def blocks(lines: ByteRange, key: str = "text") -> Iterator[Block]:
    """Read a range some megabytes at a time; at least one line per block.

    Args:
        lines: what to read.
        key: the key of each object that holds the text.

    Raises:
        DataError: the file is unreadable, shrank, or has a line longer than 2 GiB.
    """
    path = lines.path
    with user_errors(path), path.open("rb", buffering=0) as stream:
        stream.seek(lines.start)
        try:
            yield from decoded(stream, str(path), lines.start, lines.end, key)
        except LineTooLong as error:
            raise long_line_error(f"{path}:{line_number(path, error.start)}") from None


def documents(path: Path, key: str = "text") -> Iterator[str]:
    """The text of every document of a file.

    Raises:
        DataError: at the first line that is no document, naming ``file:line``.
    """
    with user_errors(path):
        size = path.stat().st_size
    for block in blocks(ByteRange(path, 0, size), key):
        if block.failures:
            raise failure_error(path, block.failures[0])
        yield from block.texts


def text_decoder(key: str) -> Callable[[bytes], str]:
    """A function from one line of JSON to the string under ``key``; other keys are skipped without being built.

    Raises:
        ConfigError: the key has a character that JSON escapes.
    """
    try:
        document = msgspec.defstruct("Document", [("text", str)], rename={"text": key})
    except ValueError:
        raise ConfigError(f"a key with quotes, backslashes or control characters is not supported: {key!r}") from None
    decode = msgspec.json.Decoder(document).decode
    return lambda line: decode(line).text  # pyrefly: ignore[missing-attribute]


def decoded(stream: Readable, name: str, start: int, end: int | None, key: str) -> Iterator[Block]:
    """Read JSON Lines from an open stream.

    Args:
        stream: stands at ``start``.
        name: of the file, for messages.
        start: the first byte to read, the start of a line.
        end: the end of a line; None reads until the stream ends.
        key: the key of each object that holds the text.

    Raises:
        DataError: the file shrank.
        LineTooLong: see there.
    """
    decode = text_decoder(key)
    lines = 0
    try:
        for position, data in _whole_lines(stream, name, start, end):
            block = _decode_block(position, data, decode)
            del data
            block.first = lines
            lines += block.records
            yield block
    except LineTooLong as error:
        raise LineTooLong(error.start, lines) from None


def _whole_lines(stream: Readable, name: str, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Position and bytes of whole lines, about BLOCK_BYTES at a time."""
    position = start
    pieces: list[bytes] = []
    while end is None or position < end:
        chunk = stream.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - position))
        if not chunk and end is not None:
            raise DataError(f"{name} shrank while it was read: {end} bytes expected, {position} found")
        if not chunk:
            break
        position += len(chunk)
        cut = len(chunk) if position == end else chunk.rfind(b"\n") + 1
        if cut:
            # Nothing here holds what was read while the block is worked on: that would be memory three times its size.
            block, pieces = [b"".join([*pieces, chunk[:cut]])], [chunk[cut:]]
            del chunk
            begins, start = start, start + len(block[0])
            yield begins, block.pop()
        else:
            pieces.append(chunk)
        if position - start > LONGEST_LINE_BYTES:
            raise LineTooLong(start, 0)
    if rest := b"".join(pieces):
        yield start, rest


def _decode_block(start: int, data: bytes, decode: Callable[[bytes], str]) -> Block:
    """Decode line by line: one object per line is what makes a cut at any newline safe."""
    block = Block(start, len(data))
    position = start
    lines = data.split(b"\n")
    if data.endswith(b"\n"):
        lines.pop()
    block.records = len(lines)
    for number, line in enumerate(lines):
        content = line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
        try:
            text = decode(content)
        except (ValueError, RecursionError) as error:
            block.gaps.append(number)
            if content and not content.isspace():
                block.failures.append(Failure(position, _reason(error), number))
            else:
                block.blank_lines += 1
        else:
            block.texts.append(text)
            block.lines.append(content)
        position += len(line) + 1
    return block


def _reason(error: Exception) -> str:
    """What is wrong with a line, in a user's words."""
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8 ({error.reason})"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        return text.removesuffix(" - at `$`")
    return text if text.startswith("JSON is malformed") else f"JSON is malformed: {text}"


def line_number(path: Path, offset: int, start: int = 0) -> int:
    """The one-based number of the line at byte ``offset``, counting from the line at ``start``."""
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        return newlines(stream, offset - start) + 1


def newlines(stream: Readable, size: int) -> int:
    """How many of the next ``size`` bytes are newlines."""
    count = 0
    while size > 0 and (chunk := stream.read(min(1 << 20, size))):
        count += chunk.count(b"\n")
        size -= len(chunk)
    return count


def long_line_error(place: str) -> DataError:
    """The error of a line that is longer than LONGEST_LINE_BYTES, at ``file:line``."""
    return DataError(
        f"{place}: a line is longer than {LONGEST_LINE_BYTES} bytes",
        hint="is this a JSON Lines file, with one document per line?",
    )


def failure_error(path: Path, failure: Failure) -> DataError:
    """The error of a line that is no document."""
    return DataError(f"{path}:{line_number(path, failure.offset)}: {failure.reason}", hint=LINE_HINT)
