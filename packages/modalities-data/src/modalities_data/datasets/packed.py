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
        groups = self._by_shard(starts)
        tokens = self._rows(starts, groups, mask=False)
        check_ids(self._packed, tokens)
        weights = self._rows(starts, groups, mask=True)[:, 1:].astype(np.float32) if self._masked else None
        return Samples(tokens, weights, self._segments(starts, groups) if self._separate else None)

    def _by_shard(self, starts: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
        """Shards, each with the rows that start in it."""
        shards = np.searchsorted(self._ends, starts, side="right")
        if not len(shards):
            return []
        if (shards == shards[0]).all():
            return [(int(shards[0]), slice(None))]
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        return [(int(shards[rows[0]]), rows) for rows in np.split(order, cuts)]

    def _begin(self, shard: int) -> int:
        """The place of a shard's first token in the whole row."""
        return int(self._ends[shard - 1]) if shard else 0

    def _stored(self, shard: int, mask: bool) -> np.ndarray:
        """The tokens of a shard, or which of them count."""
        if not mask:
            return self._packed.tokens(shard)
        found = self._packed.mask(shard)
        return np.broadcast_to(np.uint8(1), self._packed.manifest.shards[shard].tokens) if found is None else found

    def _rows(self, starts: np.ndarray, groups: list[tuple[int, np.ndarray | slice]], mask: bool) -> np.ndarray:
        """(N, T + 1): the stored values from each start on."""
        width = self.sequence_length + 1
        result: np.ndarray | None = None
        for shard, rows in groups:
            stored = self._stored(shard, mask)
            places = starts[rows] - self._begin(shard)
            whole = int(places.max()) + width <= len(stored)
            if whole and isinstance(rows, slice) and stored.flags.c_contiguous:
                return windows(stored, width)[places]
            if result is None:
                result = np.empty((len(starts), width), np.uint8 if mask else self._packed.dtype)
            if whole and len(places) >= FEW and stored.flags.c_contiguous:
                result[rows] = windows(stored, width)[places]
                continue
            for row, place in zip(np.arange(len(starts))[rows].tolist(), places.tolist(), strict=True):
                part = stored[place : place + width]
                if len(part) == width:
                    result[row] = part
                else:
                    self._across_shards(shard, place, result[row], mask)
        return np.empty((0, width), np.uint8 if mask else self._packed.dtype) if result is None else result

    def _across_shards(self, shard: int, place: int, row: np.ndarray, mask: bool) -> None:
        """Fill ``row`` with the values from ``place`` of ``shard`` on, from as many shards as it takes."""
        filled = 0
        while filled < len(row):
            part = self._stored(shard, mask)[place : place + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            shard, place = shard + 1, 0

    def _segments(self, starts: np.ndarray, groups: list[tuple[int, np.ndarray | slice]]) -> np.ndarray:
        """(N, T) int32: from the document index, so an end-of-document id inside a text is no boundary."""
        length = self.sequence_length
        found = [np.empty(0, np.int64)]
        for first, rows_first in groups:
            shard, rows = first, np.arange(len(starts))[rows_first]
            while len(rows):
                begin = self._begin(shard)
                places = starts[rows] - begin
                documents = self._packed.documents_at(shard, np.maximum(places, 0))
                counts = self._packed.documents_at(shard, places + (length - 1)) - documents
                ends = self._packed.ends_of(shard, ranges(documents, counts))
                found.append(ends + np.repeat(rows * length - places, counts))
                if int(places.max()) + length <= int(self._ends[shard]) - begin:
                    break
                rows = rows[places + length > int(self._ends[shard]) - begin]
                shard += 1
        return segments(np.concatenate(found), len(starts), length)


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
