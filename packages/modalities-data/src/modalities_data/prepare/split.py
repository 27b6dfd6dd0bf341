"""Setting some documents of a JSONL file aside, the same ones every time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.jsonl import ByteRange, blocks, failure_error
from modalities_data.order import check_seed


class SplitReport(NamedTuple):
    """Documents on either side."""

    train: int
    held_out: int


def split(
    source: Path, train: Path, held_out: Path, fraction: float = 0.01, seed: int = 0, key: str = "text"
) -> SplitReport:
    """Write every document of ``source`` to ``train`` or ``held_out``, in order, its line unchanged.

    Where a document goes depends on its text alone (xxh3-64 with ``seed``), so equal texts stay together, and a
    document stays where it is when others are added or removed.

    Args:
        source: JSON Lines.
        train: gets about ``1 - fraction`` of the documents.
        held_out: gets about ``fraction``.
        fraction: between 0 and 1, both excluded.
        seed: chooses another split.
        key: the JSON key that holds the text.

    Raises:
        ConfigError: the fraction or the seed is out of range.
        DataError: a line is no document, or one side would be empty; then nothing is written.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction held out lies between 0 and 1, not at {fraction}")
    check_seed(seed)
    if len({path.resolve() for path in (source, train, held_out)}) < 3:
        raise ConfigError("the input and the two outputs of a split are three different files")
    threshold = int(fraction * 2**64)
    counts = [0, 0]
    with user_errors(source):
        lines = ByteRange(source, 0, source.stat().st_size)
    with user_errors(train):
        for path in (train, held_out):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(train) as train_stream, replacing(held_out) as held_out_stream:
            for block in blocks(lines, key):
                if block.failures:
                    raise failure_error(source, block.failures[0])
                for line, text in zip(block.lines, block.texts, strict=True):
                    side = xxhash.xxh3_64_intdigest(text.encode(), seed) < threshold
                    (held_out_stream if side else train_stream).write(line + b"\n")
                    counts[side] += 1
            if not all(counts):
                raise DataError(
                    f"of {sum(counts)} documents in {source}, {counts[1]} would be held out",
                    hint="choose another fraction or seed, or take a file with more documents",
                )
    return SplitReport(*counts)
