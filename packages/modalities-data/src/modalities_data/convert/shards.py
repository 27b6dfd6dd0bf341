"""Tokens that lie in somebody else's file to a shard of a packed folder: linked where they can stay as they are."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import CHUNK_BYTES, checksum, replacing
from modalities_data.convert.raw import RawTokens, Vocabulary
from modalities_data.disk import user_errors
from modalities_data.manifest import (
    Accounting,
    Input,
    Manifest,
    Shard,
    Sidecar,
    Source,
    write_manifest,
)
from modalities_data.megatron_index import LONGEST_DOCUMENT, index_bytes, token_dtype, write_index
from modalities_data.packed import CHECKSUM_BLOCK, writing_shard
from modalities_data.prepare.folder import check_replaceable, partial_folder
from modalities_data.prepare.rewrite import OnProgress, finish, making_folder
from modalities_data.prepare.shards import shard_name

BATCH_TOKENS = 1 << 22
STORED_AS = {"<u2": "uint16", "<i4": "int32", "<u4": "int32"}
"""Which of our dtypes has the same bytes: 32 bits without sign are the same below 2**31."""


def write_converted(
    sources: Sequence[RawTokens],
    output: Path,
    vocabulary: Vocabulary,
    *,
    options: dict[str, Any],
    inputs: Sequence[Path],
    append_end: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Make a packed folder of tokens in files, one shard each; every id is read and checked.

    A file whose bytes can stay as they are becomes a hard link, or a copy on another file system; others are written
    anew. Bytes of text are unknown, 0 in the manifest. Documents without a token are skipped as ``empty``.

    Args:
        sources: in the order of the shards.
        output: the folder to make.
        vocabulary: of all of them.
        options: for the manifest.
        inputs: files that were read, for the manifest.
        append_end: put the end-of-document id behind documents that lack it.
        copy: never link.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        DataError: an id is not in the vocabulary, a document does not end with the end-of-document id, there is none,
            or the output exists.
        ResourceError: the disk is full.
    """
    output = Path(os.path.abspath(output))
    check_replaceable(output, overwrite)
    partial = partial_folder(output)
    dtype = _dtype(sources, vocabulary)
    shards: list[Shard] = []
    counts = Accounting()
    total, done, tokens = sum(source.tokens * source.dtype.itemsize for source in sources), 0, 0

    def report(ids: np.ndarray) -> None:
        nonlocal done, tokens
        done, tokens = done + ids.nbytes, tokens + len(ids)
        on_progress(done, total, tokens)

    job = _Job(partial, dtype, vocabulary, append_end, copy, report)
    with user_errors(partial), making_folder(partial, {"options": options, "started": time.time_ns()}):
        for source in sources:
            kept = _without_empty(source)
            counts += Accounting(len(source.lengths), len(kept.lengths), _rule(len(source.lengths) - len(kept.lengths)))
            if len(kept.lengths):
                shards.append(_write(kept, shard_name(len(shards)), job))
        if not shards:
            raise DataError("there is no document to convert")
        save = getattr(vocabulary.tokenizer, "save", None)
        if save is not None:
            save(partial)
        manifest = Manifest(
            dtype=dtype, vocab_size=vocabulary.vocab_size, largest_id=max(shard.largest_id for shard in shards),
            end_of_document=vocabulary.end_of_document, tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards), text_bytes=0, tokenizer=vocabulary.record(),
            accounting=counts, shards=shards, producer=f"modalities-data {version('modalities-data')}",
            options=options, inputs=[Input(str(path), path.stat().st_size, checksum(path)) for path in inputs],
        )  # fmt: skip
        write_manifest(partial, manifest)
        finish(partial, output, overwrite)
    return manifest


def _rule(empty: int) -> dict[str, int]:
    return {"empty": empty} if empty else {}


def _without_empty(source: RawTokens) -> RawTokens:
    has_tokens = source.lengths > 0
    if has_tokens.all():
        return source
    return source._replace(starts=source.starts[has_tokens], lengths=source.lengths[has_tokens])


def _dtype(sources: Sequence[RawTokens], vocabulary: Vocabulary) -> str:
    """The dtype the files have, if it is one of ours and holds the end of a document; else Megatron-LM's choice."""
    stored = {STORED_AS.get(source.dtype.str) for source in sources}
    one = stored.pop() if len(stored) == 1 else None
    if one is not None and vocabulary.end_of_document <= np.iinfo(one).max:
        return one
    return token_dtype(vocabulary.vocab_size)


@dataclass(frozen=True)
class _Job:
    """What every shard is made with; ``report`` is told the ids that were checked."""

    folder: Path
    dtype: str
    vocabulary: Vocabulary
    append_end: bool
    copy: bool
    report: Callable[[np.ndarray], None]


