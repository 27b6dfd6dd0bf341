"""Rows out of many files against slices of the whole row, and files that shrink or go behind an open folder."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import DataError
from modalities_data import packed as packed_module
from modalities_data.datasets import PackedDataset
from modalities_data.rows import Rows, checked


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    step=st.integers(1, 20),
    more=st.integers(0, 3),
    dtype=st.sampled_from(["<u2", "<i4", "u1"]),
    absent=st.sets(st.integers(0, 7)),
    keep=st.booleans(),
    data=st.data(),
)
def test_rows_are_slices_of_all_files_back_to_back(lengths, step, more, dtype, absent, keep, data) -> None:
    width = step + more
    files = [np.random.default_rng(number).integers(2, 200, length).astype(dtype) for number, length in
             enumerate(lengths)]  # fmt: skip
    whole = np.concatenate([np.ones_like(f) if number in absent else f for number, f in enumerate(files)])
    asked: list[int] = []

    def stored(number):
        asked.append(number)
        return None if number in absent else files[number]

    rows = Rows(lengths, step, width, np.dtype(dtype), stored, keep)
    assert len(rows) == max(0, (len(whole) - width) // step + 1)
    for _ in range(3):
        indices = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9) if len(rows) else st.just([])))
        found = rows.gather(indices.astype(np.int64))
        assert found.dtype == dtype and found.shape == (len(indices), width) and found.flags.writeable
        for row, index in zip(found, indices.tolist(), strict=True):
            assert np.array_equal(row, whole[index * step : index * step + width])
    for wrong in (-1, len(rows), 2**40, -(2**40)):
        with pytest.raises(IndexError):
            rows.gather(np.array([wrong]))
    inside = [number for number, length in enumerate(lengths) if length >= width and number not in absent]
    if keep and len(rows):
        everything = rows.gather(np.arange(len(rows)))
        assert np.array_equal(everything, np.stack([whole[i * step : i * step + width] for i in range(len(rows))]))
        asked.clear()
        again = [i for i in range(len(rows)) for n in inside
                 if sum(lengths[:n]) <= i * step and i * step + width <= sum(lengths[: n + 1])]  # fmt: skip
        assert np.array_equal(rows.gather(np.array(again, np.int64)), everything[again])
        assert not asked or not again  # rows inside files that are mapped cost no look-up


def test_indices_out_of_range_are_told() -> None:
    assert checked(np.array([0, 4]), 5).tolist() == [0, 4]
    assert checked(np.array([], np.int64), 0).shape == (0,)
    for wrong in ([-1, 3], [3, 5]):
        with pytest.raises(IndexError, match=r"in \[0, 5\), found"):
            checked(np.array(wrong), 5)


@pytest.fixture(params=[400, 70_000], ids=["uint16", "int32"])
def folder(request, write_folder, tmp_path):
    """Twelve shards of some 300 tokens, of either dtype."""
    rng = np.random.default_rng(5)
    shards = [[np.r_[rng.integers(1, request.param, size), 0] for size in rng.integers(1, 60, 10)] for _ in range(12)]
    return write_folder(tmp_path / "corpus", shards, vocab_size=request.param)


def whole_row(folder):
    dtype = "<u2" if "uint16" in (folder / "manifest.json").read_text() else "<i4"
    return np.concatenate([np.fromfile(path, dtype) for path in sorted(folder.glob("*.bin"))])


@pytest.mark.parametrize("mapped", [2, 1000])
def test_random_samples_of_many_shards(folder, monkeypatch, mapped) -> None:
    monkeypatch.setattr(packed_module, "OPEN_SHARDS", mapped)
    tokens, dataset = whole_row(folder), PackedDataset(folder, 16)
    assert len(dataset) == (len(tokens) - 1) // 16
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = rng.integers(0, len(dataset), 32)
        found = dataset.gather(indices).tokens
        assert found.dtype == tokens.dtype
        assert np.array_equal(found, np.stack([tokens[i * 16 : i * 16 + 17] for i in indices.tolist()]))


def test_threads_read_one_dataset_at_once(folder) -> None:
    tokens, dataset = whole_row(folder), PackedDataset(folder, 16)
    wrong: list[int] = []

    def read(seed):
        for indices in np.random.default_rng(seed).integers(0, len(dataset), (100, 4)):
            expected = np.stack([tokens[i * 16 : i * 16 + 17] for i in indices.tolist()])
            if not np.array_equal(dataset.gather(indices).tokens, expected):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def damage(folder, how):
    path = folder / "00007.bin"
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -2])


MESSAGES = {"gone": r"00007\.bin is missing; the manifest expects \d+ bytes",
            "cut": r"00007\.bin: the manifest expects \d+ bytes, the file has \d+",
            "empty": r"00007\.bin: the manifest expects \d+ bytes, the file has 0"}  # fmt: skip


@pytest.mark.parametrize("how", MESSAGES)
def test_a_shard_damaged_after_opening_is_found_on_first_use(folder, how) -> None:
    dataset = PackedDataset(folder, 16, verify="none")
    begins = sum(path.stat().st_size for path in sorted(folder.glob("*.bin"))[:7]) // dataset._packed.dtype.itemsize
    damage(folder, how)
    assert dataset.gather(np.arange(begins // 16 - 1)).tokens.shape[0] == begins // 16 - 1
    with pytest.raises(DataError, match=MESSAGES[how]):
        dataset.gather(np.array([begins // 16 + 1]))


@pytest.mark.parametrize("how", MESSAGES)
def test_large_folders_are_checked_behind_their_opening(folder, monkeypatch, how) -> None:
    """Whatever is wrong is told at the next samples, wherever they are."""
    from modalities_data.datasets import packed as datasets_packed

    damage(folder, how)
    with pytest.raises(DataError, match=MESSAGES[how]):
        PackedDataset(folder, 16)
    monkeypatch.setattr(datasets_packed, "FILES_AT_ONCE", 4)
    dataset = PackedDataset(folder, 16, verify="none")
    deadline = time.monotonic() + 30
    while any(thread.name == "sizes" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(DataError, match=MESSAGES[how]):
            dataset.gather(np.array([0]))
    (folder / "00000.bin").unlink()
    with pytest.raises(DataError, match=r"00000\.bin is missing"):
        PackedDataset(folder, 16)


def test_an_id_above_the_largest_or_below_zero_is_found(folder) -> None:
    path, dtype = folder / "00003.bin", whole_row(folder).dtype
    tokens = np.fromfile(path, dtype)
    for wrong in (np.iinfo(dtype).max, -1 if dtype == np.int32 else 65_000):
        changed = tokens.copy()
        changed[5] = wrong
        changed.tofile(path)
        dataset = PackedDataset(folder, 16, verify="none")
        with pytest.raises(DataError, match=rf"found token id {wrong}, the manifest says at most \d+"):
            dataset.gather(np.arange(len(dataset)))
