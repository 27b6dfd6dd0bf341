"""Units of work: how inputs are cut, by their sizes alone, so that the cut is the same wherever it is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from modalities_core.errors import DataError
from modalities_data.disk import user_errors
from modalities_data.inputs.files import Format, InputFile
from modalities_data.inputs.remote import remote_errors
from modalities_data.inputs.streams import open_input
from modalities_data.jsonl import newline_cuts


class Piece(NamedTuple):
    """What is read in one go: whole lines of a plain file, row groups of Parquet, else a whole file.

    start, end: bytes, or row groups of Parquet.
    bytes: how much of the file that is.
    """

    file: str
    format: Format
    compression: str
    start: int
    end: int
    bytes: int


Unit = tuple[Piece, ...]
"""What becomes one shard."""

UNIT_BYTES = 64 << 20
MOST_UNITS = 4096
"""Aimed at where nobody says how long units are: a reader opens so many shards in a few hundredths of a second."""


def unit_bytes(files: Sequence[InputFile]) -> int:
    """How much a unit of ``files`` has where nobody says: 64 MiB, and multiples of it beyond 256 GiB in all."""
    return UNIT_BYTES * max(1, -(-sum(file.bytes for file in files) // (UNIT_BYTES * MOST_UNITS)))


def cut(files: Sequence[InputFile], target_bytes: int, key: str) -> list[Unit]:
    """Cut ``files`` into units of at least ``target_bytes`` each, the last one excepted, in their order.

    Raises:
        DataError: a file is unreadable, or all are empty.
    """
    units: list[Unit] = []
    gathered: list[Piece] = []
    size = 0
    for file in files:
        for piece in _pieces(file, target_bytes, key):
            gathered.append(piece)
            size += piece.bytes
            if size >= target_bytes:
                units.append(tuple(gathered))
                gathered, size = [], 0
    if gathered:
        units.append(tuple(gathered))
    if not units:
        raise DataError(f"{files[0].name} is empty" if len(files) == 1 else f"all {len(files)} inputs are empty")
    return units


def whole_pieces(files: Sequence[InputFile], key: str) -> Iterator[Piece]:
    """Every file from its start to its end, in their order."""
    for file in files:
        pieces = list(_pieces(file, max(1, file.bytes), key))
        if pieces:
            yield pieces[0]._replace(end=pieces[-1].end, bytes=sum(piece.bytes for piece in pieces))


def _pieces(file: InputFile, target_bytes: int, key: str) -> Iterator[Piece]:
    """The parts of one file, none where it has nothing to read."""
    name, format, compression, size, _ = file
    if format == "parquet":
        from modalities_data.inputs.parquet import row_groups

        with user_errors(name):
            groups = row_groups(name, key)
        yield from (Piece(name, format, "", n, n + 1, group.bytes) for n, group in enumerate(groups) if group.rows)
    elif format == "jsonl" and not compression and size > target_bytes:
        with user_errors(name), remote_errors(name), open_input(name) as stream:
            cuts = newline_cuts(stream, size, target_bytes)
        yield from (Piece(name, format, "", start, end, end - start) for start, end in pairwise(cuts))
    elif size or format == "text":
        yield Piece(name, format, compression, 0, size, size)
