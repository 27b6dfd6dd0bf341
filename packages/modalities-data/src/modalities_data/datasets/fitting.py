"""Best-fit packing: documents into samples so that hardly any is cut and hardly any room is left.

Best-fit-decreasing takes documents from the longest to the shortest and puts each into the fullest sample it still fits
(arXiv:2404.10830). Documents of equal length are all alike to it, so it runs on the histogram of lengths: samples that
hold the same lengths are one pattern with a count, and a plan for any number of documents has a few thousand patterns.
Which documents a sample holds is then arithmetic on the documents sorted by length: four bytes each.

A document longer than a sample is cut into samples of its own, whole ones; what is left of it is placed like a
document. Pieces of a document share one token, so that each of its tokens but the first is once a target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from modalities_data.datasets.arrays import ranges

BEST_FIT_VERSION = 1
"""Counts up whenever the same lengths give another plan; part of every fingerprint."""
CHUNK = 1 << 20

Slot = tuple[int, int, int]
"""A length, how many pieces of it each sample of a pattern has, and the number of the first of them among its kind."""


@dataclass(frozen=True)
class Plan:
    """Which piece of which document lies in which sample; first the samples that are full of one document.

    sequence_length: T; a sample has room for T + 1 tokens.
    tokens: in all samples together, without padding.
    long_documents: (L,) the numbers of those longer than T.
    long_ends: (L,) how many full samples these and all before them make.
    pattern_ends: (P,) how many samples these patterns and all before them make.
    slot_firsts: (P + 1,) where each pattern's slots begin.
    slots: (S, 3) length, copies, first number.
    length_firsts: (T + 2,) where each length begins in ``by_length``.
    by_length: (items,) the documents that end in a piece of each length, in order of length.
    """

    sequence_length: int
    tokens: int
    long_documents: np.ndarray
    long_ends: np.ndarray
    pattern_ends: np.ndarray
    slot_firsts: np.ndarray
    slots: np.ndarray
    length_firsts: np.ndarray
    by_length: np.ndarray

    @property
    def full_samples(self) -> int:
        """Samples that are a piece of one long document."""
        return int(self.long_ends[-1]) if len(self.long_ends) else 0

    def __len__(self) -> int:
        """How many samples there are."""
        return self.full_samples + (int(self.pattern_ends[-1]) if len(self.pattern_ends) else 0)

    @property
    def fill(self) -> float:
        """The share of all samples' tokens that is not padding."""
        return self.tokens / (len(self) * (self.sequence_length + 1))

    def pieces(self, indices: np.ndarray, lengths_of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, ...]:
        """What samples hold, row by row and from left to right.

        Args:
            indices: (N,) int64 samples.
            lengths_of: gives the tokens of documents by their numbers.

        Returns:
            Row, document, first token within the document, and tokens of each piece.
        """
        rows = np.arange(len(indices))
        is_full = indices < self.full_samples
        full, packed = rows[is_full], rows[~is_full]
        number = np.searchsorted(self.long_ends, indices[full], side="right")
        before = np.concatenate([[0], self.long_ends])[number]
        starts = (indices[full] - before) * self.sequence_length
        width = np.full(len(full), self.sequence_length + 1)
        row, document, length = self._packed_pieces(packed, indices[packed] - self.full_samples)
        # A packed piece is the end of its document: all of it, or what the full samples left.
        start = lengths_of(document) - length
        found = (
            np.concatenate([full, row]),
            np.concatenate([self.long_documents[number], document]),
            np.concatenate([starts, start]),
            np.concatenate([width, length]),
        )
        order = np.argsort(found[0], kind="stable")
        return tuple(part[order] for part in found)

    def _packed_pieces(self, rows: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, document and tokens of each piece in samples that follow a pattern."""
        pattern = np.searchsorted(self.pattern_ends, samples, side="right")
        place = samples - np.concatenate([[0], self.pattern_ends])[pattern]
        first = self.slot_firsts[pattern]
        slots_of = self.slot_firsts[pattern + 1] - first
        slot = ranges(first, slots_of)
        length, copies, number = self.slots[slot].T
        number = number + np.repeat(place, slots_of) * copies
        row = np.repeat(np.repeat(rows, slots_of), copies)
        position = ranges(self.length_firsts[length] + number, copies)
        return row, self.by_length[position].astype(np.int64), np.repeat(length, copies)


def plan(lengths: Callable[[], Iterable[np.ndarray]], sequence_length: int) -> Plan:
    """Place all documents.

    Args:
        lengths: gives the tokens of each document, at least 1, in arrays of any size; called twice.
        sequence_length: T; a sample has room for T + 1 tokens.

    Returns:
        A plan that takes 4 bytes per document (8 beyond 2**32 of them) and 16 per document longer than a sample; making
        it takes 50 MB more.
    """
    counts = np.zeros(sequence_length + 1, np.int64)
    long_documents, long_pieces = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    documents = 0
    for part in _chunks(lengths()):
        items, long, pieces = _items(part, sequence_length)
        counts += np.bincount(items, minlength=sequence_length + 1)
        long_documents.append(documents + long)
        long_pieces.append(pieces)
        documents += len(part)
    counts[0] = 0
    long_ends = np.cumsum(np.concatenate(long_pieces))
    patterns = best_fit_decreasing(counts, sequence_length + 1)
    slots = [slot for _, of_pattern in patterns for slot in of_pattern]
    tokens = int(counts @ np.arange(len(counts)))
    tokens += (int(long_ends[-1]) if len(long_ends) else 0) * (sequence_length + 1)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    return Plan(
        sequence_length,
        tokens,
        np.concatenate(long_documents),
        long_ends,
        np.cumsum([number for number, _ in patterns], dtype=np.int64),
        np.cumsum([0, *(len(of_pattern) for _, of_pattern in patterns)], dtype=np.int64),
        np.array(slots, np.int64).reshape(-1, 3),
        firsts,
        _by_length(lengths, firsts, documents, sequence_length),
    )


def best_fit_decreasing(counts: np.ndarray, capacity: int) -> list[tuple[int, list[Slot]]]:
    """Patterns of samples, and how many samples follow each.

    Args:
        counts: how many pieces have each length; the index is the length, below ``capacity``.
        capacity: tokens a sample has room for.

    Returns:
        The same samples that best-fit-decreasing makes piece by piece, in some fixed order.
    """
    done: list[tuple[int, list[Slot]]] = []
    open_samples: dict[int, list[tuple[int, list[Slot]]]] = {}
    spaces: list[int] = []

    def put(space: int, number: int, slots: list[Slot]) -> None:
        if not space:
            done.append((number, slots))
            return
        of_space = open_samples.setdefault(space, [])
        if not of_space:
            insort(spaces, space)
        of_space.append((number, slots))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left, first = int(counts[length]), 0
        while left:
            place = bisect_left(spaces, length)
            if place < len(spaces):
                space = spaces[place]
                number, slots = open_samples[space].pop()
                if not open_samples[space]:
                    del spaces[place]
            else:
                space, slots = capacity, []
                number = -(-left // (capacity // length))
            # The sample just filled stays the fullest one, so it takes as many as fit before the next gets any.
            copies = space // length
            full = min(number, left // copies)
            if full:
                put(space - copies * length, full, [*slots, (length, copies, first)])
                first, left = first + full * copies, left - full * copies
            if full < number and left:
                put(space - left * length, 1, [*_from(slots, full), (length, left, first)])
                full, left = full + 1, 0
            if full < number:
                put(space, number - full, _from(slots, full))
    for space in spaces:
        done += open_samples[space]
    return done


def _from(slots: list[Slot], skipped: int) -> list[Slot]:
    """The slots of a pattern's samples without the first ``skipped`` of them."""
    return [(length, copies, first + skipped * copies) for length, copies, first in slots] if skipped else slots


def _items(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last piece of each document, 0 where full samples hold all of it; the long ones, and their full samples."""
    long = np.flatnonzero(lengths > sequence_length)
    pieces, rest = np.divmod(lengths[long] - 1, sequence_length)
    lengths[long] = np.where(rest > 0, rest + 1, 0)
    return lengths, long, pieces.astype(np.int64)


def _by_length(
    lengths: Callable[[], Iterable[np.ndarray]], firsts: np.ndarray, documents: int, sequence_length: int
) -> np.ndarray:
    """The documents in order of their last piece's length, those without one left out: a counting sort in chunks."""
    result = np.empty(int(firsts[-1]), np.uint32 if documents < 2**32 else np.int64)
    free = firsts[:-1].copy()
    # numpy sorts 16-bit integers by radix, several times faster than wider ones.
    narrow = np.uint16 if sequence_length < 2**16 else np.int32
    start = 0
    for part in _chunks(lengths()):
        items = _items(part, sequence_length)[0].astype(narrow)
        order = np.argsort(items, kind="stable")
        counts = np.bincount(items, minlength=sequence_length + 1)
        order, counts[0] = order[counts[0] :], 0
        order += start
        result[ranges(free, counts)] = order.astype(result.dtype)
        free += counts
        start += len(part)
    return result


def _chunks(parts: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Copies of the same numbers, some at a time and aligned, so that memory stays bounded."""
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield np.array(part[start : start + CHUNK])
