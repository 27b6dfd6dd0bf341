"""Packed folders to a packed folder: chosen documents in a chosen order, in bounded memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import checksum
from modalities_data import manifest as manifests
from modalities_data.disk import user_errors
from modalities_data.manifest import Accounting, Input, Manifest, Shard, write_manifest
from modalities_data.packed import PackedFolder, writing_shard
from modalities_data.prepare.folder import STATE_FOLDER, check_replaceable, give_name, partial_folder, working_folder
from modalities_data.prepare.joined import Documents, JoinedFolders
from modalities_data.prepare.shards import shard_name

SHARD_TOKENS = 1 << 27

OnProgress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all, and tokens written."""


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


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a packed folder."""
    return path.is_dir() and (path / manifests.FILE_NAME).is_file()
