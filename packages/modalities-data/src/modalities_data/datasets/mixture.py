"""Mixtures of datasets in exact proportions.

Which source a sample comes from follows one period, written down once: after any number of samples each source has had
its share to within one sample. Such an order always exists (R. Tijdeman, The chairman assignment problem, 1980), and
taking the source whose next sample is due first finds it (S. K. Baruah et al., Proportionate progress, 1996).
"""

from __future__ import annotations

import heapq
import math
from fractions import Fraction

import numpy as np
import xxhash

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Dataset, Samples
from modalities_data.datasets.arrays import checked
from modalities_data.order import ORDER_VERSION, check_seed, shuffled

MIXTURE_VERSION = 1
"""Counts up whenever the same weights give another order; part of every fingerprint."""
LONGEST_PERIOD = 2**16


class MixtureDataset:
    """Samples of several datasets in turn, each as often as its weight says, shuffled within each source.

    After any number of samples, each source has had its share to within one. A source that has more samples than its
    share gives a random choice of them; one that has fewer starts over, in another order each time: ``epochs`` tells
    how often each is gone through. Take ``samples`` for the whole run, and read them in order with
    ``batches.in_order`` to keep the proportions exact in every step.

    Args:
        datasets: the sources, all of one sequence length.
        weights: how many samples of each, relative to the others, such as [0.7, 0.2, 0.1]. Weights whose shares have
            no common denominator up to 65,536 are rounded to multiples of 1/65,536.
        samples: how many samples there are; by default as many as no source has to start over for.
        seed: chooses the order within the sources, from 0 on.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None
    epochs: tuple[float, ...]
    """How often each source is gone through in ``samples``."""
    shares: tuple[Fraction, ...]
    """What each source has of the whole."""

    def __init__(
        self, datasets: list[Dataset], weights: list[float], samples: int | None = None, seed: int = 0
    ) -> None:
        """Lay down the period.

        Raises:
            ConfigError: the datasets do not fit together, or a weight, the count or the seed is out of range.
        """
        check_seed(seed, about=(self, "seed"))
        if not datasets or len(datasets) != len(weights):
            raise ConfigError(f"{len(datasets)} datasets, but {len(weights)} weights", about=(self, "weights"))
        if len({dataset.sequence_length for dataset in datasets}) > 1:
            lengths = ", ".join(str(dataset.sequence_length) for dataset in datasets)
            raise ConfigError(f"the datasets differ in sequence length: {lengths}", about=(self, "datasets"))
        self.image_shape = getattr(datasets[0], "image_shape", None)
        if any(getattr(dataset, "image_shape", None) != self.image_shape for dataset in datasets):
            raise ConfigError(
                "of the datasets some have images and others none, or images of another size",
                hint="mix only datasets whose images have one size",
                about=(self, "datasets"),
            )
        if samples is not None and samples < 1:
            raise ConfigError(f"samples is at least 1, not {samples}", about=(self, "samples"))
        counts = _counts(self, weights)
        period = sum(counts)
        self.shares = tuple(Fraction(count, period) for count in counts)
        self._source, self._rank = _period(counts)
        self._counts, self._datasets, self._seed = counts, datasets, seed
        if samples is None:
            samples = min(len(dataset) * period // count for dataset, count in zip(datasets, counts, strict=True))
        if samples < 1:
            raise ConfigError("there is no sample that no source has to start over for", about=(self, "samples"))
        self._samples = samples
        self.epochs = tuple(
            float(share * samples / len(dataset)) for share, dataset in zip(self.shares, datasets, strict=True)
        )
        self.sequence_length = datasets[0].sequence_length
        self.largest_id = max(dataset.largest_id for dataset in datasets)
        known = [dataset.bytes_per_token for dataset in datasets]
        self.bytes_per_token = None if None in known else float(
            sum(share * Fraction(value) for share, value in zip(self.shares, known, strict=True) if value is not None)
        )  # fmt: skip
        order = f"mixture {MIXTURE_VERSION} {ORDER_VERSION} {seed} {samples}\n{counts}\n"
        prints = "\n".join(f"{dataset.fingerprint} {len(dataset)}" for dataset in datasets)
        self.fingerprint = xxhash.xxh3_64_hexdigest(f"{order}{prints}".encode())

    def __len__(self) -> int:
        """How many samples there are."""
        return self._samples

    def sources(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each sample comes from, and how many that source has given before it; each (N,) int64.

        Raises:
            IndexError: an index is not in [0, len).
        """
        periods, places = np.divmod(checked(indices, self._samples), len(self._source))
        source = self._source[places].astype(np.int64)
        return source, periods * np.array(self._counts, np.int64)[source] + self._rank[places]

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``; weights and segments where any source has them.

        Raises:
            IndexError: an index is not in [0, len).
        """
        source, position = self.sources(indices)
        parts: list[tuple[np.ndarray, Samples]] = []
        for number in np.unique(source).tolist() or [0]:
            rows = np.flatnonzero(source == number)
            dataset = self._datasets[number]
            # Sources of one size would otherwise all be shuffled alike.
            chosen = shuffled(position[rows], len(dataset), (self._seed + number * 0x9E3779B9) % 2**63)
            parts.append((rows, dataset.gather(chosen)))
        return joined_samples(parts, len(source))


def joined_samples(parts: list[tuple[np.ndarray, Samples]], samples: int) -> Samples:
    """Samples of several datasets as one: each part goes to its rows; targets without weights count 1."""
    if len(parts) == 1:
        return parts[0][1]
    length = parts[0][1].tokens.shape[1] - 1
    dtype = np.result_type(*(part.tokens.dtype for _, part in parts))
    tokens = np.empty((samples, length + 1), dtype)
    weighted = any(part.weights is not None for _, part in parts)
    segmented = any(part.segments is not None for _, part in parts)
    weights = np.ones((samples, length), np.float32) if weighted else None
    segments = np.zeros((samples, length), np.int32) if segmented else None
    first = parts[0][1].images
    images = None if first is None else np.empty((samples, *first.shape[1:]), np.uint8)
    for rows, part in parts:
        tokens[rows] = part.tokens
        if weights is not None and part.weights is not None:
            weights[rows] = part.weights
        if segments is not None and part.segments is not None:
            segments[rows] = part.segments
        if images is not None:
            images[rows] = part.images
    return Samples(tokens, weights, segments, images)


def _counts(owner: object, weights: list[float]) -> list[int]:
    """How many samples of each source a period has, by largest remainder where the shares are no simple fractions."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"weights are positive numbers, not {weights}", about=(owner, "weights"))
    # Through the decimal notation: 0.1 is then a tenth, and not the nearest binary fraction.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
    counts = [int(share * period) for share in shares]
    remainders = [share * period - count for share, count in zip(shares, counts, strict=True)]
    for number in sorted(range(len(weights)), key=lambda number: -remainders[number])[: period - sum(counts)]:
        counts[number] += 1
    if not all(counts):
        raise ConfigError(
            f"a weight is below {1 / LONGEST_PERIOD:.0e} of the whole: {weights[counts.index(0)]}",
            hint="leave that dataset out, or give it more weight",
            about=(owner, "weights"),
        )
    return counts


def _period(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample of a period, and how many samples of that source come before it in the period.

    The m-th sample of a source is free once its share has passed m - 1, and due when the share reaches m.
    """
    period = sum(counts)
    source, rank = np.empty(period, np.int32), np.empty(period, np.int64)
    given = [0] * len(counts)
    waiting = [(0, number) for number in range(len(counts))]
    due: list[tuple[int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            number = heapq.heappop(waiting)[1]
            heapq.heappush(due, (-(-(given[number] + 1) * period // counts[number]), number))
        number = heapq.heappop(due)[1]
        source[place], rank[place] = number, given[number]
        given[number] += 1
        # Places count from 0, samples from 1: the first place behind this share is the share rounded down.
        heapq.heappush(waiting, (given[number] * period // counts[number], number))
    assert given == counts
    return source, rank
