"""Datasets in memory: from a program's own arrays, and made-up text."""

from __future__ import annotations

import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Samples
from modalities_data.datasets.arrays import (
    check_length,
    checked,
    fingerprint,
    first_and_last,
    segments_between,
    windows,
)
from modalities_data.lorem import LOREM_VERSION, lorem_document
from modalities_data.order import check_seed
from modalities_data.tokenizers.bytes import BytesTokenizer


class InMemoryDataset:
    """One long row of tokens, cut into samples like a packed folder's.

    Args:
        tokens: (tokens,) ids of any integer dtype, documents back to back with their ends; kept, not copied.
        sequence_length: target tokens per sample.
        mask: (tokens,) how much each token counts as a target; None where all count 1.
        lengths: (documents,) tokens of each document, where samples are to tell where documents begin.
        bytes_per_token: UTF-8 bytes of text per token, for bits per byte; None where unknown.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        mask: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        bytes_per_token: float | None = None,
    ) -> None:
        """Check the arrays.

        Raises:
            ConfigError: the sequence length is not positive.
            DataError: the arrays do not fit each other, or there are too few tokens for one sample.
        """
        check_length(self, sequence_length)
        tokens = np.ascontiguousarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (len(tokens) and int(tokens.min()) < 0):
            raise DataError(f"tokens are one row of ids from 0 on, not {tokens.dtype} of shape {tokens.shape}")
        if len(tokens) <= sequence_length:
            raise DataError(f"there are {len(tokens)} tokens, one sample takes {sequence_length + 1}")
        if mask is not None and np.shape(mask) != tokens.shape:
            raise DataError(f"the mask has shape {np.shape(mask)}, the tokens have {tokens.shape}")
        if lengths is not None and (int(np.sum(lengths)) != len(tokens) or int(np.min(lengths)) < 1):
            raise DataError(f"the documents' lengths are positive and add up to {len(tokens)}, not {np.sum(lengths)}")
        self._tokens = tokens
        self._mask = None if mask is None else np.ascontiguousarray(mask, np.float32)
        self._ends = None if lengths is None else np.cumsum(lengths, dtype=np.int64)
        self.sequence_length = sequence_length
        self.largest_id = int(tokens.max())
        self.bytes_per_token = bytes_per_token
        digest = xxhash.xxh3_64(tokens.data.cast("B"))
        for other in (self._mask, self._ends):
            digest.update(b"-" if other is None else other.data.cast("B"))
        self.fingerprint = fingerprint("memory", f"{tokens.dtype.str} {digest.hexdigest()}", sequence_length)

    def __len__(self) -> int:
        """Whole samples; the tokens of a last, shorter one are left out."""
        return (len(self._tokens) - 1) // self.sequence_length

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``: tokens (N, T + 1) as given.

        Raises:
            IndexError: an index is not in [0, len).
        """
        length = self.sequence_length
        starts = checked(indices, len(self)) * length
        weights = None if self._mask is None else windows(self._mask[1:], length)[starts]
        found = None
        if self._ends is not None:
            found = segments_between(self._ends, first_and_last(self._ends, starts, length), starts, length)
        return Samples(windows(self._tokens, length + 1)[starts], weights, found)


class LoremIpsumDataset(InMemoryDataset):
    """Made-up sentences as bytes, held in memory: learns fast, needs no file.

    Args:
        sequence_length: target tokens per sample; a token is a byte, the vocabulary has 257.
        samples: how many there are.
        seed: chooses the text, from 0 on.
    """

    def __init__(self, sequence_length: int, samples: int, seed: int = 0) -> None:
        """Write the text.

        Raises:
            ConfigError: an argument is out of range.
        """
        check_length(self, sequence_length)
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
        super().__init__(np.concatenate(parts)[:wanted], sequence_length, bytes_per_token=text_bytes / found)
        self.largest_id = tokenizer.vocab_size - 1
        self.fingerprint = fingerprint("lorem_ipsum", f"{LOREM_VERSION} {seed} {samples}", sequence_length)
