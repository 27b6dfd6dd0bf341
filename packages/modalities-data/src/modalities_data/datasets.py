"""Datasets: fixed, indexable sets of equally long samples, without torch.

Samples of continuous packing cut one long row of tokens, with an end-of-document id after each document, into pieces:
sample i is ``tokens[i * T : i * T + T + 1]``; neighbours share one token, so each token but the first is once a target.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Samples
from modalities_data.lorem import LOREM_VERSION, lorem_document
from modalities_data.order import check_seed
from modalities_data.packed import PackedFolder
from modalities_data.tokenizers.bytes import BytesTokenizer


class PackedDataset:
    """A packed folder cut into samples, across documents and shards.

    Args:
        path: the packed folder, with its manifest.json.
        sequence_length: target tokens per sample.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(self, path: Path, sequence_length: int) -> None:
        """Open the folder and check the sizes of its files.

        Raises:
            ConfigError: the sequence length is not positive.
            DataError: the folder is damaged, or has too few tokens for one sample.
        """
        _check_length(self, sequence_length)
        self._packed = PackedFolder(Path(path))
        manifest = self._packed.manifest
        if manifest.tokens <= sequence_length:
            raise DataError(
                f"{path} has {manifest.tokens} tokens, one sample takes {sequence_length + 1}",
                hint="pack more text, or choose a shorter sequence_length",
                about=(self, "sequence_length"),
            )
        self.sequence_length = sequence_length
        self.largest_id = manifest.largest_id
        self.bytes_per_token = manifest.text_bytes / manifest.tokens or None  # 0: converted, unknown
        self.fingerprint = _fingerprint("packed", manifest.fingerprint, sequence_length)
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)

    def __len__(self) -> int:
        """Whole samples; the tokens of a last, shorter one are left out."""
        return (int(self._ends[-1]) - 1) // self.sequence_length

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1), uint16 or int32 as stored.

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a token id is larger than the manifest says, so the file is damaged.
        """
        starts = _checked(indices, len(self)) * self.sequence_length
        shards = np.searchsorted(self._ends, starts, side="right")
        width = self.sequence_length + 1
        tokens = np.empty((len(starts), width), self._packed.dtype)
        for shard in np.unique(shards):
            stored = self._packed.tokens(int(shard))
            rows = np.flatnonzero(shards == shard)
            places = starts[rows] - (self._ends[shard] - len(stored))
            inside = places + width <= len(stored)
            if inside.any():
                tokens[rows[inside]] = _windows(stored, width)[places[inside]]
            for row in rows[~inside]:
                self._across_shards(int(starts[row]), tokens[row])
        if tokens.size and (largest := int(tokens.max())) > self.largest_id:
            raise DataError(
                f"{self._packed.folder}: found token id {largest}, the manifest says at most {self.largest_id}",
                hint="the folder is damaged: see `modalities-data verify`",
            )
        return Samples(tokens)

    def _across_shards(self, start: int, row: np.ndarray) -> None:
        """Fill ``row`` with the tokens from ``start`` on, from as many shards as it takes."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(row):
            stored = self._packed.tokens(shard)
            place = start + filled - (int(self._ends[shard]) - len(stored))
            part = stored[place : place + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1


class LoremIpsumDataset:
    """Made-up sentences as bytes, held in memory: learns fast, needs no file.

    Args:
        sequence_length: target tokens per sample; a token is a byte, the vocabulary has 257.
        samples: how many there are.
        seed: chooses the text, from 0 on.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(self, sequence_length: int, samples: int, seed: int = 0) -> None:
        """Write the text.

        Raises:
            ConfigError: an argument is out of range.
        """
        _check_length(self, sequence_length)
        if samples < 1:
            raise ConfigError(f"samples is at least 1, not {samples}", about=(self, "samples"))
        check_seed(seed, about=(self, "seed"))
        tokenizer = BytesTokenizer()
        wanted = samples * sequence_length + 1
        parts: list[np.ndarray] = []
        found = text_bytes = 0
        while found < wanted:
            ids = tokenizer.encode(lorem_document(seed, len(parts)))
            parts.append(np.array([*ids, tokenizer.end_of_document], np.uint16))
            found += len(ids) + 1
            text_bytes += len(ids)
        self._tokens = np.concatenate(parts)[:wanted]
        self._samples = samples
        self.sequence_length = sequence_length
        self.largest_id = tokenizer.vocab_size - 1
        self.bytes_per_token = text_bytes / found
        self.fingerprint = _fingerprint("lorem_ipsum", f"{LOREM_VERSION} {seed} {samples}", sequence_length)

    def __len__(self) -> int:
        """How many samples there are."""
        return self._samples

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1) uint16.

        Raises:
            IndexError: an index is not in [0, len).
        """
        starts = _checked(indices, self._samples) * self.sequence_length
        return Samples(_windows(self._tokens, self.sequence_length + 1)[starts])


def _windows(tokens: np.ndarray, width: int) -> np.ndarray:
    """(len - width + 1, width): every piece of ``width`` tokens, as a view; indexing it is the fastest gather."""
    step = tokens.strides[0]
    shape = (len(tokens) - width + 1, width)
    return np.lib.stride_tricks.as_strided(tokens, shape, (step, step), writeable=False)


def _checked(indices: np.ndarray, samples: int) -> np.ndarray:
    """``indices`` as int64, each in [0, samples)."""
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < samples:
        raise IndexError(f"sample indices are in [0, {samples}), found {indices.min()} to {indices.max()}")
    return indices


def _check_length(owner: object, sequence_length: int) -> None:
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is at least 1, not {sequence_length}", about=(owner, "sequence_length"))


def _fingerprint(kind: str, content: str, sequence_length: int) -> str:
    return xxhash.xxh3_64_hexdigest(f"{kind}\n{content}\n{sequence_length}".encode())
