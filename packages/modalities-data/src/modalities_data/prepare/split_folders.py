"""Setting some documents of packed folders aside, by a hash of their tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_data.manifest import Accounting, Manifest
from modalities_data.order import check_seed
from modalities_data.prepare.folder import check_replaceable
from modalities_data.prepare.joined import JoinedFolders, in_blocks
from modalities_data.prepare.rewrite import SHARD_TOKENS, OnProgress, write_documents
from modalities_data.prepare.split import check_fraction


def split_folders(
    sources: Sequence[Path],
    train: Path,
    held_out: Path,
    fraction: float = 0.01,
    seed: int = 0,
    *,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> tuple[Manifest, Manifest]:
    """Write every document of packed folders, with its mask, to the packed folder ``train`` or to ``held_out``.

    Where a document goes depends on its tokens alone (xxh3-64 with ``seed``): equal documents of all folders stay
    together, and a document stays where it is when others are added. One bit per document is held in memory.

    Args:
        sources: packed folders of one tokenizer.
        train: gets about ``1 - fraction`` of the documents, in their order.
        held_out: gets about ``fraction``.
        fraction: between 0 and 1, both excluded.
        seed: chooses another split, from 0 on.
        shard_tokens: tokens per shard, at least.
        overwrite: replace existing packed folders.
        on_progress: told about progress.

    Returns:
        The manifests of both.

    Raises:
        ConfigError: the fraction or the seed is out of range, or the folders are not different ones.
        DataError: a source is damaged, the tokenizers differ, an output exists, or one side would be empty; then
            nothing is written.
    """
    check_fraction(fraction)
    check_seed(seed)
    places = [os.path.realpath(folder) for folder in (*sources, train, held_out)]
    if len({*places[-2:]}) < 2 or {*places[:-2]} & {*places[-2:]}:
        raise ConfigError("the inputs and the two outputs of a split are different folders")
    for output in (train, held_out):
        check_replaceable(output, overwrite)
    joined = JoinedFolders(sources)
    sides, counted = [], 0
    for side in _sides(joined, fraction, seed):
        sides.append(np.packbits(side))
        counted += int(side.sum())
    if not 0 < counted < joined.documents:
        raise DataError(
            f"of {joined.documents} documents in {len(joined.folders)} folders, {counted} would be held out",
            hint="choose another fraction or seed, or take folders with more documents",
        )

    def written(output: Path, held: bool) -> Manifest:
        options: dict[str, Any] = {"command": "split", "side": "held_out" if held else "train", "fraction": fraction,
                                   "seed": seed}  # fmt: skip
        return write_documents(
            joined, _chosen(joined, sides, held), output, options=options, shard_tokens=shard_tokens,
            overwrite=overwrite, on_progress=on_progress, accounting=partial(_accounting, joined.documents),
        )  # fmt: skip

    return written(train, False), written(held_out, True)


def _accounting(documents: int, written: int) -> Accounting:
    return Accounting(documents, written, {"other_side": documents - written})


def _sides(joined: JoinedFolders, fraction: float, seed: int) -> Iterator[np.ndarray]:
    """Whether each document is held out, block by block."""
    threshold = int(fraction * 2**64)
    for numbers in in_blocks(0, joined.documents):
        yield np.array([
            xxhash.xxh3_64_intdigest(ids.data, seed) < threshold
            for batch in joined.batches([numbers])
            # The same bytes for the same ids, whatever they are stored as.
            for ids in np.split(batch.tokens.astype("<u4"), np.cumsum(batch.lengths)[:-1])
        ])  # fmt: skip


def _chosen(joined: JoinedFolders, sides: list[np.ndarray], held: bool) -> Iterator[np.ndarray]:
    """The numbers of one side's documents."""
    for numbers, side in zip(in_blocks(0, joined.documents), sides, strict=True):
        chosen = numbers[np.unpackbits(side, count=len(numbers)).astype(bool) == held]
        if len(chosen):
            yield chosen
