"""Parts of packed folders that begin and end with whole documents: what is held out is nowhere else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_data.datasets import BestFitDataset, PackedDataset, PartDataset
from modalities_data.datasets.documents import documents_between
from modalities_data.packed import PackedFolder

SIZES = (40, 3, 1, 80)
LENGTH = 8


@pytest.fixture(scope="module")
def folder(write_folder, tmp_path_factory) -> Path:
    """Four shards; every token of a document is the document's number, from 1, but for the 0 at its end."""
    rng = np.random.default_rng(0)
    numbers = iter(range(1, 1000))
    shards = [[[next(numbers)] * rng.integers(1, 40) + [0] for _ in range(size)] for size in SIZES]
    return write_folder(tmp_path_factory.mktemp("documents") / "x", shards)


def document_starts(folder: Path) -> list[int]:
    packed = PackedFolder(folder)
    return np.cumsum([0, *(len(packed.document(number)) for number in range(sum(SIZES)))]).tolist()


def held(dataset) -> set[int]:
    """The documents that a dataset has tokens of."""
    samples = dataset.gather(np.arange(len(dataset)))
    return set(np.unique(samples.tokens).tolist()) - {0}


FRACTION = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))


@settings(max_examples=200, deadline=None)
@given(cuts=st.lists(FRACTION, min_size=2, max_size=5, unique=True))
def test_parts_are_the_documents_that_begin_between(folder, cuts) -> None:
    packed, starts = PackedFolder(folder), document_starts(folder)
    for start, end in pairwise(sorted(cuts)):
        first, behind = (round(fraction * starts[-1]) for fraction in (start, end))
        expected = [number for number in range(sum(SIZES)) if first <= starts[number] < behind]
        if not expected:
            with pytest.raises(ConfigError, match=f"none of {sum(SIZES)} documents begins between"):
                documents_between(packed, start, end, packed)
            continue
        found = documents_between(packed, start, end, packed)
        assert list(range(found.first_document, found.behind_document)) == expected
        assert (found.first_token, found.behind_token) == (starts[expected[0]], starts[expected[-1] + 1])


@pytest.mark.parametrize("kind", [PackedDataset, BestFitDataset])
@pytest.mark.parametrize("cut", [0.03, 0.5, 0.777, 0.9])
def test_no_document_is_in_two_parts(folder, kind, cut) -> None:
    train, held_out, whole = kind(folder, LENGTH, end=cut), kind(folder, LENGTH, start=cut), kind(folder, LENGTH)
    assert not held(train) & held(held_out)
    assert len({train.fingerprint, held_out.fingerprint, whole.fingerprint}) == 3
    assert kind(folder, LENGTH, end=cut).fingerprint == train.fingerprint
    assert kind(folder, LENGTH, start=0.0, end=1.0).fingerprint == whole.fingerprint
    if kind is BestFitDataset:
        assert held(train) | held(held_out) == held(whole)
    else:
        assert len(whole) - 2 <= len(train) + len(held_out) <= len(whole)
        together = [part.gather(np.arange(len(part))).tokens for part in (train, held_out)]
        rows = {tuple(row) for row in whole.gather(np.arange(len(whole))).tokens.tolist()}
        assert all(tuple(row) in rows for row in np.concatenate(together).tolist())


def test_parts_of_samples_do_share_a_document_which_is_why_there_are_parts_of_documents(folder) -> None:
    whole = PackedDataset(folder, LENGTH)
    shared = [
        held(PartDataset(whole, end=cut)) & held(PartDataset(whole, start=cut)) for cut in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert any(shared)


@pytest.mark.parametrize("kind", [PackedDataset, BestFitDataset])
def test_segments_and_indices_of_a_part_are_its_own(folder, kind) -> None:
    more = {"documents": "separate"} if kind is PackedDataset else {}
    part = kind(folder, LENGTH, start=0.6, **more)
    samples = part.gather(np.arange(len(part)))
    for tokens, segments in zip(samples.tokens[:, :-1], samples.segments, strict=True):
        for before, after, one, other in zip(tokens, tokens[1:], segments, segments[1:], strict=False):
            assert other - one in (0, 1)
            assert (before == 0 and after != 0) == (other > one) or not before | after
    with pytest.raises(IndexError):
        part.gather(np.array([len(part)]))
    with pytest.raises(IndexError):
        part.gather(np.array([-1]))


@pytest.mark.parametrize("kind", [PackedDataset, BestFitDataset])
def test_parts_out_of_range_or_empty(folder, kind) -> None:
    for start, end in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.9, 0.1), (float("nan"), 0.5)):
        with pytest.raises(ConfigError, match="a part is 0 <= start < end <= 1"):
            kind(folder, LENGTH, start=start, end=end)
    with pytest.raises(ConfigError, match="none of 124 documents begins between the fractions 0.99999 and 1.0"):
        kind(folder, LENGTH, start=0.99999)


def test_a_part_without_a_whole_sample(folder) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens between the fractions 0.5 and 0.52, .* no sample of 201"):
        PackedDataset(folder, 200, start=0.5, end=0.52)
