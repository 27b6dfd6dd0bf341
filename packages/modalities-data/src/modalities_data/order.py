"""The order of samples: a pure function (seed, epoch, position) -> sample, in constant memory.

A Feistel network over the next power of four is a bijection whatever its round function is (Luby and Rackoff, 1988);
cycle walking (Black and Rogaway, 2002) restricts it to [0, samples). Nothing is stored and nothing iterates, so any
rank finds any sample of any epoch at once, and a resumed run goes on by arithmetic alone.
"""

from __future__ import annotations

import numpy as np

from modalities_core.errors import ConfigError

ORDER_VERSION = 1
"""Counts up whenever the same seed gives another order; part of every run's data fingerprint."""

ROUNDS = 6
SMALLEST_HALF_BITS = 3
"""With fewer bits the network reaches too few permutations of a handful of samples."""
LARGEST_SAMPLES = 2**62

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def check_seed(seed: int, about: object | tuple[object, str] | None = None) -> None:
    """Refuse a seed the order cannot hold.

    Raises:
        ConfigError: it is negative or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"a seed is a whole number from 0 to 2**63 - 1, not {seed}", about=about)


def shuffled(positions: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """The samples at ``positions`` of an endless run over the data, reshuffled in every epoch.

    Args:
        positions: (N,) int64, global sample numbers from 0 on; epoch e holds e * samples to (e + 1) * samples.
        samples: how many there are, 1 to 2**62.
        seed: 0 to 2**63 - 1.

    Returns:
        (N,) int64, each in [0, samples); every epoch takes every sample exactly once.
    """
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), np.int64(samples))
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        result[of_epoch] = permuted(places[of_epoch], samples, seed, int(epoch))
    return result


def permuted(places: np.ndarray, samples: int, seed: int, epoch: int) -> np.ndarray:
    """The images of ``places`` under the bijection of [0, samples) that belongs to ``seed`` and ``epoch``.

    Args:
        places: (N,) int64, each in [0, samples).
        samples: the size of the set.
        seed: chooses the family of orders.
        epoch: chooses the order.

    Returns:
        (N,) int64.
    """
    assert 0 < samples <= LARGEST_SAMPLES
    half = max(SMALLEST_HALF_BITS, ((samples - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = np.asarray(places).astype(np.uint64)
    limit = np.uint64(samples)
    outside = np.arange(len(values))
    while len(outside):
        walked = _feistel(values[outside], keys, half)
        values[outside] = walked
        outside = outside[walked >= limit]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """One pass of the network over [0, 4**half_bits)."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on uint64, modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """(ROUNDS, 1) uint64: SplitMix64 started from a mix of seed and epoch."""
    start = _mix(np.array([seed], np.uint64) + _GOLDEN)
    start = _mix(start ^ (np.array([epoch], np.uint64) * _GOLDEN))
    return _mix(start + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))[:, None]
