"""Continuous packing: one long row of tokens, with an end-of-document id after each document, cut into pieces.

Sample i is ``tokens[i * T : i * T + T + 1]``; neighbours share one token, so each token but the first is once a target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Samples
from modalities_data.datasets.arrays import (
    check_length,
    fingerprint,
    first_and_last,
    ranges,
    segments,
    segments_between,
)
from modalities_data.datasets.documents import documents_between
from modalities_data.packed import FILES_AT_ONCE, PackedFolder
from modalities_data.rows import checked
from modalities_data.verification import Verification, Verify

Documents = Literal["joined", "separate"]
TABLE_SAMPLES = 1 << 22
"""For how many samples a table of their documents is kept, 16 bytes each; with more they are searched for."""
UNSIGNED = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


class PackedDataset:
    """A packed folder cut into samples, across documents and shards.

    Where the folder has a mask, the samples have it as weights of their targets.

    Args:
        path: the packed folder, with its manifest.json.
        sequence_length: target tokens per sample.
        documents: ``joined``: a sample is one text, attention and positions run across the documents in it;
            ``separate``: samples tell where documents begin, so that a model keeps them apart. The tokens are the same.
        start: take only the documents that begin from this fraction of the tokens on, from 0.0.
        end: and before this one, up to 1.0; parts that meet share no document, such as what is held out and the rest.
        verify: ``background``: check every checksum once, beside the work, and stop at the next samples if one is
            wrong; ``none``: leave that to the command of this name.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(
        self,
        path: Path,
        sequence_length: int,
        documents: Documents = "joined",
        start: float = 0.0,
        end: float = 1.0,
        verify: Verify = "background",
    ) -> None:
        """Open the folder and check the sizes of its files.

        Raises:
            ConfigError: the sequence length is not positive, ``documents`` or ``verify`` is none of its choices, or no
                document begins between ``start`` and ``end``.
            DataError: the folder is damaged, or has too few tokens for one sample.
        """
        check_length(self, sequence_length)
        if documents not in get_args(Documents):
            raise ConfigError(f"documents is joined or separate, not {documents!r}", about=(self, "documents"))
        self._packed = PackedFolder(Path(path), FILES_AT_ONCE)
        manifest = self._packed.manifest
        if manifest.tokens <= sequence_length:
            raise DataError(
                f"{path} has {manifest.tokens} tokens, one sample takes {sequence_length + 1}",
                hint="pack more text, or choose a shorter sequence_length",
                about=(self, "sequence_length"),
            )
        part = documents_between(self._packed, start, end, self)
        # Samples are those of the whole; one that holds a token of a document of another part is in neither.
        self._first = -(-part.first_token // sequence_length)
        self._count = max(0, (part.behind_token - 1) // sequence_length - self._first)
        self._whole = (part.first_token, part.behind_token) == (0, manifest.tokens)
        if not self._count:
            raise DataError(
                f"{path} has {part.behind_token - part.first_token} tokens between the fractions {start} and {end}, "
                f"which hold no sample of {sequence_length + 1}",
                hint="take a larger part, or choose a shorter sequence_length",
                about=(self, "end"),
            )
        self.sequence_length = sequence_length
        self.largest_id = manifest.largest_id
        self.bytes_per_token = manifest.text_bytes / manifest.tokens or None  # 0: converted, unknown
        kind = "packed" if documents == "joined" else "packed separate"
        content = manifest.fingerprint if self._whole else f"{manifest.fingerprint} {self._first} {self._count}"
        self.fingerprint = fingerprint(kind, content, sequence_length)
        self._verification = Verification(self._packed, verify, self)
        self._separate = documents == "separate"
        self._documents: np.ndarray | None = None
        self._tokens = self._packed.rows(sequence_length, sequence_length + 1)
        masked = any(shard.mask is not None for shard in manifest.shards)
        self._masks = self._packed.mask_rows(sequence_length, sequence_length + 1) if masked else None
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)
        self._begins = np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        """Whole samples; the tokens of a last, shorter one are left out."""
        return self._count

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1), uint16 or int32 as stored.

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a file has not the size or the checksum the manifest says, or a token id is larger than it says.
        """
        indices = np.asarray(indices, np.int64) if self._whole else checked(indices, self._count) + self._first
        self._packed.raise_damage()
        self._verification.check()
        tokens = self._tokens.gather(indices)
        check_ids(self._packed, tokens)
        weights = None if self._masks is None else self._masks.gather(indices)[:, 1:].astype(np.float32)
        return Samples(tokens, weights, self._segments(indices) if self._separate else None)

    def _segments(self, indices: np.ndarray) -> np.ndarray:
        """(N, T) int32: from the document index, so an end-of-document id inside a text is no boundary."""
        length = self.sequence_length
        starts = indices * length
        document_ends = self._packed.document_ends()
        if document_ends is None:
            return segments(self._boundaries(starts), len(starts), length)
        if len(self._tokens) > TABLE_SAMPLES:
            return segments_between(document_ends, first_and_last(document_ends, starts, length), starts, length)
        if self._documents is None:
            self._documents = first_and_last(document_ends, np.arange(len(self._tokens)) * length, length)
        return segments_between(document_ends, self._documents[indices], starts, length)

    def _boundaries(self, starts: np.ndarray) -> np.ndarray:
        """Where further documents begin, read from the files, shard by shard."""
        length = self.sequence_length
        shards = np.searchsorted(self._ends, starts, side="right")
        shift = np.arange(len(starts)) * length - starts
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
    flat = tokens.reshape(-1)
    # Without its sign a negative id is a huge one, so one pass finds both.
    unsigned = flat.view(UNSIGNED[flat.itemsize])
    if flat.size and int(np.maximum.reduce(unsigned)) > packed.manifest.largest_id:
        raise DataError(
            f"{packed.folder}: found token id {flat[unsigned.argmax()]}, "
            f"the manifest says at most {packed.manifest.largest_id}",
            hint="the folder is damaged: see `modalities-data verify`",
        )
