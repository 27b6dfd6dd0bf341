"""The i-th of n parts of packed folders, equally large by tokens, as a packed folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_data.manifest import Accounting, Manifest
from modalities_data.order import ORDER_VERSION, check_seed, permuted
from modalities_data.prepare.joined import JoinedFolders, in_blocks
from modalities_data.prepare.rewrite import SHARD_TOKENS, OnProgress, write_documents


def chunk(
    sources: Sequence[Path],
    output: Path,
    part: int,
    parts: int,
    *,
    seed: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Write part number ``part`` of ``parts`` of every folder, one folder's part after the other's.

    A document belongs to the part its first token lies in, when a folder's tokens are cut into ``parts`` equal runs:
    every document is in exactly one part, and parts differ by less than a document per folder.

    Args:
        sources: packed folders of one tokenizer.
        output: the packed folder to make.
        part: 1 to parts.
        parts: how many there are.
        seed: shuffle the documents of the part; None leaves them in their order.
        shard_tokens: tokens per shard, at least.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: the part or the seed is out of range.
        DataError: a source is damaged, the tokenizers differ, the output exists, or the part has no documents.
    """
    if not 1 <= part <= parts:
        raise ConfigError(f"of {parts} parts there are numbers 1 to {parts}, not {part}")
    if seed is not None:
        check_seed(seed)
    joined = JoinedFolders(sources)
    bounds = list(_bounds(joined, part, parts))
    count = sum(last - first for first, last in bounds)
    if not count:
        raise DataError(f"part {part} of {parts} has no documents; make fewer parts")
    options = {"command": "chunk", "part": part, "parts": parts}
    if seed is not None:
        options |= {"seed": seed, "order": ORDER_VERSION}
    return write_documents(
        joined, _order(bounds, count, seed, part), output, options=options,
        accounting=lambda written: Accounting(joined.documents, written, {"other_part": joined.documents - written}),
        shard_tokens=shard_tokens, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def _bounds(joined: JoinedFolders, part: int, parts: int) -> Iterator[tuple[int, int]]:
    """The first document of the part and the one behind its last, in each folder."""
    shard = first_document = 0
    for folder in joined.folders:
        count, tokens = folder.manifest.documents, folder.manifest.tokens
        # Documents that begin before a cut: cuts are exact integers, however many tokens there are.
        cuts = [-(-tokens * number // parts) for number in (part - 1, part)]
        begun = [0, 0]
        before = 0
        for _ in folder.manifest.shards:
            lengths = joined.index(shard).lengths
            starts = before + np.cumsum(lengths, dtype=np.int64) - lengths
            for side, cut in enumerate(cuts):
                begun[side] += int(np.searchsorted(starts, cut))
            before += joined.entries[shard].tokens
            shard += 1
        yield first_document + begun[0], first_document + begun[1]
        first_document += count


def _order(bounds: list[tuple[int, int]], count: int, seed: int | None, part: int) -> Iterator[np.ndarray]:
    """The documents of the part, some at a time."""
    sizes = np.array([last - first for first, last in bounds])
    ends = np.cumsum(sizes)
    firsts = np.array([first for first, _ in bounds])
    for places in in_blocks(0, count):
        if seed is not None:
            places = permuted(places, count, seed, part)
        of = np.searchsorted(ends, places, side="right")
        yield places - (ends - sizes)[of] + firsts[of]
