"""Sidecars, document boundaries and masks against a document-by-document reading."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_data import packed as packed_module
from modalities_data.datasets import BestFitDataset, InMemoryDataset, PackedDataset
from modalities_data.datasets import packed as packed_dataset_module
from modalities_data.datasets.fitting import best_fit_decreasing
from modalities_data.manifest import Accounting, Manifest, Shard, TokenizerRecord, read_manifest, write_manifest
from modalities_data.megatron_index import index_bytes, write_index
from modalities_data.packed import PackedFolder, verify

SIZES = (30, 200, 3, 120)


@pytest.fixture(scope="module")
def content():
    """Four shards; the end-of-document id, 0, occurs inside documents too. One shard has no mask."""
    rng = np.random.default_rng(0)
    shards = [[np.r_[rng.integers(0, 500, rng.geometric(0.08)), 0] for _ in range(size)] for size in SIZES]
    masks = [[rng.integers(0, 2, len(document)) for document in documents] for documents in shards]
    return shards, [masks[0], masks[1], None, masks[3]]


@pytest.fixture(scope="module", params=["table", "searched", "in the file"])
def folder(request, content, write_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in the file":
            patch.setattr(packed_module, "ENDS_BYTES", 0)
        if request.param == "searched":
            patch.setattr(packed_dataset_module, "TABLE_SAMPLES", 0)
        yield write_folder(tmp_path_factory.mktemp("boundaries") / "x", *content)


def flat(content):
    """The whole row: tokens, document of each token, and mask."""
    documents = [document for shard in content[0] for document in shard]
    masks = [
        np.ones(len(document)) if mask is None else mask[number]
        for shard, mask in zip(*content, strict=True)
        for number, document in enumerate(shard)
    ]
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    return np.concatenate(documents), numbers, np.concatenate(masks)


@pytest.mark.parametrize("length", [1, 2, 13, 64, 500])
def test_segments_are_the_documents_of_the_index(folder, content, length) -> None:
    tokens, numbers, masks = flat(content)
    dataset = PackedDataset(folder, length, documents="separate")
    joined = PackedDataset(folder, length)
    indices = np.random.default_rng(1).permutation(len(dataset))[:200]
    samples, plain = dataset.gather(indices), joined.gather(indices)
    assert samples.segments.dtype == np.int32 and samples.segments.shape == (len(indices), length)
    assert plain.segments is None and np.array_equal(plain.tokens, samples.tokens)
    for row, index in enumerate(indices.tolist()):
        start = index * length
        of_inputs = numbers[start : start + length]
        assert np.array_equal(samples.tokens[row], tokens[start : start + length + 1])
        assert np.array_equal(samples.segments[row], of_inputs - of_inputs[0])
        for found in (samples, plain):
            assert np.array_equal(found.weights[row], masks[start + 1 : start + length + 1])
    assert samples.weights.dtype == np.float32
    assert dataset.fingerprint != joined.fingerprint
    assert dataset.gather(np.array([], np.int64)).segments.shape == (0, length)


def test_in_memory_gives_the_same(folder, content) -> None:
    tokens, numbers, masks = flat(content)
    packed = PackedDataset(folder, 40, documents="separate")
    dataset = InMemoryDataset(tokens, 40, masks, np.bincount(numbers), bytes_per_token=2.0)
    assert len(dataset) == len(packed) and dataset.largest_id == packed.largest_id
    indices = np.random.default_rng(2).integers(0, len(packed), 30)
    for ours, theirs in zip(dataset.gather(indices), packed.gather(indices), strict=True):
        assert np.array_equal(ours, theirs)
    plain = InMemoryDataset(tokens, 40)
    assert plain.gather(indices)[1:] == (None, None, None)
    assert plain.fingerprint != dataset.fingerprint != InMemoryDataset(tokens[1:], 40).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.zeros(5)}, "one row of ids"),
        ({"tokens": np.zeros((5, 2), int)}, "one row of ids"),
        ({"tokens": np.full(5, -1)}, "from 0 on"),
        ({"tokens": np.arange(4)}, "there are 4 tokens, one sample takes 5"),
        ({"mask": np.ones(4)}, "the mask has shape"),
        ({"lengths": np.array([3, 3])}, "add up to 5, not 6"),
    ],
)
def test_arrays_that_do_not_fit(arguments, message) -> None:
    with pytest.raises(DataError, match=message):
        InMemoryDataset(**{"tokens": np.arange(5), "sequence_length": 4, **arguments})


def test_documents_is_one_of_two_words(folder) -> None:
    with pytest.raises(ConfigError, match="joined or separate, not 'apart'") as caught:
        PackedDataset(folder, 4, documents="apart")
    assert caught.value.about[1] == "documents"


def test_sidecars_are_in_the_manifest_and_verified(folder, content, tmp_path) -> None:
    shards = read_manifest(folder).shards
    assert [sorted(shard.sidecars()) for shard in shards] == [["mask", "source"]] * 2 + [[]] + [["mask", "source"]]
    for shard in shards:
        assert {name: (folder / name).stat().st_size for name in shard.files()} == shard.files()
    opened = PackedFolder(folder)
    assert opened.mask(2) is None and opened.origins(2) is None
    assert np.array_equal(opened.mask(1), np.concatenate(content[1][1]))
    assert np.array_equal(opened.origins(1), np.arange(SIZES[1]))
    verify(folder)
    for name in ("00001.mask", "00001.source"):
        damaged = shutil.copytree(folder, tmp_path / name)
        data = bytearray((damaged / name).read_bytes())
        data[7] ^= 2
        (damaged / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: expected checksum"):
            verify(damaged)
        (damaged / name).write_bytes(data[:-1])
        with pytest.raises(DataError, match=rf"{name}: the manifest expects {len(data)} bytes"):
            PackedFolder(damaged)
        (damaged / name).unlink()
        with pytest.raises(DataError, match=rf"{name} is missing"):
            PackedFolder(damaged)


def test_another_mask_is_another_dataset(content, write_folder, tmp_path) -> None:
    shards, masks = content
    masks = [masks[0], [1 - mask for mask in masks[1]], None, masks[3]]
    prints = {
        read_manifest(write_folder(tmp_path / str(number), shards, given)).fingerprint
        for number, given in enumerate([content[1], masks, None])
    }
    assert len(prints) == 3


def test_a_shard_that_fails_leaves_no_sidecar(tmp_path) -> None:
    with pytest.raises(RuntimeError), packed_module.writing_shard(tmp_path, "a", "uint16", mask=True) as writer:
        writer.append(np.zeros(4, np.uint32), np.array([4]), 0, np.ones(4))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def naive_best_fit(lengths, capacity):
    """Piece by piece: each into the fullest sample it fits, the longest first."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 40), st.lists(st.integers(1, 40), max_size=120))
