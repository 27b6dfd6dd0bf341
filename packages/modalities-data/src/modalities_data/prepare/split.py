"""Setting some documents aside, the same ones every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.inputs.files import FormatChoice, InputFile, Sources, find_inputs
from modalities_data.inputs.reading import failure_error, read
from modalities_data.inputs.units import whole_pieces
from modalities_data.order import check_seed


class SplitReport(NamedTuple):
    """Documents on either side."""

    train: int
    held_out: int


class Side(NamedTuple):
    """One side of a split of conversations by a hash of the messages: equal ones are on the same side.

    name: which one to write.
    fraction: how much is held out, between 0 and 1.
    seed: chooses another split.
    """

    name: Literal["train", "held-out"]
    fraction: float = 0.01
    seed: int = 0

    def has(self, messages: list[dict[str, Any]]) -> bool:
        """Whether a conversation is on this side."""
        digest = xxhash.xxh3_64_intdigest(msgspec.json.encode(messages), self.seed)
        return (digest < int(self.fraction * 2**64)) == (self.name == "held-out")


def split(
    source: Sources,
    train: Path,
    held_out: Path,
    fraction: float = 0.01,
    seed: int = 0,
    key: str = "text",
    format: FormatChoice = "auto",
) -> SplitReport:
    """Write every document of ``source`` to ``train`` or ``held_out`` as JSON Lines, in order.

    Lines of JSON stay as they are; a document of another format becomes an object with its text alone.

    Where a document goes depends on its text alone (xxh3-64 with ``seed``), so equal texts stay together, and a
    document stays where it is when others are added or removed.

    Args:
        source: files, folders, patterns or addresses; see ``inputs.files.find_inputs``.
        train: gets about ``1 - fraction`` of the documents.
        held_out: gets about ``fraction``.
        fraction: between 0 and 1, both excluded.
        seed: chooses another split.
        key: the JSON key or Parquet column that holds the text.
        format: what the files hold; ``auto`` goes by their endings.

    Raises:
        ConfigError: the fraction or the seed is out of range, or an output is an input.
        DataError: a record is no document, or one side would be empty; then nothing is written.
    """
    check_fraction(fraction)
    check_seed(seed)
    files = find_inputs(source, format)
    inputs = {Path(file.name).resolve() for file in files}
    if train.resolve() == held_out.resolve() or inputs & {train.resolve(), held_out.resolve()}:
        raise ConfigError("the input and the two outputs of a split are three different files")
    threshold = int(fraction * 2**64)
    counts = [0, 0]
    with user_errors(train):
        for path in (train, held_out):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(train) as train_stream, replacing(held_out) as held_out_stream:
            for line, text in _lines(files, key):
                side = xxhash.xxh3_64_intdigest(text.encode(), seed) < threshold
                (held_out_stream if side else train_stream).write(line + b"\n")
                counts[side] += 1
            if not all(counts):
                named = files[0].name if len(files) == 1 else f"{len(files)} files"
                raise DataError(
                    f"of {sum(counts)} documents in {named}, {counts[1]} would be held out",
                    hint="choose another fraction or seed, or take a file with more documents",
                )
    return SplitReport(*counts)


def check_fraction(fraction: float) -> None:
    """Refuse to hold out nothing or all.

    Raises:
        ConfigError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction held out lies between 0 and 1, not at {fraction}")


def _lines(files: list[InputFile], key: str) -> Iterator[tuple[bytes, str]]:
    """Every document as a line of JSON, and its text."""
    for piece in whole_pieces(files, key):
        for block in read(piece, key):
            if block.failures:
                raise failure_error(piece, block, block.failures[0])
            lines = block.lines or [msgspec.json.encode({key: text}) for text in block.texts]
            yield from zip(lines, block.texts, strict=True)
