"""What datasets share: checks of their arguments, views of token rows, and document boundaries as arrays.

Shape suffixes: N samples, T tokens.
"""

from __future__ import annotations

import numpy as np
import xxhash

from modalities_core.errors import ConfigError
from modalities_data.rows import checked as checked


def windows(tokens: np.ndarray, width: int) -> np.ndarray:
    """(len - width + 1, width): every piece of ``width`` tokens, as a view; indexing it is the fastest gather."""
    step = tokens.strides[0]
    return np.ndarray((len(tokens) - width + 1, width), tokens.dtype, tokens.data, 0, (step, step))


def check_length(owner: object, sequence_length: int) -> None:
    """Refuse a sequence length that is not positive.

    Raises:
        ConfigError: about the argument of that name.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is at least 1, not {sequence_length}", about=(owner, "sequence_length"))


def fingerprint(kind: str, content: str, sequence_length: int) -> str:
    """xxh3-64 of what decides the samples."""
    return xxhash.xxh3_64_hexdigest(f"{kind}\n{content}\n{sequence_length}".encode())


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``starts[0], starts[0] + 1, ...`` for ``counts[0]`` numbers, and so on: all ranges back to back."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def first_and_last(ends: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(N, 2) int64: the documents of the first and of the last input of samples; arguments as ``segments_between``."""
    return np.stack([ends.searchsorted(starts, "right"), ends.searchsorted(starts + (length - 1), "right")], 1)


def segments_between(ends: np.ndarray, documents: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The number of each input's document within its sample, for samples of consecutive tokens.

    Args:
        ends: (documents,) int64, behind the last token of each, in order.
        documents: (N, 2) int64, what ``first_and_last`` gives.
        starts: (N,) int64, the first token of each sample.
        length: T.

    Returns:
        (N, T) int32, rising from 0 in each row.
    """
    samples = len(starts)
    first, last = documents.T
    counts = last - first + 1
    behind = counts.cumsum()
    begins = behind - counts
    numbers = np.arange(int(counts.sum()))
    numbers -= begins.repeat(counts)
    # Where each document begins in all samples back to back; the first one of a row begins with the row.
    places = np.arange(samples) * length
    before = (first - 1).repeat(counts)
    before += numbers
    edges = np.empty(len(numbers) + 1, np.int64)
    edges[:-1] = ends[before]
    edges[:-1] += (places - starts).repeat(counts)
    edges[begins] = places
    edges[-1] = samples * length
    # One run per document: several times cheaper than counting up along the tokens.
    return numbers.astype(np.int32).repeat(edges[1:] - edges[:-1]).reshape(samples, length)


def segments(boundaries: np.ndarray, samples: int, length: int) -> np.ndarray:
    """The number of each input's document within its sample.

    Args:
        boundaries: (boundaries,) int64 in any order, sample * length + the input a further document begins with,
            which is in [1, length).
        samples: N.
        length: T.

    Returns:
        (N, T) int32, rising from 0 in each row.
    """
    rows = np.arange(samples + 1) * length
    edges = np.sort(np.concatenate([boundaries, rows]))
    firsts = np.searchsorted(edges, rows)
    numbers = np.arange(len(edges) - 1) - np.repeat(firsts[:-1], np.diff(firsts))
    # One run per document: several times cheaper than counting up along the tokens.
    return np.repeat(numbers.astype(np.int32), np.diff(edges)).reshape(samples, length)