def test_patterns_are_those_of_best_fit_decreasing(capacity, lengths) -> None:
    lengths = [length for length in lengths if length < capacity]
    patterns = best_fit_decreasing(np.bincount(lengths, minlength=capacity), capacity)
    found = [
        capacity - sum(length * copies for length, copies, _ in slots)
        for number, slots in patterns
        for _ in range(number)
    ]
    assert sorted(found) == naive_best_fit(lengths, capacity)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 64, 1000])
def test_best_fit_holds_every_document_once(folder, content, length) -> None:
    dataset = BestFitDataset(folder, length)
    documents = [document for shard in content[0] for document in shard]
    _, _, masks = flat(content)
    starts = np.cumsum([0, *map(len, documents)])
    samples = dataset.gather(np.arange(len(dataset)))
    pieces: dict[tuple[int, ...], int] = {}
    for tokens, weights, segments in zip(*samples[:3], strict=True):
        of_tokens = np.r_[segments, segments[-1]]  # the last target's segment shows in its weight only
        cuts = np.flatnonzero(np.diff(of_tokens)) + 1
        assert np.array_equal(np.diff(of_tokens)[cuts - 1], np.ones(len(cuts)))
        assert not weights[cuts - 1].any()
        for part in np.split(tokens, cuts):
            pieces[tuple(part.tolist())] = pieces.get(tuple(part.tolist()), 0) + 1
    # Weighted targets are every token but the first of its document, as often as the mask counts it.
    expected = sum(int(masks[start + 1 : end].sum()) for start, end in pairwise(starts))
    assert int(samples.weights.sum()) == expected
    if length >= max(map(len, documents)):
        whole = {tuple(document.tolist()) for document in documents}
        assert sum(piece in whole for piece in pieces) == len(whole)
    again = BestFitDataset(folder, length)
    assert again.fingerprint == dataset.fingerprint != PackedDataset(folder, length).fingerprint
    order = np.random.default_rng(3).permutation(len(dataset))
    for ours, theirs in zip(samples[:3], again.gather(order)[:3], strict=True):
        assert np.array_equal(ours[order], theirs)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 30), sizes=st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_best_fit_loses_no_token(tmp_path_factory, write_folder, length, sizes) -> None:
    """Every token has its own id, so that each can be followed to its place."""
    ids = np.arange(1, sum(sizes) + 1)
    documents = np.split(ids, np.cumsum(sizes)[:-1])
    folder = write_folder(
        tmp_path_factory.mktemp("fit") / "x", [documents[::2], documents[1::2]][: len(sizes)], None, 9999
    )
    dataset = BestFitDataset(folder, length)
    samples = dataset.gather(np.arange(len(dataset)))
    assert set(samples.tokens.ravel().tolist()) - {0} == set(ids.tolist())
    targets = samples.tokens[:, 1:][samples.weights == 1]
    firsts = {int(document[0]) for document in documents}
    assert sorted(targets.tolist()) == sorted(set(ids.tolist()) - firsts)
    inputs = samples.tokens[:, :-1][samples.weights == 1]
    assert np.array_equal(inputs + 1, targets)
    document_of = np.r_[-1, np.repeat(np.arange(len(sizes)), sizes)]
    for row, segments in zip(samples.tokens[:, :-1], samples.segments, strict=True):
        seen = document_of[row]
        assert segments[0] == 0
        assert np.array_equal(np.diff(segments), np.diff(seen) != 0)
    assert dataset.fill == pytest.approx((samples.tokens != 0).mean())


