"""The documents of several packed folders as one numbered list."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_data.manifest import Shard
from modalities_data.megatron_index import Index
from modalities_data.packed import PackedFolder
from modalities_data.tokenizers.opening import UNKNOWN_ENGINE
from modalities_data.verification import check_stretch, stretches

BLOCK_DOCUMENTS = 1 << 16
BATCH_TOKENS = 1 << 22
OPEN_INDEXES = 128

log = logging.getLogger(__name__)


class Documents(NamedTuple):
    """Some documents back to back.

    tokens: (tokens,) with the end of each.
    lengths: (documents,) int64.
    shards: (documents,) the shard each came from, by its number among all shards.
    mask: (tokens,) uint8, or None where all tokens count.
    origins: (documents,) uint32, or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    shards: np.ndarray
    mask: np.ndarray | None
    origins: np.ndarray | None


class JoinedFolders:
    """Several packed folders of one tokenizer as one sequence of documents.

    Args:
        folders: in their order.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Open them.

        Raises:
            ConfigError: there is none.
            DataError: one is damaged, or two were made with different tokenizers.
        """
        if not folders:
            raise ConfigError("there is no packed folder to read")
        self.folders = [PackedFolder(folder) for folder in folders]
        for other in self.folders[1:]:
            _same_tokenizer(self.folders[0], other)
        self.shards: list[tuple[PackedFolder, int]] = [
            (folder, number) for folder in self.folders for number in range(len(folder.manifest.shards))
        ]
        entries = [folder.manifest.shards[number] for folder, number in self.shards]
        self.entries: list[Shard] = entries
        self.ends = np.cumsum([entry.documents for entry in entries], dtype=np.int64)
        self.documents = sum(folder.manifest.documents for folder in self.folders)
        self.tokens = sum(folder.manifest.tokens for folder in self.folders)
        self.dtype = "int32" if any(folder.manifest.dtype == "int32" for folder in self.folders) else "uint16"
        self.has_mask = any(entry.mask is not None for entry in entries)
        # Numbers of sources mean something within one folder only.
        self.has_origins = len(self.folders) > 1 or all(entry.origins is not None for entry in entries)
        if not self.has_origins and any(entry.origins is not None for entry in entries):
            log.warning(
                "%s: only some of its shards know the sources of their documents; they are left out", folders[0]
            )
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._sound: set[tuple[int, bool]] = set()

    def index(self, shard: int) -> Index:
        """The index of a shard, by its number among all; some stay open."""
        found = self._indexes.pop(shard, None)
        if found is None:
            self._check(shard, index=True)
            folder, number = self.shards[shard]
            found = folder.index(number)
        self._indexes[shard] = found
        if len(self._indexes) > OPEN_INDEXES:
            self._indexes.popitem(last=False)
        return found

    def _check(self, shard: int, *, index: bool) -> None:
        """Read a shard's index, or its other files, before their first use: new checksums must not bless old damage.

        Raises:
            DataError: a checksum is wrong.
        """
        if (shard, index) in self._sound:
            return
        for stretch in stretches(self.entries[shard]):
            if stretch.file.endswith(".idx") == index:
                check_stretch(self.shards[shard][0].folder, stretch)
        self._sound.add((shard, index))

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first token there and length of documents, each (documents,) int64."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        starts, lengths = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        for shard in np.unique(shards):
            index = self.index(int(shard))
            among = np.flatnonzero(shards == shard)
            inside = numbers[among] - (self.ends[shard] - len(index.lengths))
            starts[among] = index.pointers[inside] // index.dtype.itemsize
            lengths[among] = index.lengths[inside]
        return shards, starts, lengths

    def batches(self, order: Iterable[np.ndarray]) -> Iterator[Documents]:
        """The documents of ``order``, blocks of numbers, at least one and about BATCH_TOKENS tokens at a time."""
        for numbers in order:
            shards, starts, lengths = self.places(numbers)
            group = (np.cumsum(lengths) - 1) // BATCH_TOKENS
            cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(numbers)]
            for first, last in pairwise(cuts):
                if last > first:
                    part = slice(first, last)
                    yield self._gathered(numbers[part], shards[part], starts[part], lengths[part])

    def _gathered(self, numbers: np.ndarray, shards: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Documents:
        """Copy documents in the order they lie in, so that a disk reads forward."""
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]), self.dtype)
        mask = np.ones(len(tokens), np.uint8) if self.has_mask else None
        origins = np.empty(len(numbers), np.uint32) if self.has_origins else None
        by_place = np.lexsort((starts, shards))
        targets = (ends - lengths)[by_place].tolist()
        rows = zip(
            shards[by_place].tolist(), starts[by_place].tolist(), lengths[by_place].tolist(), targets, strict=True
        )
        current, source, source_mask = -1, tokens, None
        for shard, start, length, target in rows:
            if shard != current:
                self._check(shard, index=False)
                folder, number = self.shards[shard]
                current, source, source_mask = shard, folder.tokens(number), folder.mask(number)
            tokens[target : target + length] = source[start : start + length]
            if mask is not None and source_mask is not None:
                mask[target : target + length] = source_mask[start : start + length]
        if origins is not None:
            for shard in np.unique(shards):
                among = shards == shard
                folder, number = self.shards[int(shard)]
                values = folder.origins(number) if len(self.folders) == 1 else None
                inside = numbers[among] - (self.ends[shard] - self.entries[shard].documents)
                origins[among] = self.folders.index(folder) if values is None else values[inside]
        return Documents(tokens, lengths, shards, mask, origins)


def _same_tokenizer(one: PackedFolder, other: PackedFolder) -> None:
    """Refuse folders whose ids mean different things."""
    facts = [
        (folder.manifest.tokenizer.fingerprint, folder.manifest.end_of_document, folder.manifest.vocab_size)
        for folder in (one, other)
    ]
    if UNKNOWN_ENGINE in (one.manifest.tokenizer.engine, other.manifest.tokenizer.engine):
        raise DataError(
            f"{one.folder} and {other.folder}: one was converted without its tokenizer, so whether their ids mean the "
            "same is unknown",
            hint="convert it again with --tokenizer",
        )
    if facts[0] != facts[1]:
        told = [
            f"{folder.folder} has tokenizer {fingerprint} of {vocab_size} ids ending documents with {end}"
            for folder, (fingerprint, end, vocab_size) in zip((one, other), facts, strict=True)
        ]
        raise DataError("the folders were made with different tokenizers: " + "; ".join(told))


def in_blocks(first: int, last: int) -> Iterator[np.ndarray]:
    """The numbers from ``first`` to ``last``, the last excluded, some at a time."""
    for start in range(first, last, BLOCK_DOCUMENTS):
        yield np.arange(start, min(start + BLOCK_DOCUMENTS, last), dtype=np.int64)
