"""The order of samples: a bijection, as random as a shuffle, and the same for ever."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError
from modalities_data.order import ORDER_VERSION, ROUNDS, check_seed, permuted, shuffled

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's finalizer on Python integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def reference(place: int, samples: int, seed: int, epoch: int) -> int:
    """The same bijection, one place at a time, on Python integers of any size."""
    rows = 8
    while rows * rows < samples:
        rows = max(rows + 1, math.isqrt(samples - 1) + 1)
    columns = max(8, math.ceil(Fraction(samples, rows)))
    start = mix(mix(seed + GOLDEN & MASK) ^ epoch * GOLDEN & MASK)
    keys = [mix(start + GOLDEN * number & MASK) for number in range(1, ROUNDS + 1)]
    while True:
        row, column = divmod(place, columns)
        for turn, key in enumerate(keys):
            if turn % 2 == 0:
                row = (row + ((mix(column + key & MASK) >> 32) * rows >> 32)) % rows
            else:
                column = (column + ((mix(row + key & MASK) >> 32) * columns >> 32)) % columns
        place = row * columns + column
        if place < samples:
            return place


@pytest.mark.parametrize("samples", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 30_011])
def test_every_epoch_takes_every_sample_once(samples) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(permuted(np.arange(samples), samples, 5, epoch)), np.arange(samples))


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(1, 2**62), place=st.integers(0), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_vectorised_and_integer_arithmetic_agree(samples, place, seed, epoch) -> None:
    place %= samples
    assert permuted(np.array([place]), samples, seed, epoch).tolist() == [reference(place, samples, seed, epoch)]


def test_the_order_of_version_2_is_pinned() -> None:
    """A change here silently reorders the data of running jobs: count ORDER_VERSION up instead."""
    assert ORDER_VERSION == 2
    assert permuted(np.arange(10), 10, 0, 0).tolist() == [reference(place, 10, 0, 0) for place in range(10)]
    assert permuted(np.arange(10), 10, 0, 0).tolist() == PINNED_10
    assert permuted(np.arange(5), 10**12, 42, 3).tolist() == PINNED_LARGE


PINNED_10 = [1, 6, 0, 8, 5, 2, 9, 3, 4, 7]
PINNED_LARGE = [339444960567, 459907052180, 518896684518, 105970507766, 646116538458]


def test_positions_run_through_epochs() -> None:
    found = shuffled(np.arange(35), 10, 1)
    for epoch in range(3):
        assert found[epoch * 10 : epoch * 10 + 10].tolist() == permuted(np.arange(10), 10, 1, epoch).tolist()
    assert len({tuple(found[start : start + 10]) for start in (0, 10, 20)}) == 3
    some = np.array([34, 3, 12, 3])
    assert shuffled(some, 10, 1).tolist() == found[some].tolist()


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_permutation_of_four_is_equally_likely() -> None:
    """Chi-square over all 24 orders: 23 degrees of freedom, 99.9 % quantile 49.7."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(960):
        counts[tuple(permuted(np.arange(4), 4, seed, 0).tolist())] += 1
    assert sum((count - 40) ** 2 / 40 for count in counts.values()) < 49.7


def test_places_are_spread_evenly() -> None:
    """Where 16 cells of places go, in 16 cells of samples: 225 degrees of freedom, 99.9 % quantile 295."""
    samples, orders = 1600, 20
    table = np.zeros((16, 16))
    for seed in range(orders):
        np.add.at(table, (np.arange(samples) // 100, permuted(np.arange(samples), samples, seed, 1) // 100), 1)
    # Rows and columns are full by construction, so the variance is that of drawing without replacement.
    expected = orders * 100 * 100 / samples
    assert ((table - expected) ** 2 / expected).sum() < 295
    assert ((table - expected) ** 2 / expected).sum() > 150


def test_neighbours_are_not_correlated() -> None:
    """Serial correlation of a random order of n is 0 with deviation 1/sqrt(n); five deviations allowed."""
    samples = 50_000
    for seed, lag in itertools.product(range(4), (1, 2, 64)):
        order = permuted(np.arange(samples), samples, seed, 0).astype(float)
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / samples**0.5
        assert abs(np.corrcoef(order, np.arange(samples))[0, 1]) < 5 / samples**0.5
    first, second = (permuted(np.arange(samples), samples, 0, epoch).astype(float) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / samples**0.5


def test_fixed_points_are_as_rare_as_chance() -> None:
    """A random order has one fixed point on average (Poisson): 400 orders give 400 give or take 20."""
    fixed = sum(int((permuted(np.arange(300), 300, seed, 0) == np.arange(300)).sum()) for seed in range(400))
    assert 300 < fixed < 500


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_does_not_fit_is_refused(seed) -> None:
    with pytest.raises(ConfigError, match="a seed is"):
        check_seed(seed)


def test_a_handful_of_samples_asked_for_many_times() -> None:
    assert shuffled(np.arange(100), 1, 3).tolist() == [0] * 100
    assert shuffled(np.zeros(0, np.int64), 5, 3).tolist() == []
    assert permuted(np.arange(50) % 5, 5, 3, 7).tolist() == [reference(place % 5, 5, 3, 7) for place in range(50)]