def test_best_fit_fills_and_plans_in_bounded_memory() -> None:
    from modalities_data.datasets.fitting import plan

    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int32) + 2, 100_000)
    made = plan(lambda: iter([lengths[:70_000], lengths[70_000:]]), 2048)
    assert made.fill > 0.999
    assert made.by_length.dtype == np.uint32 and len(made.by_length) <= len(lengths)
    assert made.slots.nbytes < 1_000_000
    assert np.array_equal(np.sort(made.by_length), np.unique(made.by_length))
    assert made.tokens == int(lengths.sum()) + int(((lengths - 2) // 2048).sum()) - int((lengths < 2).sum())


OPENING = """
import sys, time
from pathlib import Path
import numpy as np
from modalities_data.datasets import PackedDataset
from modalities_data.order import shuffled

resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, started = resident(), time.process_time()
dataset = PackedDataset(Path(sys.argv[1]), 2048, documents="separate", verify="none")
print(len(dataset), time.process_time() - started, resident() - before)
samples = dataset.gather(shuffled(np.arange(4), len(dataset), 0))
assert not samples.tokens.any() and samples.segments.shape == (4, 2048)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, needs sparse files")
def test_a_corpus_of_a_million_million_tokens_opens_at_once(tmp_path, script) -> None:
    """Sparse files; the limits are those of a quiet machine, with room for a busy one."""
    shards, tokens, documents = 1000, 10**9, 10**3
    entries = []
    try:
        for number in range(shards):
            name = f"{number:05d}"
            with (tmp_path / f"{name}.bin").open("wb") as stream:
                stream.truncate(2 * tokens)
            with (tmp_path / f"{name}.idx").open("wb") as stream:
                write_index(stream, "uint16", np.full(documents, tokens // documents))
            blocks = ["0" * 16] * 30
            entries.append(Shard(name, tokens, documents, 2 * tokens, index_bytes(documents), 0, 5, "0", blocks, "0"))
    except OSError:
        pytest.skip("no sparse files here")
    write_manifest(tmp_path, Manifest(
        dtype="uint16", vocab_size=300, largest_id=5, end_of_document=1, tokens=shards * tokens,
        documents=shards * documents, text_bytes=0, tokenizer=TokenizerRecord("x", "bytes", ""),
        accounting=Accounting(shards * documents, shards * documents), shards=entries, producer="", options={},
    ))  # fmt: skip
    done = script(OPENING, tmp_path)
    assert done.returncode == 0, done.stderr
    samples, seconds, grown = done.stdout.split()
    assert int(samples) == (10**12 - 1) // 2048
    assert float(seconds) < 0.5 and int(grown) < 50_000_000
