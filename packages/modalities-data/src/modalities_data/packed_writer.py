"""Writing shards: tokens, document index and sidecars, each with its checksum, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import replacing
from modalities_data.manifest import Shard, Sidecar, Source
from modalities_data.megatron_index import LONGEST_DOCUMENT, index_bytes, write_index

CHECKSUM_BLOCK = 64 << 20


class _SidecarWriter:
    """A file beside a shard, and its checksum."""

    def __init__(self, stream: BinaryIO, dtype: str) -> None:
        self._stream, self._dtype, self._digest, self._bytes = stream, dtype, xxhash.xxh3_64(), 0

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self._dtype).data.cast("B")
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def entry(self) -> Sidecar:
        return Sidecar(self._bytes, self._digest.hexdigest())


class ShardWriter:
    """Appends documents to one shard, in bounded memory but for four bytes per document."""

    def __init__(
        self, stream: BinaryIO, name: str, dtype: str, sidecars: dict[str, _SidecarWriter] | None = None
    ) -> None:
        """Write to ``stream``; use ``writing_shard``, which also names the files."""
        self._sidecars = sidecars or {}
        self._stream = stream
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._whole, self._block = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._lengths: list[np.ndarray] = []
        self.name, self.dtype = name, dtype
        self.tokens = self.bytes = self.documents = self.text_bytes = self.largest_id = 0

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        text_bytes: int,
        mask: np.ndarray | None = None,
        origins: np.ndarray | None = None,
    ) -> None:
        """Add documents.

        Args:
            tokens: ids back to back, each document with its end.
            lengths: (documents,) tokens of each.
            text_bytes: UTF-8 bytes of all of them.
            mask: (tokens,) 1 where a token counts as a target, else 0; exactly where the shard has this sidecar.
            origins: (documents,) the number of each document's source; exactly where the shard has this sidecar.

        Raises:
            DataError: a document has more than 2**31 - 1 tokens.
        """
        assert int(lengths.sum()) == len(tokens)
        beside = {"mask": (mask, len(tokens)), "source": (origins, len(lengths))}
        assert self._sidecars.keys() == {suffix for suffix, (values, _) in beside.items() if values is not None}
        if not len(lengths):
            return
        if int(lengths.max()) > LONGEST_DOCUMENT:
            raise DataError(f"a document has {int(lengths.max())} tokens, the format holds {LONGEST_DOCUMENT}")
        self.largest_id = max(self.largest_id, int(tokens.max()))
        assert self.largest_id <= np.iinfo(self._dtype).max
        data = tokens.astype(self._dtype).data.cast("B")
        self._stream.write(data)
        self._digest(data)
        for suffix, sidecar in self._sidecars.items():
            values, count = beside[suffix]
            assert values is not None and len(values) == count
            sidecar.append(values)
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
        entries = {suffix: sidecar.entry() for suffix, sidecar in self._sidecars.items()}
        return Shard(
            self.name, self.tokens, self.documents, self.bytes, index_bytes(self.documents), self.text_bytes,
            self.largest_id, self._whole.hexdigest(), self._blocks, index_checksum, source,
            entries.get("mask"), entries.get("source"),
        )  # fmt: skip


@contextmanager
def writing_shard(
    folder: Path, name: str, dtype: str, *, mask: bool = False, origins: bool = False
) -> Iterator[ShardWriter]:
    """Write ``name.bin``, ``name.idx`` and the sidecars asked for; none of them appears if the body fails.

    Args:
        folder: where.
        name: of the files, without suffix.
        dtype: ``uint16`` or ``int32``.
        mask: with ``name.mask``, a byte per token.
        origins: with ``name.source``, a uint32 per document.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(replacing(folder / f"{name}.bin"))
        wanted = (("mask", "u1", mask), ("source", "<u4", origins))
        sidecars = {
            suffix: _SidecarWriter(stack.enter_context(replacing(folder / f"{name}.{suffix}")), kind)
            for suffix, kind, there in wanted
            if there
        }
        writer = ShardWriter(stream, name, dtype, sidecars)
        yield writer
        with replacing(folder / f"{name}.idx") as index:
            write_index(index, dtype, writer.lengths())
