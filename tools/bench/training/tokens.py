"""Tokens to train on: frequencies of ranks as in natural text (Zipf), so that the loss falls from ln V at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

END = 0
DOCUMENT = 600
SMALL_VOCABULARY = 65_500
"""Below it ids are stored as uint16, as Megatron-LM does."""


def make(cache: Path, vocabulary: int, count: int) -> Path:
    """A packed dataset of ``count`` ids below ``vocabulary``, made once; its tokens are raw in ``00000.bin``."""
    folder = cache / f"zipf-{vocabulary}-{count}"
    if not (folder / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, _draw(vocabulary, count), vocabulary)
    return folder


def _draw(vocabulary: int, count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, vocabulary)
    ids = 1 + np.searchsorted(np.cumsum(weights) / weights.sum(), random.random(count))
    ids[DOCUMENT - 1 :: DOCUMENT] = END
    ids[-1] = END
    # Ranks are spread over the ids, for nothing may depend on frequent ids being neighbours.
    spread = np.concatenate([[END], 1 + random.permutation(vocabulary - 1)])
    return spread[np.minimum(ids, vocabulary - 1)]


def _write(folder: Path, ids: np.ndarray, vocabulary: int) -> None:
    from modalities_core.files import checksum
    from modalities_data.manifest import Accounting, Manifest, TokenizerRecord, write_manifest
    from modalities_data.packed import writing_shard

    dtype = "uint16" if vocabulary < SMALL_VOCABULARY else "int32"
    lengths = np.diff(np.concatenate([[0], np.flatnonzero(ids == END) + 1])).astype(np.int64)
    with writing_shard(folder, "00000", dtype) as writer:
        writer.append(ids.astype(dtype), lengths, text_bytes=4 * len(ids))
    shard = writer.shard(checksum(folder / "00000.idx"))
    manifest = Manifest(
        dtype=dtype, vocab_size=vocabulary, end_of_document=END, largest_id=shard.largest_id, tokens=shard.tokens,
        documents=shard.documents, text_bytes=shard.text_bytes, tokenizer=TokenizerRecord("bench", "none", ""),
        accounting=Accounting(shard.documents, shard.documents), shards=[shard], producer="bench", options={},
    )  # fmt: skip
    write_manifest(folder, manifest)
