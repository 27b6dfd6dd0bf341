"""Datasets against plain slices of the whole row of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Dataset
from modalities_data.datasets import LoremIpsumDataset, PackedDataset
from modalities_data.lorem import lorem_document
from modalities_data.manifest import read_manifest
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_jsonl):
    """Some 40 shards of 40 to 400 tokens, and one of many more."""
    root = tmp_path_factory.mktemp("dataset")
    texts = [lorem_document(1, number)[: 7 * number] for number in range(1, 60)]
    texts.append("".join(lorem_document(1, number) for number in range(10)))
    pack(write_jsonl(root / "x.jsonl", texts), root / "corpus", BytesTokenizer(), workers=1, range_bytes=100)
    return root / "corpus"


def row(folder) -> np.ndarray:
    return np.concatenate([np.fromfile(folder / f"{shard.name}.bin", "<u2") for shard in read_manifest(folder).shards])


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), data=st.data())
def test_samples_are_consecutive_pieces_across_documents_and_shards(folder, length, data) -> None:
    dataset, tokens = PackedDataset(folder, length), row(folder)
    assert len(dataset) == (len(tokens) - 1) // length
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=20))
    samples = dataset.gather(np.array(indices, np.int64))
    assert samples.tokens.dtype == np.uint16 and samples.weights is None
    assert samples.tokens.shape == (len(indices), length + 1)
    for index, sample in zip(indices, samples.tokens, strict=True):
        assert np.array_equal(sample, tokens[index * length : index * length + length + 1])


def test_each_token_but_the_first_is_once_a_target(folder) -> None:
    dataset, tokens = PackedDataset(folder, 64), row(folder)
    targets = dataset.gather(np.arange(len(dataset))).tokens[:, 1:].ravel()
    assert np.array_equal(targets, tokens[1 : len(targets) + 1])
    assert len(tokens) - 1 - len(targets) < 64


def test_what_a_run_has_to_know(folder) -> None:
    dataset = PackedDataset(folder, 64)
    assert isinstance(dataset, Dataset)
    tokens = row(folder)
    assert dataset.largest_id == int(tokens.max()) == 256
    text = int((tokens != 256).sum())
    assert dataset.bytes_per_token == pytest.approx(text / len(tokens))
    assert dataset.fingerprint == PackedDataset(folder, 64).fingerprint != PackedDataset(folder, 65).fingerprint


def test_too_few_tokens_for_one_sample(tmp_path, write_jsonl) -> None:
    pack(write_jsonl(tmp_path / "x.jsonl", ["abc"]), tmp_path / "out", BytesTokenizer(), workers=1)
    assert len(PackedDataset(tmp_path / "out", 3)) == 1
    with pytest.raises(DataError, match="has 4 tokens, one sample takes 5"):
        PackedDataset(tmp_path / "out", 4)
    with pytest.raises(ConfigError, match="sequence_length is at least 1"):
        PackedDataset(tmp_path / "out", 0)


def test_indices_out_of_range_are_refused(folder) -> None:
    for dataset in (PackedDataset(folder, 64), LoremIpsumDataset(16, 5)):
        assert dataset.gather(np.array([], np.int64)).tokens.shape == (0, dataset.sequence_length + 1)
        for index in (-1, len(dataset)):
            with pytest.raises(IndexError):
                dataset.gather(np.array([0, index]))


def test_an_id_above_the_largest_is_found_before_a_model_sees_it(tmp_path, write_jsonl) -> None:
    pack(write_jsonl(tmp_path / "x.jsonl", ["abc"]), tmp_path / "out", BytesTokenizer(), workers=1)
    path = tmp_path / "out" / "00000.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match="found token id 65535, the manifest says at most 256"):
        PackedDataset(tmp_path / "out", 3, verify="none").gather(np.array([0]))


def test_lorem_ipsum_is_the_generated_text() -> None:
    dataset = LoremIpsumDataset(sequence_length=50, samples=40, seed=3)
    assert isinstance(dataset, Dataset) and len(dataset) == 40 and dataset.largest_id == 256
    samples = dataset.gather(np.arange(40)).tokens
    tokens = np.concatenate([samples[0, :1], samples[:, 1:].ravel()])
    text = "".join(lorem_document(3, number) + "\0" for number in range(10)).encode()[:2001]
    assert bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)) == text
    assert (tokens == 256).sum() == text.count(b"\0") > 0
    prints = {LoremIpsumDataset(*given).fingerprint for given in [(50, 40, 3), (50, 40, 4), (50, 41, 3), (51, 40, 3)]}
    assert len(prints) == 4 and dataset.fingerprint in prints
    assert 0.99 < dataset.bytes_per_token < 1


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"seed": -1}, {"sequence_length": 0}])
def test_lorem_ipsum_arguments_out_of_range(arguments) -> None:
    with pytest.raises(ConfigError) as caught:
        LoremIpsumDataset(**{"sequence_length": 8, "samples": 2, **arguments})
    assert caught.value.about[1] == next(iter(arguments))
