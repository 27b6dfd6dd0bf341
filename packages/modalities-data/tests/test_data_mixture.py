"""Mixtures and parts: every prefix has its share, every source gives each sample once per epoch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Dataset
from modalities_data.datasets import InMemoryDataset, LoremIpsumDataset, MixtureDataset, PartDataset


def source(number: int, samples: int, length: int = 3, dtype=np.uint16, **arguments) -> InMemoryDataset:
    """Sample i begins with number * 1000 + i."""
    tokens = np.zeros(samples * length + 1, dtype)
    tokens[:-1:length] = number * 1000 + np.arange(samples)
    return InMemoryDataset(tokens, length, **arguments)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(
        st.one_of(st.integers(1, 50), st.decimals("0.01", "1", places=2).map(float), st.floats(0.05, 3)),
        min_size=1, max_size=7,
    ),
    samples=st.integers(1, 3000),
)  # fmt: skip
def test_every_prefix_has_each_share_to_within_one_sample(weights, samples) -> None:
    mixture = MixtureDataset([source(number, 5) for number in range(len(weights))], weights, samples)
    assert len(mixture) == samples and sum(mixture.shares) == 1
    sources, positions = mixture.sources(np.arange(samples))
    total = sum(map(Fraction, map(str, weights)))
    for number, share in enumerate(mixture.shares):
        given_so_far = np.cumsum(sources == number)
        due = np.array([float(share * count) for count in range(1, samples + 1)])
        assert np.abs(given_so_far - due).max() < 1 + 1e-9
        assert np.array_equal(positions[sources == number], np.arange(given_so_far[-1]))
        assert abs(share - Fraction(str(weights[number])) / total) <= Fraction(1, 2**16)
    some = np.random.default_rng(0).integers(0, samples, 40)
    for ours, theirs in zip(mixture.sources(some), (sources[some], positions[some]), strict=True):
        assert np.array_equal(ours, theirs)


def test_decimal_weights_are_exact() -> None:
    sources = [source(number, 400) for number in range(3)]
    mixture = MixtureDataset(sources, [0.7, 0.2, 0.1], 1000)
    assert mixture.shares == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
    assert np.bincount(mixture.sources(np.arange(1000))[0]).tolist() == [700, 200, 100]
    assert mixture.epochs == (1.75, 0.5, 0.25)
    assert MixtureDataset(sources, [7, 2, 1], 1000).fingerprint == mixture.fingerprint
    # 400 samples at 0.7 of the whole: 571 in all before the first source starts over.
    assert len(MixtureDataset(sources, [0.7, 0.2, 0.1])) == 571


def test_each_epoch_of_a_source_takes_every_sample_once_in_another_order() -> None:
    mixture = MixtureDataset([source(0, 30), source(1, 10), source(2, 1000)], [0.5, 0.25, 0.25], 240, seed=3)
    assert isinstance(mixture, Dataset) and mixture.epochs == (4.0, 6.0, 0.06)
    firsts = mixture.gather(np.arange(240)).tokens[:, 0].astype(int)
    for number, size, epochs in ((0, 30, 4), (1, 10, 6)):
        of_source = firsts[firsts // 1000 == number].reshape(epochs, size)
        assert all(sorted(epoch) == [number * 1000 + place for place in range(size)] for epoch in of_source.tolist())
        assert len({tuple(epoch) for epoch in of_source.tolist()}) == epochs
    some = np.sort(firsts[firsts >= 2000] - 2000)
    assert len(set(some.tolist())) == 60 and some.max() > 600  # a random choice, not the first ones
    order = np.random.default_rng(0).permutation(240)
    assert np.array_equal(mixture.gather(order).tokens[:, 0], firsts[order])
    other = MixtureDataset([source(0, 30), source(1, 10), source(2, 1000)], [0.5, 0.25, 0.25], 240, seed=4)
    assert other.fingerprint != mixture.fingerprint
    assert not np.array_equal(other.gather(np.arange(240)).tokens[:, 0], firsts)


def test_sources_of_different_kinds_make_one_batch() -> None:
    plain = source(0, 20)
    masked = source(1, 20, mask=np.arange(61) % 2)
    separate = source(70, 20, dtype=np.int32, lengths=np.full(61, 1))
    mixture = MixtureDataset([plain, masked, separate], [1, 1, 1])
    assert mixture.largest_id == 70_019
    samples = mixture.gather(np.arange(6))
    sources = mixture.sources(np.arange(6))[0]
    assert samples.tokens.dtype == np.int32
    for row, number in enumerate(sources.tolist()):
        assert samples.tokens[row, 0] // 1000 == (0, 1, 70)[number]
        assert samples.weights[row].all() == (number != 1)
        assert samples.segments[row].tolist() == ([0, 1, 2] if number == 2 else [0, 0, 0])
    assert mixture.gather(np.array([], np.int64)).tokens.shape == (0, 4)
    assert MixtureDataset([plain], [1]).gather(np.arange(20)).weights is None
    for index in (-1, len(mixture)):
        with pytest.raises(IndexError):
            mixture.gather(np.array([index]))


def test_bytes_per_token_is_that_of_the_whole() -> None:
    two, four = source(0, 20, bytes_per_token=2.0), source(1, 20, bytes_per_token=4.0)
    assert MixtureDataset([two, four], [3, 1]).bytes_per_token == 2.5
    assert MixtureDataset([two, source(2, 20)], [3, 1]).bytes_per_token is None


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"weights": [1]}, "weights"),
        ({"weights": [1, 0]}, "weights"),
        ({"weights": [1, float("nan")]}, "weights"),
        ({"weights": [1, -2]}, "weights"),
        ({"weights": [1, 1e-7]}, "weights"),
        ({"datasets": [], "weights": []}, "weights"),
        ({"datasets": [source(0, 5), source(1, 5, length=4)]}, "datasets"),
        ({"samples": 0}, "samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_mixed(arguments, argument) -> None:
    with pytest.raises(ConfigError) as caught:
        MixtureDataset(**{"datasets": [source(0, 5), source(1, 5)], "weights": [1, 2], **arguments})
    assert caught.value.about[1] == argument


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 200), cut=st.floats(0.0, 1.0))
def test_parts_that_meet_share_nothing_and_miss_nothing(samples, cut) -> None:
    dataset = source(0, samples)
    parts = []
    for start, end in ((0.0, cut), (cut, 1.0)):
        try:
            parts.append(PartDataset(dataset, start, end))
        except ConfigError as error:
            assert start == end or "no sample" in error.message
    found = [part.gather(np.arange(len(part))).tokens[:, 0] for part in parts]
    assert np.concatenate(found).tolist() == list(range(samples))
    assert len({part.fingerprint for part in parts}) == len(parts)


def test_a_part_is_a_dataset() -> None:
    dataset = LoremIpsumDataset(16, 100)
    part = PartDataset(dataset, 0.9)
    assert isinstance(part, Dataset) and len(part) == 10
    assert np.array_equal(part.gather(np.array([0, 9])).tokens, dataset.gather(np.array([90, 99])).tokens)
    assert part.bytes_per_token == dataset.bytes_per_token and part.largest_id == 256
    for index in (-1, 10):
        with pytest.raises(IndexError):
            part.gather(np.array([index]))
    for start, end in ((0.5, 0.5), (-0.1, 1.0), (0.5, 1.5), (0.8, 0.2)):
        with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
            PartDataset(dataset, start, end)
    with pytest.raises(ConfigError, match="no sample of 100"):
        PartDataset(dataset, 0.0, 0.001)
