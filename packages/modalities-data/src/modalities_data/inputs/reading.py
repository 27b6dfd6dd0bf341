"""Reading documents, whatever they are stored as, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import xxhash

from modalities_core.errors import DataError
from modalities_data.disk import user_errors
from modalities_data.inputs.files import FormatChoice, Sources, find_inputs
from modalities_data.inputs.streams import Metered, decompressed, open_input
from modalities_data.inputs.units import Piece, whole_pieces
from modalities_data.jsonl import (
    BYTE_ORDER_MARK,
    LINE_HINT,
    LONGEST_LINE_BYTES,
    Block,
    Failure,
    LineTooLong,
    decoded,
    long_line_error,
    newlines,
)


def read(piece: Piece, key: str = "text", digest: xxhash.xxh3_64 | None = None) -> Iterator[Block]:
    """The documents of a piece, some megabytes at a time.

    Args:
        piece: what to read.
        key: of the text in each JSON object, or the column of Parquet.
        digest: takes every stored byte that is read.

    Raises:
        DataError: the file cannot be read, shrank or is damaged.
    """
    digest = xxhash.xxh3_64() if digest is None else digest
    with user_errors(piece.file):
        if piece.format == "parquet":
            from modalities_data.inputs.parquet import rows

            yield from rows(piece.file, key, piece.start, piece.end, digest)
        else:
            yield from _lines(piece, key, digest) if piece.format == "jsonl" else _text(piece, digest)


def documents(sources: Sources, key: str = "text", format: FormatChoice = "auto") -> Iterator[str]:
    """The text of every document of files, folders, patterns or addresses.

    Raises:
        DataError: at the first record that is no document, naming it.
    """
    for piece in whole_pieces(find_inputs(sources, format), key):
        for block in read(piece, key):
            if block.failures:
                raise failure_error(piece, block, block.failures[0])
            yield from block.texts


def _lines(piece: Piece, key: str, digest: xxhash.xxh3_64) -> Iterator[Block]:
    with open_input(piece.file) as raw:
        if piece.start:
            raw.seek(piece.start)
        stream = Metered(raw, piece.file, digest)
        end = None if piece.compression else piece.end
        read_before = 0
        try:
            for block in decoded(
                decompressed(stream, piece.file, piece.compression), piece.file, piece.start, end, key
            ):
                if piece.compression:
                    block.bytes, read_before = stream.bytes - read_before, stream.bytes
                yield block
        except LineTooLong as error:
            raise long_line_error(record_place(piece, error.lines)) from None


def _text(piece: Piece, digest: xxhash.xxh3_64) -> Iterator[Block]:
    """A whole file as one document."""
    with open_input(piece.file) as raw:
        stream = Metered(raw, piece.file, digest)
        content = decompressed(stream, piece.file, piece.compression)
        parts: list[bytes] = []
        size = 0
        while part := content.read(1 << 20):
            parts.append(part)
            size += len(part)
            if size > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{piece.file}: a document is longer than {LONGEST_LINE_BYTES} bytes",
                    hint="a text file is one document; cut it, or write one document per line as JSON Lines",
                )
    block = Block(0, piece.bytes, records=1)
    try:
        block.texts = [b"".join(parts).removeprefix(BYTE_ORDER_MARK).decode()]
    except UnicodeDecodeError as error:
        block.gaps = [0]
        block.failures = [Failure(error.start, f"the text is not UTF-8 ({error.reason} at byte {error.start})")]
    yield block


def record_number(piece: Piece, record: int) -> int:
    """The number in its file, from zero, of record ``record`` of a piece: reads what lies before the piece."""
    if piece.format == "parquet" and piece.start:
        from modalities_data.inputs.parquet import rows_before

        return rows_before(piece.file, piece.start) + record
    if piece.format == "jsonl" and piece.start:
        with user_errors(piece.file), open_input(piece.file) as stream:
            return newlines(stream, piece.start) + record
    return record


def record_place(piece: Piece, record: int) -> str:
    """The name of a record: ``file:line``, ``file: row 3`` (from zero, as Parquet tools count), or the file."""
    if piece.format == "text":
        return piece.file
    number = record_number(piece, record)
    return f"{piece.file}: row {number}" if piece.format == "parquet" else f"{piece.file}:{number + 1}"


def failure_error(piece: Piece, block: Block, failure: Failure) -> DataError:
    """The error of a record that is no document."""
    place = record_place(piece, block.first + failure.record)
    return DataError(f"{place}: {failure.reason}", hint=LINE_HINT if piece.format == "jsonl" else "")


def rejection(piece: Piece, block: Block, failure: Failure, before: Callable[[], int]) -> dict[str, object]:
    """An entry in the list of records that were no documents.

    Args:
        piece: where it lies.
        block: the one that has it.
        failure: what is wrong.
        before: gives the records of the file that lie before the piece.
    """
    number = block.first + failure.record
    entry: dict[str, object] = {"file": piece.file}
    if piece.format == "jsonl":
        entry |= {"line": before() + number + 1, "offset": failure.offset}
    elif piece.format == "parquet":
        entry |= {"row": before() + number}
    return entry | {"reason": failure.reason}
