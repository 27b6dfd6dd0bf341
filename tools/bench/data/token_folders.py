"""The same tokens in each loader's own format, and folders of sparse files that only look as large as they say."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

VOCABULARY = 50_000
END = 0
MEAN_DOCUMENT = 600
SHARDS = 16
"""Of the ``sharded`` folder: what packing as many tokens makes by default, more or less."""


def make(folder: Path, tokens: int, seed: int = 0) -> np.ndarray:
    """Write ``tokens`` random uint16 ids as documents of log-normal length, once, and return them, mapped.

    ``packed`` is ours (and Megatron-LM's), ``sharded`` the same in 16 shards, ``tokens.pbin`` the original's,
    ``datatrove/tokens.ds`` datatrove's.
    """
    if not (folder / "done").is_file() or not (folder / "sharded").is_dir():
        _write(folder, tokens, seed)
        (folder / "done").touch()
    return np.memmap(folder / "packed" / "00000.bin", "<u2", "r")


def _write(folder: Path, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = _lengths(random, tokens)
    ids = random.integers(1, VOCABULARY, int(lengths.sum()), np.uint16)
    ends = np.cumsum(lengths)
    ids[ends - 1] = END
    for name in ("packed", "sharded", "datatrove"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_ours(folder / "packed", ids, lengths, 1)
    _write_ours(folder / "sharded", ids, lengths, SHARDS)
    ids.tofile(folder / "datatrove" / "tokens.ds")
    ends.astype("<u8").tofile(folder / "datatrove" / "tokens.ds.index")
    with (folder / "tokens.pbin").open("wb") as stream:
        stream.write(_pbin_header(ids.nbytes))
        ids.tofile(stream)
        stream.write(pickle.dumps([]))  # its continuous dataset does not read the list of documents


def _lengths(random: np.random.Generator, tokens: int) -> np.ndarray:
    """Document lengths with their end that add up to ``tokens``."""
    drawn = random.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, 2 * tokens // MEAN_DOCUMENT + 100).astype(np.int64) + 2
    ends = np.cumsum(drawn)
    count = int(np.searchsorted(ends, tokens))
    assert count < len(drawn)
    lengths = drawn[: count + 1]
    lengths[-1] -= int(ends[count]) - tokens
    return lengths


def _pbin_header(data_bytes: int) -> bytes:
    return struct.pack("<QI", data_bytes, 2)


def _write_ours(folder: Path, ids: np.ndarray, lengths: np.ndarray, shards: int) -> None:
    from modalities_core.files import checksum
    from modalities_data.packed import writing_shard

    made = []
    first = 0
    for number, part in enumerate(np.array_split(lengths, shards)):
        name, behind = f"{number:05d}", first + int(part.sum())
        with writing_shard(folder, name, "uint16") as writer:
            writer.append(ids[first:behind], part.astype(np.int64), text_bytes=4 * (behind - first))
        made.append(writer.shard(checksum(folder / f"{name}.idx")))
        first = behind
    _write_manifest(folder, made)


def _write_manifest(folder: Path, shards: list) -> None:
    from modalities_data.manifest import Accounting, Manifest, TokenizerRecord, write_manifest

    documents = sum(shard.documents for shard in shards)
    manifest = Manifest(
        dtype="uint16", vocab_size=VOCABULARY, end_of_document=END,
        largest_id=max(shard.largest_id for shard in shards),
        tokens=sum(shard.tokens for shard in shards), documents=documents,
        text_bytes=sum(shard.text_bytes for shard in shards), tokenizer=TokenizerRecord("bench", "none", ""),
        accounting=Accounting(documents, documents), shards=shards, producer="bench", options={},
    )  # fmt: skip
    write_manifest(folder, manifest)


def make_sparse(folder: Path, tokens: int, shards: int) -> None:
    """Folders that claim ``tokens`` tokens and take next to no disk: ``packed``, ``tokens.pbin``, ``datatrove``."""
    from modalities_data.manifest import Shard
    from modalities_data.megatron_index import index_bytes
    from modalities_data.packed import CHECKSUM_BLOCK

    for name in ("packed", "datatrove"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(shards):
        count = tokens * (number + 1) // shards - tokens * number // shards
        documents = max(1, count // MEAN_DOCUMENT)
        name, size, index_size = f"{number:05d}", 2 * count, index_bytes(documents)
        _sparse(folder / "packed" / f"{name}.bin", size)
        _sparse(folder / "packed" / f"{name}.idx", index_size)
        checksums = ["0" * 16] * -(-size // CHECKSUM_BLOCK)
        made.append(
            Shard(name, count, documents, size, index_size, 4 * count, VOCABULARY - 1, "0" * 16, checksums, "0" * 16)
        )
    _write_manifest(folder / "packed", made)
    _sparse(folder / "datatrove" / "tokens.ds", 2 * tokens)
    _sparse(folder / "tokens.pbin", 12 + 2 * tokens, _pbin_header(2 * tokens))


def _sparse(path: Path, size: int, start: bytes = b"") -> None:
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)