def _write(source: RawTokens, name: str, job: _Job) -> Shard:
    """One shard, from one file."""
    if int(source.lengths.max()) >= LONGEST_DOCUMENT:
        raise DataError(f"{source.path}: a document has {int(source.lengths.max())} tokens, too many for the format")
    tokens = source.mapped()
    end = job.vocabulary.end_of_document
    lacking = tokens[source.starts + source.lengths - 1] != end
    if lacking.any() and not job.append_end:
        raise DataError(
            f"{source.path}: {int(lacking.sum())} of {len(lacking)} documents do not end with id {end}, the first of "
            f"them document {int(np.argmax(lacking))}",
            hint="is this the right end-of-document id? --append-end puts it where it is missing",
        )
    as_it_is = not source.offset and STORED_AS.get(source.dtype.str) == job.dtype and source.back_to_back()
    if as_it_is and source.path.stat().st_size == tokens.nbytes and not lacking.any():
        return _linked(source, tokens, name, job)
    return _rewritten(source, tokens, lacking, name, job)


def _linked(source: RawTokens, tokens: np.ndarray, name: str, job: _Job) -> Shard:
    """The file as it is; its checksums, and every id checked."""
    link_or_copy(source.path, job.folder / f"{name}.bin", job.copy)
    whole, blocks, largest = xxhash.xxh3_64(), [], 0
    data = tokens.data.cast("B")
    for start in range(0, len(data), CHECKSUM_BLOCK):
        part = data[start : start + CHECKSUM_BLOCK]
        whole.update(part)
        blocks.append(xxhash.xxh3_64_hexdigest(part))
        largest = max(largest, _largest(np.frombuffer(part, source.dtype), source, job))
    with replacing(job.folder / f"{name}.idx") as stream:
        write_index(stream, job.dtype, source.lengths)
    mask = None
    if source.mask is not None:
        _mask(source)
        link_or_copy(source.mask, job.folder / f"{name}.mask", job.copy)
        mask = Sidecar(len(tokens), checksum(source.mask))
    return Shard(
        name=name, tokens=len(tokens), documents=len(source.lengths), bytes=len(data),
        index_bytes=index_bytes(len(source.lengths)), text_bytes=0, largest_id=largest, checksum=whole.hexdigest(),
        block_checksums=blocks, index_checksum=checksum(job.folder / f"{name}.idx"),
        source=Source(str(source.path), 0, len(data)), mask=mask,
    )  # fmt: skip


def _rewritten(source: RawTokens, tokens: np.ndarray, lacking: np.ndarray, name: str, job: _Job) -> Shard:
    """The documents copied one after the other, with their missing ends, which count as targets."""
    mask = None if source.mask is None else _mask(source)
    with writing_shard(job.folder, name, job.dtype, mask=mask is not None) as writer:
        for first, last in _batches(source.lengths):
            starts, lengths, lacks = source.starts[first:last], source.lengths[first:last], lacking[first:last]
            ids = _taken(tokens, starts, lengths)
            _largest(ids, source, job)
            places = np.cumsum(lengths)[lacks]
            writer.append(
                np.insert(ids.astype(job.dtype), places, job.vocabulary.end_of_document), lengths + lacks, 0,
                None if mask is None else np.insert(_taken(mask, starts, lengths), places, 1),
            )  # fmt: skip
    used = Source(str(source.path), source.offset, source.offset + source.tokens * source.dtype.itemsize)
    return writer.shard(checksum(job.folder / f"{name}.idx"), used)


def _taken(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The values of documents, back to back."""
    ends = starts + lengths
    if np.array_equal(starts[1:], ends[:-1]):
        return values[int(starts[0]) : int(ends[-1])]
    return np.concatenate([values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])


def _mask(source: RawTokens) -> np.ndarray:
    """(tokens,) uint8 of the mask file, if it is made of 0 and 1."""
    assert source.mask is not None
    mask = np.memmap(source.mask, np.uint8, "r")
    if int(mask.max()) > 1:
        raise DataError(f"{source.mask}: a mask is made of 0 and 1, found {int(mask.max())}")
    return mask


def _batches(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last document of about BATCH_TOKENS tokens."""
    group = (np.cumsum(lengths) - 1) // BATCH_TOKENS
    yield from pairwise([0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)])


def _largest(ids: np.ndarray, source: RawTokens, job: _Job) -> int:
    """The largest id, if all are in the vocabulary."""
    vocabulary = job.vocabulary
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= vocabulary.vocab_size:
        found = smallest if smallest < 0 else largest
        raise DataError(f"{source.path}: id {found} is not in a vocabulary of {vocabulary.vocab_size} ids")
    job.report(ids)
    return largest


def link_or_copy(source: Path, target: Path, copy: bool = False) -> None:
    """Make ``target`` a hard link to ``source``, or a durable copy where there can be none or ``copy`` asks for it."""
    if not copy:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            target.unlink(missing_ok=True)
    with source.open("rb") as stream, replacing(target) as output:
        shutil.copyfileobj(stream, output, CHUNK_BYTES)
