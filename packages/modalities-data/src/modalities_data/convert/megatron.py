"""From and to bare ``.bin``/``.idx`` pairs of Megatron-LM, which have no manifest."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import CHUNK_BYTES, replacing
from modalities_data.convert.raw import RawTokens, Vocabulary
from modalities_data.convert.shards import link_or_copy, write_converted
from modalities_data.disk import user_errors
from modalities_data.manifest import Manifest
from modalities_data.megatron_index import Index, read_index, write_index
from modalities_data.packed import PackedFolder
from modalities_data.prepare.rewrite import OnProgress

Unit = Literal["document", "sequence"]


def from_megatron(
    prefixes: Sequence[Path],
    output: Path,
    vocabulary: Vocabulary,
    *,
    unit: Unit = "document",
    append_end: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Make a packed folder of pairs; files of uint16 or int32 tokens are linked, others rewritten.

    Args:
        prefixes: each the name of a pair without ``.bin`` and ``.idx``, as Megatron-LM takes it.
        output: the folder to make.
        vocabulary: what the ids mean.
        unit: what becomes a document: Megatron's documents, which can have several sequences, or its sequences.
        append_end: put the end-of-document id where a document lacks it.
        copy: never link.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: there is no prefix.
        DataError: a pair is damaged, holds other things than tokens, or ids that are not in the vocabulary.
    """
    if not prefixes:
        raise ConfigError("there is no pair to convert")
    names = [_prefix(prefix) for prefix in prefixes]
    sources = [_read(name, unit) for name in names]
    return write_converted(
        sources, output, vocabulary, options={"command": "convert from-megatron", "unit": unit}, append_end=append_end,
        inputs=[Path(f"{name}.{suffix}") for name in names for suffix in ("bin", "idx")], copy=copy,
        overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def to_megatron(folder: Path, prefix: Path, *, copy: bool = False, overwrite: bool = False) -> tuple[int, int]:
    """Write all shards of a packed folder as one pair; a single shard is linked.

    Args:
        folder: a packed folder.
        prefix: the pair's name without ``.bin`` and ``.idx``.
        copy: never link.
        overwrite: replace an existing pair.

    Returns:
        Documents and tokens.

    Raises:
        DataError: the folder is damaged, or the pair exists.
        ResourceError: the disk is full.
    """
    packed = PackedFolder(folder)
    prefix = Path(_prefix(prefix))
    paths = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")]
    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already", hint="choose another name, or pass --overwrite to replace it")
    shards = packed.manifest.shards
    with user_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        # Without an index there is no pair: it goes first, and comes last.
        paths[1].unlink(missing_ok=True)
        if len(shards) == 1:
            paths[0].unlink(missing_ok=True)
            link_or_copy(packed.folder / f"{shards[0].name}.bin", paths[0], copy)
        else:
            with replacing(paths[0]) as stream:
                for shard in shards:
                    with (packed.folder / f"{shard.name}.bin").open("rb") as part:
                        while chunk := part.read(CHUNK_BYTES):
                            stream.write(chunk)
        lengths = np.concatenate([packed.index(number).lengths for number in range(len(shards))])
        with replacing(paths[1]) as stream:
            write_index(stream, packed.manifest.dtype, lengths)
    return packed.manifest.documents, packed.manifest.tokens


def _prefix(path: Path) -> str:
    """The name of a pair, also where one of its files was named."""
    name = os.fspath(path)
    return name[:-4] if name.endswith((".bin", ".idx")) else name


def _read(prefix: str, unit: Unit) -> RawTokens:
    """The documents of a pair."""
    path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    with user_errors(index_path), index_path.open("rb") as stream:
        size = path.stat().st_size
        # An empty file cannot be mapped.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if index_path.stat().st_size else b""
    index = read_index(index_path, memoryview(mapped), size)
    _check(index, index_path, size)
    starts = index.pointers // index.dtype.itemsize
    lengths = index.lengths.astype(np.int64)
    if unit == "document":
        starts, lengths = _documents(index, starts, lengths, index_path)
    return RawTokens(path, 0, index.dtype, size // index.dtype.itemsize, starts, lengths)


def _check(index: Index, path: Path, size: int) -> None:
    """Every sequence lies in the file, and is text."""
    ends = index.pointers + index.lengths * np.int64(index.dtype.itemsize)
    if len(index.lengths) and (
        int(index.lengths.min()) < 0 or int(index.pointers.min()) < 0 or int(ends.max()) > size
        or np.any(index.pointers % index.dtype.itemsize) or size % index.dtype.itemsize
    ):  # fmt: skip
        raise DataError(f"{path}: a sequence lies outside of the .bin file")
    if index.modes is not None and np.any(index.modes):
        raise DataError(f"{path} is multimodal: {int(np.count_nonzero(index.modes))} sequences are no text tokens")


def _documents(index: Index, starts: np.ndarray, lengths: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of Megatron's documents, of one or more sequences that follow each other."""
    entries, count = index.entries, len(lengths)
    if not len(entries) or entries[0] or int(entries[-1]) != count or np.any(np.diff(entries) < 0):
        raise DataError(
            f"{path}: its document entries do not go from 0 to {count} sequences",
            hint="take each sequence as a document with --unit sequence",
        )
    first = entries[:-1]
    follows = np.ones(count, bool)
    follows[1:] = starts[1:] == starts[:-1] + lengths[:-1]
    follows[first[first < count]] = True
    if not follows.all():
        raise DataError(f"{path}: the sequences of a document do not follow each other in the .bin file")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return np.append(starts, 0)[first], ends[entries[1:]] - ends[first]
