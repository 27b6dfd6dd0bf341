"""Packed folders: raw little-endian tokens in Megatron-LM's ``.bin``/``.idx`` shards, and a manifest written last."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import checksum, replacing
from modalities_data.disk import user_errors
from modalities_data.manifest import Manifest, Shard, Source, read_manifest
from modalities_data.megatron_index import LONGEST_DOCUMENT, Index, index_bytes, read_index, write_index

CHECKSUM_BLOCK = 64 << 20
OPEN_SHARDS = 256
"""How many shards stay mapped: each costs a file descriptor, and 1,024 is a common limit."""


class ShardWriter:
    """Appends documents to one shard, in bounded memory but for four bytes per document."""

    def __init__(self, stream: BinaryIO, name: str, dtype: str) -> None:
        """Write to ``stream``; use ``writing_shard``, which also names the files."""
        self._stream = stream
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._whole, self._block = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._lengths: list[np.ndarray] = []
        self.name, self.dtype = name, dtype
        self.tokens = self.bytes = self.documents = self.text_bytes = self.largest_id = 0

    def append(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Add documents.

        Args:
            tokens: ids back to back, each document with its end.
            lengths: (documents,) tokens of each.
            text_bytes: UTF-8 bytes of all of them.

        Raises:
            DataError: a document has more than 2**31 - 1 tokens.
        """
        assert int(lengths.sum()) == len(tokens)
        if not len(lengths):
            return
        if int(lengths.max()) > LONGEST_DOCUMENT:
            raise DataError(f"a document has {int(lengths.max())} tokens, the format holds {LONGEST_DOCUMENT}")
        self.largest_id = max(self.largest_id, int(tokens.max()))
        assert self.largest_id <= np.iinfo(self._dtype).max
        data = tokens.astype(self._dtype).data.cast("B")
        self._stream.write(data)
        self._digest(data)
        self._lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.text_bytes += text_bytes

    def _digest(self, data: memoryview) -> None:
        self._whole.update(data)
        while len(data):
            room = CHECKSUM_BLOCK - self.bytes % CHECKSUM_BLOCK
            part, data = data[:room], data[room:]
            self._block.update(part)
            self.bytes += len(part)
            if len(part) == room:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()

    def lengths(self) -> np.ndarray:
        """(documents,) int32."""
        return np.concatenate([*self._lengths, np.empty(0, "<i4")])

    def shard(self, index_checksum: str, source: Source | None = None) -> Shard:
        """The manifest's entry; call it once, when all is written."""
        if self.bytes % CHECKSUM_BLOCK:
            self._end_block()
        return Shard(
            self.name, self.tokens, self.documents, self.bytes, index_bytes(self.documents), self.text_bytes,
            self.largest_id, self._whole.hexdigest(), self._blocks, index_checksum, source,
        )  # fmt: skip


@contextmanager
def writing_shard(folder: Path, name: str, dtype: str) -> Iterator[ShardWriter]:
    """Write ``name.bin`` and ``name.idx``; each appears whole or not at all, and neither if the body fails."""
    with replacing(folder / f"{name}.bin") as stream:
        writer = ShardWriter(stream, name, dtype)
        yield writer
        with replacing(folder / f"{name}.idx") as index:
            write_index(index, dtype, writer.lengths())


class PackedFolder:
    """A packed folder, open for reading: sizes checked, shards mapped when they are first used.

    Args:
        folder: with its manifest.json.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest and check that every file is there and has its size.

        Raises:
            DataError: a file is missing, or is not what the manifest says.
        """
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        for shard in self.manifest.shards:
            self._check_sizes(shard)
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._document_ends = np.cumsum([shard.documents for shard in self.manifest.shards], dtype=np.int64)

    def _check_sizes(self, shard: Shard) -> None:
        if shard.bytes != shard.tokens * self.dtype.itemsize:
            raise DataError(
                f"{self.folder / 'manifest.json'}: shard {shard.name} has {shard.tokens} tokens of "
                f"{self.dtype.itemsize} bytes, but {shard.bytes} bytes"
            )
        for suffix, expected in (("bin", shard.bytes), ("idx", shard.index_bytes)):
            path = self.folder / f"{shard.name}.{suffix}"
            if not path.is_file():
                raise DataError(f"{path} is missing; the manifest expects {expected} bytes")
            found = path.stat().st_size
            if found != expected:
                raise DataError(f"{path}: the manifest expects {expected} bytes, the file has {found}")

    def tokens(self, number: int) -> np.ndarray:
        """All tokens of a shard, (tokens,) read-only, mapped into memory."""
        with self._lock:
            tokens = self._mapped.pop(number, None)
            if tokens is None:
                tokens = np.frombuffer(self._map(number, "bin"), self.dtype)
            self._mapped[number] = tokens
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        return tokens

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
        shard = int(np.searchsorted(self._document_ends, number, side="right"))
        index = self.index(shard)
        place = number - int(self._document_ends[shard]) + len(index.lengths)
        start = int(index.pointers[place]) // self.dtype.itemsize
        return self.tokens(shard)[start : start + int(index.lengths[place])]

    def _map(self, number: int, suffix: str) -> memoryview:
        path = self.folder / f"{self.manifest.shards[number].name}.{suffix}"
        with user_errors(path), path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def problems(folder: Path) -> Iterator[str]:
    """Everything wrong with the contents of a packed folder: reads every byte, checks every checksum, index and id.

    Raises:
        DataError: the folder cannot be opened at all.
    """
    packed = PackedFolder(folder)
    for number, shard in enumerate(packed.manifest.shards):
        path = packed.folder / f"{shard.name}.idx"
        found = checksum(path)
        if found != shard.index_checksum:
            yield f"{path}: expected checksum {shard.index_checksum}, found {found}"
            continue
        yield from _bin_problems(packed, number)
        yield from _index_problems(packed, number)


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
        largest = max(largest, int(np.frombuffer(part, packed.dtype).max()))
    if whole.hexdigest() != shard.checksum:
        yield f"{path}: expected checksum {shard.checksum}, found {whole.hexdigest()}"
    if largest != shard.largest_id:
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


def verify(folder: Path) -> Manifest:
    """Check every byte of a packed folder and return its manifest.

    Raises:
        DataError: anything is wrong; the message lists the first ten problems.
    """
    found = list(problems(folder))
    if found:
        more = f"\n(and {len(found) - 10} more)" if len(found) > 10 else ""
        raise DataError("\n".join(found[:10]) + more, hint="pack it again, or copy it again from where it was whole")
    return read_manifest(folder)
