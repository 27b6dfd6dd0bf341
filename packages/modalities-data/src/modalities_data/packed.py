"""Packed folders: raw little-endian tokens in Megatron-LM's ``.bin``/``.idx`` shards, and a manifest written last."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import checksum
from modalities_data.manifest import Manifest, Shard, read_manifest
from modalities_data.mapping import mappable, mapped
from modalities_data.megatron_index import Index, read_index
from modalities_data.packed_writer import CHECKSUM_BLOCK, ShardWriter, writing_shard
from modalities_data.rows import Rows
from modalities_data.sizes import SizeCheck

__all__ = ["CHECKSUM_BLOCK", "PackedFolder", "ShardWriter", "problems", "verify", "writing_shard"]


OPEN_SHARDS = mappable()
ENDS_BYTES = 256 << 20
"""How much memory document ends may take, eight bytes each; with more documents they are read from the files."""
FILES_AT_ONCE = 4096
"""For how many files the start of a run waits; the sizes of any others are checked while it goes on."""


class PackedFolder:
    """A packed folder, open for reading: sizes checked, shards mapped when they are first used.

    Args:
        folder: with its manifest.json.
        at_once: how many files' sizes to check before it counts as open; ``raise_damage`` tells of the others, and each
            is checked when it is mapped. All by default.
    """

    def __init__(self, folder: Path, at_once: int | None = None) -> None:
        """Read the manifest and check that the files are there and have their sizes.

        Raises:
            DataError: a file is missing, or is not what the manifest says.
        """
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        size = self.dtype.itemsize
        for shard in self.manifest.shards:
            if shard.bytes != shard.tokens * size or shard.mask is not None or shard.origins is not None:
                self._check_counts(shard)
        self._sizes = SizeCheck(self.folder, self.manifest.shards, sys.maxsize if at_once is None else at_once)
        self._mapped: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._indices: OrderedDict[int, Index] = OrderedDict()
        self._ends: np.ndarray | None = None
        self._lock = threading.Lock()
        self._document_ends = np.cumsum([shard.documents for shard in self.manifest.shards], dtype=np.int64)

    def _check_counts(self, shard: Shard) -> None:
        """Refuse a shard whose own numbers contradict each other."""
        if shard.bytes != shard.tokens * self.dtype.itemsize:
            raise DataError(
                f"{self.folder / 'manifest.json'}: shard {shard.name} has {shard.tokens} tokens of "
                f"{self.dtype.itemsize} bytes, but {shard.bytes} bytes"
            )
        mask, origins = shard.mask, shard.origins
        if (mask is not None and mask.bytes != shard.tokens) or (
            origins is not None and origins.bytes != 4 * shard.documents
        ):
            raise DataError(f"{self.folder / 'manifest.json'}: a sidecar of shard {shard.name} has not its size")

    def raise_damage(self) -> None:
        """Tell of files that turned out to be damaged since the folder was opened.

        Raises:
            DataError: one is missing, or is not what the manifest says.
        """
        self._sizes.raise_found()

    def rows(self, step: int, width: int) -> Rows:
        """The tokens of all shards as one long row, cut into rows of ``width`` that begin every ``step`` tokens."""
        return self._rows(step, width, self.dtype, self.tokens)

    def mask_rows(self, step: int, width: int) -> Rows:
        """The same rows of which tokens count as targets, uint8 of 0 and 1."""
        return self._rows(step, width, np.dtype("u1"), self.mask)

    def _rows(self, step: int, width: int, dtype: np.dtype, stored: Callable[[int], np.ndarray | None]) -> Rows:
        shards = self.manifest.shards
        files = len(shards) + sum(shard.mask is not None for shard in shards)
        return Rows([shard.tokens for shard in shards], step, width, dtype, stored, keep=files <= OPEN_SHARDS)

    def tokens(self, number: int) -> np.ndarray:
        """All tokens of a shard, (tokens,) read-only, mapped into memory."""
        return self._kept(number, "bin", self.dtype)

    def mask(self, number: int) -> np.ndarray | None:
        """Which tokens of a shard count as targets, (tokens,) uint8 of 0 and 1; None where all do."""
        return None if self.manifest.shards[number].mask is None else self._kept(number, "mask", np.dtype("u1"))

    def origins(self, number: int) -> np.ndarray | None:
        """The number of each document's source, (documents,) uint32; None where unknown."""
        return None if self.manifest.shards[number].origins is None else self._kept(number, "source", np.dtype("<u4"))

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shards of documents by their numbers in the folder, and their numbers there, each (N,) int64."""
        shards = np.searchsorted(self._document_ends, documents, side="right")
        counts = np.diff(self._document_ends, prepend=0)
        return shards, documents - (self._document_ends - counts)[shards]

    def document_ends(self) -> np.ndarray | None:
        """Behind the last token of every document, (documents,) int64 from the folder's first token.

        None where they are too many to keep at hand; see ``documents_at`` and ``ends_of`` then.
        """
        if self.manifest.documents * 8 > ENDS_BYTES:
            return None
        with self._lock:
            if self._ends is None:
                before, parts = 0, [np.empty(0, np.int64)]
                for number, shard in enumerate(self.manifest.shards):
                    index = self.index(number)
                    parts.append(index.pointers // self.dtype.itemsize + index.lengths + before)
                    before += shard.tokens
                self._ends = np.concatenate(parts)
            return self._ends

    def documents_at(self, number: int, places: np.ndarray) -> np.ndarray:
        """Which documents of a shard hold the tokens at ``places``, (N,) int64; ``documents`` behind the last."""
        starts = self.kept_index(number).pointers
        size, total = self.dtype.itemsize, self.manifest.shards[number].tokens
        found = [bisect_right(starts, place * size) - 1 if place < total else len(starts) for place in places.tolist()]
        return np.array(found, np.int64)

    def ends_of(self, number: int, documents: np.ndarray) -> np.ndarray:
        """Behind the last token of each of ``documents`` of a shard, (N,) int64 tokens from the shard's start."""
        index = self.kept_index(number)
        return index.pointers[documents] // self.dtype.itemsize + index.lengths[documents]

    def kept_index(self, number: int) -> Index:
        """The same as ``index``; its file stays mapped while there is room."""
        with self._lock:
            index = self._indices.pop(number, None)
            if index is None:
                index = self.index(number)
            self._indices[number] = index
            if len(self._indices) > OPEN_SHARDS:
                self._indices.popitem(last=False)
        return index

    def _kept(self, number: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        """The content of a file, which stays mapped while there is room."""
        with self._lock:
            values = self._mapped.pop((number, suffix), None)
            if values is None:
                values = np.frombuffer(self._map(number, suffix), dtype)
            self._mapped[number, suffix] = values
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        return values

    def index(self, number: int) -> Index:
        """Where the documents of a shard lie.

        Raises:
            DataError: the file is no index, or does not fit the manifest.
        """
        shard = self.manifest.shards[number]
        path = self.folder / f"{shard.name}.idx"
        index = read_index(path, self._map(number, "idx"), shard.bytes)
        if len(index.lengths) != shard.documents or index.dtype != self.dtype:
            raise DataError(
                f"{path}: the manifest expects {shard.documents} documents of {self.dtype}, "
                f"the index has {len(index.lengths)} of {index.dtype}"
            )
        return index

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document with its end, (tokens,), by its number in the folder."""
        if not 0 <= number < self.manifest.documents:
            raise IndexError(f"document {number} of {self.manifest.documents}")
        shards, places = self.locate(np.array([number]))
        shard, place = int(shards[0]), int(places[0])
        index = self.kept_index(shard)
        start = int(index.pointers[place]) // self.dtype.itemsize
        return self.tokens(shard)[start : start + int(index.lengths[place])]

    def _map(self, number: int, suffix: str) -> memoryview:
        name = f"{self.manifest.shards[number].name}.{suffix}"
        return mapped(self.folder / name, self.manifest.shards[number].files()[name])


def problems(folder: Path, on_progress: Callable[[int, int, int], None] = lambda *now: None) -> Iterator[str]:
    """Everything wrong with the contents of a packed folder: reads every byte, checks every checksum, index and id.

    Args:
        folder: a packed folder.
        on_progress: told bytes done, bytes in all, and tokens, before each shard.

    Raises:
        DataError: the folder cannot be opened at all.
    """
    packed = PackedFolder(folder)
    total = sum(sum(shard.files().values()) for shard in packed.manifest.shards)
    done = tokens = 0
    for number, shard in enumerate(packed.manifest.shards):
        on_progress(done, total, tokens)
        done, tokens = done + sum(shard.files().values()), tokens + shard.tokens
        path = packed.folder / f"{shard.name}.idx"
        found = checksum(path)
        if found != shard.index_checksum:
            yield f"{path}: expected checksum {shard.index_checksum}, found {found}"
            continue
        yield from _bin_problems(packed, number)
        yield from _index_problems(packed, number)
        yield from _sidecar_problems(packed, number)


def _bin_problems(packed: PackedFolder, number: int) -> Iterator[str]:
    """Checksums block by block, so that a message says where, and the largest id."""
    shard = packed.manifest.shards[number]
    path = packed.folder / f"{shard.name}.bin"
    tokens = packed.tokens(number)
    data = tokens.data.cast("B")
    whole, largest = xxhash.xxh3_64(), 0
    for block, expected in enumerate(shard.block_checksums):
        part = data[block * CHECKSUM_BLOCK : (block + 1) * CHECKSUM_BLOCK]
        whole.update(part)
        found = xxhash.xxh3_64_hexdigest(part)
        if found != expected:
            yield f"{path}: bytes from {block * CHECKSUM_BLOCK}: expected checksum {expected}, found {found}"
        # A negative id, which no tokenizer gives, is a huge one without its sign.
        largest = max(largest, int(np.frombuffer(part, f"<u{packed.dtype.itemsize}").max()))
    if whole.hexdigest() != shard.checksum:
        yield f"{path}: expected checksum {shard.checksum}, found {whole.hexdigest()}"
    if largest >= packed.manifest.vocab_size:
        yield f"{path}: ids are below {packed.manifest.vocab_size}, found {largest}"
    elif largest != shard.largest_id:
        yield f"{path}: expected {shard.largest_id} as the largest id, found {largest}"


def _index_problems(packed: PackedFolder, number: int) -> Iterator[str]:
    """Documents have to lie back to back, and each has to end with the end-of-document id."""
    shard = packed.manifest.shards[number]
    path = packed.folder / f"{shard.name}.idx"
    try:
        index = packed.index(number)
    except DataError as error:
        yield error.message
        return
    ends = np.cumsum(index.lengths, dtype=np.int64)
    if not np.array_equal(index.pointers[1:], ends[:-1] * packed.dtype.itemsize) or int(index.pointers[0]):
        yield f"{path}: documents do not lie back to back"
    elif np.any(packed.tokens(number)[ends - 1] != packed.manifest.end_of_document):
        yield f"{path}: not every document ends with id {packed.manifest.end_of_document}"


def _sidecar_problems(packed: PackedFolder, number: int) -> Iterator[str]:
    """Checksums, and masks that hold anything but 0 and 1."""
    shard = packed.manifest.shards[number]
    for suffix, sidecar in shard.sidecars().items():
        path = packed.folder / f"{shard.name}.{suffix}"
        found = checksum(path)
        if found != sidecar.checksum:
            yield f"{path}: expected checksum {sidecar.checksum}, found {found}"
    mask = packed.mask(number)
    if mask is not None and int(mask.max()) > 1:
        yield f"{packed.folder / shard.name}.mask: a mask is made of 0 and 1, found {int(mask.max())}"


def verify(folder: Path, on_progress: Callable[[int, int, int], None] = lambda *now: None) -> Manifest:
    """Check every byte of a packed folder and return its manifest.

    Args:
        folder: a packed folder.
        on_progress: told bytes done, bytes in all, and tokens, before each shard.

    Raises:
        DataError: anything is wrong; the message lists the first ten problems.
    """
    found = list(problems(folder, on_progress))
    if found:
        more = f"\n(and {len(found) - 10} more)" if len(found) > 10 else ""
        raise DataError("\n".join(found[:10]) + more, hint="pack it again, or copy it again from where it was whole")
    return read_manifest(folder)
