"""The order of samples: a pure function (seed, epoch, position) -> sample, in constant memory.

A Feistel network over a grid of about [0, samples) cells is a bijection whatever its round function is (Luby and
Rackoff, 1988; with unequal sides and modular sums: Black and Rogaway, 2002); walking on from the few cells outside
restricts it to [0, samples). Nothing is stored and nothing iterates, so any rank finds any sample of any epoch at once,
and a resumed run goes on by arithmetic alone.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np

from modalities_core.errors import ConfigError

ORDER_VERSION = 2
"""Counts up whenever the same seed gives another order; part of every run's data fingerprint."""

ROUNDS = 6
"""Even, so that both halves end in their own places."""
SMALLEST_SIDE = 8
"""On a smaller grid the network reaches too few permutations of a handful of samples."""
LARGEST_SAMPLES = 2**62

_HALF = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


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
    positions = np.asarray(positions, dtype=np.int64)
    if not len(positions):
        return positions.copy()
    low, high = int(positions.min()) // samples, int(positions.max()) // samples
    if low == high:  # the usual case: one epoch, no division by element
        return permuted(positions - low * samples, samples, seed, low)
    epochs, places = np.divmod(positions, np.int64(samples))
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
    if len(places) > samples:  # a handful of samples, asked for many times over
        return permuted(np.arange(samples), samples, seed, epoch)[places]
    sides = _sides(samples)
    keys = _round_keys(seed, epoch)
    values = np.asarray(places).astype(np.uint64)
    limit = np.uint64(samples)
    outside: np.ndarray | slice = slice(None)
    while True:
        walked = _feistel(values[outside], keys, sides)
        values[outside] = walked
        beyond = np.flatnonzero(walked >= limit)
        if not len(beyond):
            return values.astype(np.int64)
        outside = beyond if isinstance(outside, slice) else outside[beyond]


@lru_cache(maxsize=256)
def _sides(samples: int) -> tuple[int, int]:
    """The sides of the grid: as square as can be, so that fewer than one row lies outside."""
    left = max(SMALLEST_SIDE, isqrt(samples - 1) + 1)
    return left, max(SMALLEST_SIDE, -(-samples // left))


def _feistel(values: np.ndarray, keys: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """One pass of the network over [0, sides[0] * sides[1]): the halves take turns in being moved by the other."""
    size, other = np.uint64(sides[0]), np.uint64(sides[1])
    moved = values // other
    fixed = values - moved * other
    for key in keys:
        shift = _mix(fixed + key)
        # The upper 32 bits, scaled: an even choice from [0, size) without a division.
        shift >>= _HALF
        shift *= size
        shift >>= _HALF
        moved += shift
        # Below size nothing is taken off: the difference then wraps round to a huge number.
        np.minimum(moved, moved - size, out=moved)
        moved, fixed = fixed, moved
        size, other = other, size
    moved *= other
    moved += fixed
    return moved


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on uint64, modulo 2**64."""
    values = values ^ (values >> _SHIFT_1)
    values *= _MIX_1
    values ^= values >> _SHIFT_2
    values *= _MIX_2
    values ^= values >> _SHIFT_3
    return values


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """(ROUNDS, 1) uint64: SplitMix64 started from a mix of seed and epoch."""
    start = _mix(np.array([seed], np.uint64) + _GOLDEN)
    start = _mix(start ^ (np.array([epoch], np.uint64) * _GOLDEN))
    keys = _mix(start + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))[:, None]
    keys.flags.writeable = False
    return keys
