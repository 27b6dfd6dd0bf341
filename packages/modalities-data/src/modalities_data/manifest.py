"""``manifest.json`` of a packed folder: what makes a set of shards safe to open."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import write_json
from modalities_data.disk import user_errors

FILE_NAME = "manifest.json"
FORMAT = "modalities-packed"
VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]


class Source(msgspec.Struct, frozen=True, gc=False):
    """The input a shard was made from: ``start`` to ``end`` of ``file``.

    start, end: bytes, or row groups of a Parquet file.
    last_file: where several files went into the shard, the last of them, in which ``end`` lies; the ones between were
        read whole and stand between the two in the manifest's ``inputs``.
    """

    file: str
    start: Count
    end: Count
    last_file: str = ""


class Input(msgspec.Struct, frozen=True, gc=False):
    """A file that was read.

    file: its path or address.
    bytes: its size.
    checksum: xxh3-64 of the bytes read; where they were read in several parts, the sum modulo 2**64 of each part's
        xxh3-64 with the part's start as seed.
    """

    file: str
    bytes: Count
    checksum: str


class Sidecar(msgspec.Struct, frozen=True, gc=False):
    """A file beside a shard: its size and the xxh3-64 of its content."""

    bytes: Count
    checksum: str


class Shard(msgspec.Struct, frozen=True, gc=False):
    """One ``.bin`` and ``.idx`` pair, and what lies beside it.

    name: of the files, without suffix.
    bytes, index_bytes: their sizes.
    text_bytes: UTF-8 bytes of the documents.
    checksum, index_checksum: xxh3-64 of each file.
    block_checksums: xxh3-64 of every 64 MiB of the ``.bin`` file.
    mask: ``.mask``, one byte per token: 1 where it counts as a target, 0 where not; None where all count.
    origins: ``.source``, one little-endian uint32 per document: the number of its source; None where unknown.
    """

    name: str
    tokens: Count
    documents: Count
    bytes: Count
    index_bytes: Count
    text_bytes: Count
    largest_id: Count
    checksum: str
    block_checksums: list[str]
    index_checksum: str
    source: Source | None = None
    mask: Sidecar | None = None
    origins: Sidecar | None = None

    def files(self) -> dict[str, int]:
        """Every file of the shard by name, with its size."""
        sizes = {"bin": self.bytes, "idx": self.index_bytes}
        sizes |= {suffix: sidecar.bytes for suffix, sidecar in self.sidecars().items()}
        return {f"{self.name}.{suffix}": size for suffix, size in sizes.items()}

    def sidecars(self) -> dict[str, Sidecar]:
        """The sidecars there are, by their files' suffix."""
        return {suffix: one for suffix, one in (("mask", self.mask), ("source", self.origins)) if one is not None}


class Accounting(msgspec.Struct, frozen=True):
    """Where every document went: ``documents`` = ``written`` + the sum of ``skipped`` + ``failed``.

    skipped: by the name of the rule.
    blank_lines: lines that were no documents to begin with.
    """

    documents: Count = 0
    written: Count = 0
    skipped: dict[str, Count] = {}
    failed: Count = 0
    blank_lines: Count = 0

    def __add__(self, other: Accounting) -> Accounting:
        """The sums."""
        rules = sorted({*self.skipped, *other.skipped})
        return Accounting(
            self.documents + other.documents,
            self.written + other.written,
            {rule: self.skipped.get(rule, 0) + other.skipped.get(rule, 0) for rule in rules},
            self.failed + other.failed,
            self.blank_lines + other.blank_lines,
        )

    def balanced(self) -> bool:
        """Whether no document is missing."""
        return self.documents == self.written + sum(self.skipped.values()) + self.failed


class TokenizerRecord(msgspec.Struct, frozen=True):
    """What made the ids.

    parity_digest: of the texts on which the engine's ids were compared with the reference's, and of the ids.
    """

    fingerprint: str
    engine: str
    engine_version: str
    end_of_document_token: str = ""
    parity_digest: str = ""


class _Head(msgspec.Struct, frozen=True):
    """What decides whether the rest can be read."""

    format: Any = None
    version: Any = None


class Manifest(msgspec.Struct, frozen=True):
    """Everything known about a packed folder; ``shards`` in the order of their tokens."""

    dtype: str
    vocab_size: Count
    largest_id: Count
    end_of_document: Count
    tokens: Count
    documents: Count
    text_bytes: Count
    tokenizer: TokenizerRecord
    accounting: Accounting
    shards: list[Shard]
    producer: str
    options: dict[str, Any]
    inputs: list[Input] = []
    format: str = FORMAT
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """xxh3-64 over what decides the tokens and their order, wherever the folder lies and whatever made it."""
        digest = xxhash.xxh3_64(f"{self.dtype} {self.vocab_size} {self.end_of_document}".encode())
        for shard in self.shards:
            digest.update(f"\n{shard.tokens} {shard.checksum} {shard.index_checksum}".encode())
            if shard.mask is not None:
                digest.update(f" {shard.mask.checksum}".encode())
        return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit the folder: whole or not at all."""
    write_json(folder / FILE_NAME, msgspec.to_builtins(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``.

    Raises:
        DataError: the folder or the manifest is missing, damaged, of another version, or contradicts itself.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is no folder"
        raise DataError(f"{folder} {what}", hint="make one with `modalities-data pack INPUT.jsonl FOLDER`")
    with user_errors(path):
        content = path.read_bytes()
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
        _check_head(path, manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # Where even the head cannot be read, it is told what is wrong with the whole.
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            _check_head(path, msgspec.json.decode(content, type=_Head))
        raise DataError(f"{path} is damaged: {error}") from error
    _check(path, manifest)
    return manifest


def _check_head(path: Path, head: _Head | Manifest) -> None:
    """Refuse another format and a later version."""
    if head.format != FORMAT or not isinstance(head.version, int):
        raise DataError(f"{path}: expected format {FORMAT!r}, found {head.format!r}")
    if head.version > VERSION:
        raise DataError(
            f"{path}: written as version {head.version}, this program reads up to version {VERSION}",
            hint="update modalities-data",
        )


def _check(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest whose numbers contradict each other."""
    if manifest.dtype not in ("uint16", "int32"):
        raise DataError(f"{path}: dtype is uint16 or int32, found {manifest.dtype!r}")
    for name in ("tokens", "documents", "text_bytes"):
        total, summed = getattr(manifest, name), sum(getattr(shard, name) for shard in manifest.shards)
        if total != summed:
            raise DataError(f"{path}: {name} is {total}, but the shards add up to {summed}")
    if manifest.largest_id != (largest := max((shard.largest_id for shard in manifest.shards), default=0)):
        raise DataError(f"{path}: the largest id is {manifest.largest_id}, but the largest of a shard is {largest}")
    if manifest.largest_id >= manifest.vocab_size:
        raise DataError(f"{path}: the largest id, {manifest.largest_id}, is not below vocab_size {manifest.vocab_size}")
    if not manifest.accounting.balanced():
        raise DataError(f"{path}: documents are not what was written, skipped and failed: {manifest.accounting}")
