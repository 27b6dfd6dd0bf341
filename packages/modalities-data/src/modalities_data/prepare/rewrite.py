"""Packed folders to a packed folder: chosen documents in a chosen order, in bounded memory."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import checksum
from modalities_data import manifest as manifests
from modalities_data.disk import user_errors
from modalities_data.manifest import Accounting, Input, Manifest, Shard, write_manifest
from modalities_data.megatron_index import Index
from modalities_data.packed import PackedFolder, writing_shard
from modalities_data.prepare.folder import STATE_FOLDER, check_replaceable, give_name, partial_folder, working_folder
from modalities_data.prepare.shards import shard_name
from modalities_data.tokenizers.opening import UNKNOWN_ENGINE

BLOCK_DOCUMENTS = 1 << 16
BATCH_TOKENS = 1 << 22
SHARD_TOKENS = 1 << 27
OPEN_INDEXES = 128

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all, and tokens written."""


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

    def index(self, shard: int) -> Index:
        """The index of a shard, by its number among all; some stay open."""
        found = self._indexes.pop(shard, None)
        if found is None:
            folder, number = self.shards[shard]
            found = folder.index(number)
        self._indexes[shard] = found
        if len(self._indexes) > OPEN_INDEXES:
            self._indexes.popitem(last=False)
        return found

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


def write_documents(
    joined: JoinedFolders,
    order: Iterable[np.ndarray],
    output: Path,
    *,
    options: dict[str, Any],
    accounting: Callable[[int], Accounting],
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Write documents of ``joined`` into the new packed folder ``output``; it gets its name when it is complete.

    Bytes of text are known per shard only; where a shard is not taken whole, its share is estimated by tokens, and
    the manifest's options say ``"text_bytes": "estimated"``.

    Args:
        joined: where they come from.
        order: blocks of document numbers.
        output: the folder to make.
        options: for the manifest.
        accounting: gives the accounting when it is told how many documents were written.
        shard_tokens: tokens per shard, at least.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: ``shard_tokens`` is not positive.
        DataError: the output exists, or no document is left.
        ResourceError: the disk is full.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens is at least 1, not {shard_tokens}")
    output = Path(os.path.abspath(output))
    check_replaceable(output, overwrite)
    partial = partial_folder(output)
    # A time that no other run has: whatever an interrupted one left is dropped.
    with user_errors(partial), making_folder(partial, {"options": options, "started": time.time_ns()}):
        shards, estimated = _write_shards(joined, order, partial, shard_tokens, on_progress)
        if not shards:
            raise DataError(f"no document is left to write: {accounting(0)}")
        first = joined.folders[0]
        manifest = msgspec.structs.replace(
            first.manifest,
            dtype=joined.dtype,
            largest_id=max(shard.largest_id for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            accounting=accounting(sum(shard.documents for shard in shards)),
            shards=shards,
            producer=f"modalities-data {version('modalities-data')}",
            options={**options, "sources": [source.manifest.fingerprint for source in joined.folders]}
            | ({"text_bytes": "estimated"} if estimated else {}),
            inputs=[_input(folder) for folder in joined.folders],
        )
        for file in first.folder.glob("tokenizer.*"):
            shutil.copyfile(file, partial / file.name)
        write_manifest(partial, manifest)
        finish(partial, output, overwrite)
    return manifest


@contextmanager
def making_folder(partial: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold ``partial``; there is nothing in it to take up again, so a failure deletes it."""
    with working_folder(partial, identity):
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def finish(partial: Path, output: Path, overwrite: bool) -> None:
    """Give the complete ``partial`` its name, without the files of the work."""
    shutil.rmtree(partial / STATE_FOLDER)
    (partial / ".lock").unlink()
    give_name(partial, output, overwrite)


def _write_shards(
    joined: JoinedFolders, order: Iterable[np.ndarray], folder: Path, shard_tokens: int, on_progress: OnProgress
) -> tuple[list[Shard], bool]:
    """Write the shards; give their entries, and whether bytes of text are an estimate."""
    batches = joined.batches(order)
    texts = _TextBytes(joined)
    total = joined.tokens * np.dtype(joined.dtype).itemsize
    shards: list[Shard] = []
    batch = next(batches, None)
    while batch is not None:
        name = shard_name(len(shards))
        with writing_shard(folder, name, joined.dtype, mask=joined.has_mask, origins=joined.has_origins) as writer:
            while batch is not None and writer.tokens < shard_tokens:
                taken, batch = _split(batch, shard_tokens - writer.tokens)
                writer.append(taken.tokens, taken.lengths, texts.added(taken), taken.mask, taken.origins)
                tokens = sum(shard.tokens for shard in shards) + writer.tokens
                on_progress(tokens * np.dtype(joined.dtype).itemsize, total, tokens)
                batch = batch or next(batches, None)
        shards.append(writer.shard(checksum(folder / f"{name}.idx")))
    return shards, texts.estimated()


def _split(batch: Documents, room: int) -> tuple[Documents, Documents | None]:
    """The first documents, as many as reach ``room`` tokens, and the others if there are any."""
    ends = np.cumsum(batch.lengths)
    count = int(np.searchsorted(ends, room)) + 1
    if count >= len(ends):
        return batch, None
    cut = int(ends[count - 1])

    def part(documents: slice, tokens: slice) -> Documents:
        return Documents(
            batch.tokens[tokens], batch.lengths[documents], batch.shards[documents],
            None if batch.mask is None else batch.mask[tokens],
            None if batch.origins is None else batch.origins[documents],
        )  # fmt: skip

    return part(slice(None, count), slice(None, cut)), part(slice(count, None), slice(cut, None))


class _TextBytes:
    """Bytes of text by tokens taken from each shard: exact for shards that are taken whole."""

    def __init__(self, joined: JoinedFolders) -> None:
        self._tokens = np.array([entry.tokens for entry in joined.entries], np.float64)
        self._text = np.array([entry.text_bytes for entry in joined.entries], np.float64)
        self._taken = np.zeros(len(self._tokens))
        self._told = 0

    def added(self, batch: Documents) -> int:
        """The bytes of a batch's documents."""
        self._taken += np.bincount(batch.shards, weights=batch.lengths, minlength=len(self._taken))
        total = int(np.floor(self._text * (self._taken / self._tokens)).sum())
        self._told, before = total, self._told
        return total - before

    def estimated(self) -> bool:
        """Whether a shard was taken in part."""
        return bool(np.any((self._taken != 0) & (self._taken != self._tokens)))


def _input(folder: PackedFolder) -> Input:
    path = folder.folder / manifests.FILE_NAME
    return Input(str(path), path.stat().st_size, checksum(path))


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


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a packed folder."""
    return path.is_dir() and (path / manifests.FILE_NAME).is_file()
