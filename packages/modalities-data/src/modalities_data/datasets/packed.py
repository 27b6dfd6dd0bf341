"""Continuous packing: one long row of tokens, with an end-of-document id after each document, cut into pieces.

Sample i is ``tokens[i * T : i * T + T + 1]``; neighbours share one token, so each token but the first is once a target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Samples
from modalities_data.datasets.arrays import check_length, checked, fingerprint, ranges, segments, windows
from modalities_data.packed import PackedFolder

Documents = Literal["joined", "separate"]
FEW = 6
"""Samples of one shard from which a strided view pays off over slices."""


class PackedDataset:
    """A packed folder cut into samples, across documents and shards.

    Where the folder has a mask, the samples have it as weights of their targets.

    Args:
        path: the packed folder, with its manifest.json.
        sequence_length: target tokens per sample.
        documents: ``joined``: a sample is one text, attention and positions run across the documents in it;
            ``separate``: samples tell where documents begin, so that a model keeps them apart. The tokens are the same.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(self, path: Path, sequence_length: int, documents: Documents = "joined") -> None:
        """Open the folder and check the sizes of its files.

        Raises:
            ConfigError: the sequence length is not positive, or ``documents`` is neither of its choices.
            DataError: the folder is damaged, or has too few tokens for one sample.
        """
        check_length(self, sequence_length)
        if documents not in get_args(Documents):
            raise ConfigError(f"documents is joined or separate, not {documents!r}", about=(self, "documents"))
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
        kind = "packed" if documents == "joined" else "packed separate"
        self.fingerprint = fingerprint(kind, manifest.fingerprint, sequence_length)
        self._separate = documents == "separate"
        self._masked = any(shard.mask is not None for shard in manifest.shards)
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)
        self._begins = np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        """Whole samples; the tokens of a last, shorter one are left out."""
        return (int(self._ends[-1]) - 1) // self.sequence_length

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1), uint16 or int32 as stored.

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a token id is larger than the manifest says, so the file is damaged.
        """
        starts = checked(indices, len(self)) * self.sequence_length
        shards = np.searchsorted(self._ends, starts, side="right")
        tokens = self._rows(starts, shards, mask=False)
        check_ids(self._packed, tokens)
        weights = self._rows(starts, shards, mask=True)[:, 1:].astype(np.float32) if self._masked else None
        return Samples(tokens, weights, self._segments(starts, shards) if self._separate else None)

    def _stored(self, shard: int, mask: bool) -> np.ndarray | None:
        """The tokens of a shard, or which of them count; None where all do."""
        return self._packed.mask(shard) if mask else self._packed.tokens(shard)

    def _rows(self, starts: np.ndarray, shards: np.ndarray, mask: bool) -> np.ndarray:
        """(N, T + 1): the stored values from each start on."""
        width = self.sequence_length + 1
        inside = starts + width <= self._ends[shards]
        places = starts - self._begins[shards]
        groups = _groups(shards)
        if len(groups) == 1 and inside.all() and (stored := self._stored(int(shards[0]), mask)) is not None:
            return windows(stored, width)[places]
        result = np.empty((len(starts), width), np.uint8 if mask else self._packed.dtype)
        one_by_one = [np.flatnonzero(~inside)]
        for rows in groups:
            if len(rows) < FEW:
                one_by_one.append(rows[inside[rows]])
                continue
            rows = rows if inside[rows].all() else rows[inside[rows]]
            stored = self._stored(int(shards[rows[0]]), mask) if len(rows) else None
            if stored is None:
                result[rows] = 1
            else:
                result[rows] = windows(stored, width)[places[rows]]
        rows = np.concatenate(one_by_one)
        for row, shard, place in zip(rows.tolist(), shards[rows].tolist(), places[rows].tolist(), strict=True):
            self._copy(shard, place, result[row], mask)
        return result

    def _copy(self, shard: int, place: int, row: np.ndarray, mask: bool) -> None:
        """Fill ``row`` with the values from ``place`` of ``shard`` on, from as many shards as it takes."""
        filled, width = 0, len(row)
        while filled < width:
            stored = self._stored(shard, mask)
            count = min(width - filled, self._packed.manifest.shards[shard].tokens - place)
            row[filled : filled + count] = 1 if stored is None else stored[place : place + count]
            filled += count
            shard, place = shard + 1, 0

    def _segments(self, starts: np.ndarray, shards: np.ndarray) -> np.ndarray:
        """(N, T) int32: from the document index, so an end-of-document id inside a text is no boundary."""
        length = self.sequence_length
        shift = np.arange(len(starts)) * length - starts
        document_ends = self._packed.document_ends()
        if document_ends is None:
            return segments(self._boundaries(starts, shards, shift), len(starts), length)
        first = np.searchsorted(document_ends, starts, side="right")
        counts = np.searchsorted(document_ends, starts + (length - 1), side="right") - first
        ends = document_ends[ranges(first, counts)]
        return segments(ends + np.repeat(shift, counts), len(starts), length)

    def _boundaries(self, starts: np.ndarray, shards: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Where further documents begin, read from the files, shard by shard."""
        length = self.sequence_length
        found = [np.empty(0, np.int64)]
        for rows in _groups(shards):
            shard = int(shards[rows[0]])
            while len(rows):
                begin = int(self._begins[shard])
                places = starts[rows] - begin
                documents = self._packed.documents_at(shard, np.maximum(places, 0))
                counts = self._packed.documents_at(shard, places + (length - 1)) - documents
                ends = self._packed.ends_of(shard, ranges(documents, counts)) + begin
                found.append(ends + np.repeat(shift[rows], counts))
                rows = rows[starts[rows] + length > self._ends[shard]]
                shard += 1
        return np.concatenate(found)


def _groups(shards: np.ndarray) -> list[np.ndarray]:
    """Rows that start in one shard, for each shard."""
    if not len(shards):
        return []
    order = np.argsort(shards, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)


def check_ids(packed: PackedFolder, tokens: np.ndarray) -> None:
    """Refuse ids that a model's vocabulary may lack.

    Raises:
        DataError: a token id is larger than the manifest says.
    """
    if tokens.size and (largest := int(tokens.max())) > packed.manifest.largest_id:
        raise DataError(
            f"{packed.folder}: found token id {largest}, the manifest says at most {packed.manifest.largest_id}",
            hint="the folder is damaged: see `modalities-data verify`",
        )
