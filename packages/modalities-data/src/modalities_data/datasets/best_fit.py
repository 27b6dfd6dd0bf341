"""Best-fit packing of a packed folder's documents: few are cut, none is lost, and samples are nearly full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modalities_core.errors import DataError
from modalities_core.interfaces import Samples
from modalities_data.datasets.arrays import check_length, checked, fingerprint, segments
from modalities_data.datasets.documents import documents_between
from modalities_data.datasets.fitting import BEST_FIT_VERSION, plan
from modalities_data.datasets.packed import check_ids
from modalities_data.packed import FILES_AT_ONCE, PackedFolder
from modalities_data.verification import Verification, Verify


class BestFitDataset:
    """Whole documents, put together so that they fill samples; only documents longer than a sample are cut.

    Samples tell where documents begin. A target counts if it belongs to the same document as its input, so the first
    token of a document and the padding at a sample's end do not; a folder's mask applies on top. Opening it plans all
    documents: about 0.05 microseconds and four bytes of memory for each.

    Args:
        path: the packed folder, with its manifest.json.
        sequence_length: target tokens per sample.
        start: take only the documents that begin from this fraction of the tokens on, from 0.0.
        end: and before this one, up to 1.0; parts that meet share no document, such as what is held out and the rest.
        verify: ``background``: check every checksum once, beside the work, and stop at the next samples if one is
            wrong; ``none``: leave that to the command of this name.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None
    fill: float
    """The share of all samples' tokens that is not padding."""

    def __init__(
        self, path: Path, sequence_length: int, start: float = 0.0, end: float = 1.0, verify: Verify = "background"
    ) -> None:
        """Open the folder and place its documents.

        Raises:
            ConfigError: the sequence length is not positive, ``verify`` is neither of its choices, or no document
                begins between ``start`` and ``end``.
            DataError: the folder or one of its indices is damaged.
        """
        check_length(self, sequence_length)
        self._packed = PackedFolder(Path(path), FILES_AT_ONCE)
        manifest = self._packed.manifest
        if not manifest.documents:
            raise DataError(f"{path} has no documents")
        part = documents_between(self._packed, start, end, self)
        self._first, self._behind = part.first_document, part.behind_document
        self._plan = plan(self._lengths, sequence_length)
        self.sequence_length = sequence_length
        self.largest_id = manifest.largest_id
        self.bytes_per_token = manifest.text_bytes / manifest.tokens or None  # 0: converted, unknown
        whole = (self._first, self._behind) == (0, manifest.documents)
        content = manifest.fingerprint if whole else f"{manifest.fingerprint} {self._first} {self._behind}"
        self.fingerprint = fingerprint(f"best_fit {BEST_FIT_VERSION}", content, sequence_length)
        self._verification = Verification(self._packed, verify, self)
        self.fill = self._plan.fill
        self._masked = any(shard.mask is not None for shard in manifest.shards)

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._plan)

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1), uint16 or int32 as stored, with weights and segments.

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a token id or a checksum is not what the manifest says, so the file is damaged.
        """
        self._verification.check()
        indices = checked(indices, len(self))
        samples, length = len(indices), self.sequence_length
        rows, documents, starts, lengths = self._plan.pieces(indices, self._lengths_of)
        filled = np.cumsum(lengths) - lengths
        first_of_row = np.searchsorted(rows, np.arange(samples))
        columns = filled - filled[first_of_row][rows] if len(rows) else filled
        tokens = np.full((samples, length + 1), self._packed.manifest.end_of_document, self._packed.dtype)
        mask = np.zeros((samples, length + 1), np.uint8) if self._masked else None
        places = rows * (length + 1) + columns
        self._copy(tokens, mask, places, documents, starts, lengths)
        check_ids(self._packed, tokens)
        ends = columns + lengths
        if mask is None:
            # Where the padding begins: behind the last piece of each row.
            room = np.zeros(samples, np.int64)
            room[rows] = ends
            mask = np.arange(length + 1) < room[:, None]
        # The first token of a piece is no target: what comes before it is another document.
        mask.reshape(-1)[places] = 0
        # Where the next piece begins: for the last one, where the padding does.
        boundaries = (rows * length + ends)[ends < length]
        return Samples(tokens, mask[:, 1:].astype(np.float32), segments(boundaries, samples, length))

    def _copy(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        places: np.ndarray,
        documents: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Copy each piece to its place among all samples' tokens, and which of its tokens count."""
        flat, flat_mask = tokens.reshape(-1), None if mask is None else mask.reshape(-1)
        shards, local = self._packed.locate(documents + self._first)
        for shard in np.unique(shards).tolist():
            of_shard = np.flatnonzero(shards == shard)
            stored, stored_mask = self._packed.tokens(shard), self._packed.mask(shard)
            index = self._packed.kept_index(shard)
            firsts = index.pointers[local[of_shard]] // self._packed.dtype.itemsize + starts[of_shard]
            pieces = zip(places[of_shard].tolist(), firsts.tolist(), lengths[of_shard].tolist(), strict=True)
            for place, first, length in pieces:
                flat[place : place + length] = stored[first : first + length]
                if flat_mask is not None:
                    flat_mask[place : place + length] = (
                        1 if stored_mask is None else stored_mask[first : first + length]
                    )

    def _lengths(self) -> Iterator[np.ndarray]:
        """The tokens of each document of the part, shard by shard."""
        behind = 0
        for number, shard in enumerate(self._packed.manifest.shards):
            before, behind = behind, behind + shard.documents
            if behind <= self._first or before >= self._behind:
                continue
            lengths = self._packed.index(number).lengths
            if int(lengths.sum(dtype=np.int64)) != shard.tokens or int(lengths.min()) < 1:
                raise DataError(
                    f"{self._packed.folder / shard.name}.idx: the documents' lengths do not add up to {shard.tokens}",
                    hint="the folder is damaged: see `modalities-data verify`",
                )
            yield lengths[max(0, self._first - before) : self._behind - before]

    def _lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """The tokens of each of ``documents``, (N,) int64."""
        result = np.empty(len(documents), np.int64)
        shards, local = self._packed.locate(documents + self._first)
        for shard in np.unique(shards).tolist():
            of_shard = shards == shard
            result[of_shard] = self._packed.kept_index(shard).lengths[local[of_shard]]
        return result
