"""Splitting packed folders by document, and damage that a rewrite would otherwise bless with new checksums."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare import joined
from modalities_data.prepare.chunk import chunk
from modalities_data.prepare.filter import filter_documents, min_tokens
from modalities_data.prepare.shuffle import shuffle_folders
from modalities_data.prepare.split_folders import split_folders


def contents(folder: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every document and its mask."""
    packed = PackedFolder(folder)
    found = []
    for number in range(len(packed.manifest.shards)):
        index, tokens, mask = packed.index(number), packed.tokens(number), packed.mask(number)
        ends = np.cumsum(index.lengths)
        for start, end in zip(ends - index.lengths, ends, strict=True):
            counts = np.ones(end - start, int) if mask is None else mask[start:end]
            found.append((tuple(tokens[start:end].tolist()), tuple(counts.tolist())))
    return found


@pytest.fixture
def folders(write_folder, tmp_path) -> list[Path]:
    """Two folders, the first with masks; some documents are in both."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 500, rng.integers(1, 60)).tolist(), 0] for _ in range(300)]
    masks = [rng.integers(0, 2, len(document)) for document in documents]
    first = write_folder(tmp_path / "first", [documents[:100], documents[100:200]], [masks[:100], masks[100:200]])
    return [first, write_folder(tmp_path / "second", [documents[150:]])]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_every_document_is_on_the_side_of_its_hash(folders, tmp_path, monkeypatch, fraction) -> None:
    monkeypatch.setattr(joined, "BLOCK_DOCUMENTS", 11)
    train, held_out = split_folders(folders, tmp_path / "train", tmp_path / "held", fraction, seed=3)
    found = [contents(tmp_path / name) for name in ("train", "held")]
    before = [document for folder in folders for document in contents(folder)]
    assert Counter(found[0] + found[1]) == Counter(before)
    assert not {ids for ids, _ in found[0]} & {ids for ids, _ in found[1]}
    for side, documents in enumerate(found):
        for ids, _ in documents:
            digest = xxhash.xxh3_64_intdigest(np.array(ids, "<u4").tobytes(), 3)
            assert (digest < int(fraction * 2**64)) == bool(side)
    assert [document for document in before if document in set(found[0])] == found[0]  # in their order
    assert abs(len(found[1]) / len(before) - fraction) < 0.15
    for name, manifest in (("train", train), ("held", held_out)):
        assert verify(tmp_path / name) == manifest
        assert manifest.accounting.skipped == {"other_side": 350 - manifest.documents}
    assert (train.options["side"], held_out.options["side"]) == ("train", "held_out")


def test_a_document_stays_on_its_side(folders, tmp_path) -> None:
    split_folders(folders, tmp_path / "train", tmp_path / "held", 0.3)
    split_folders(folders[:1], tmp_path / "train-1", tmp_path / "held-1", 0.3)
    split_folders(folders, tmp_path / "other", tmp_path / "other-held", 0.3, seed=1)
    both, one, other = ({ids for ids, _ in contents(tmp_path / name)} for name in ("held", "held-1", "other-held"))
    assert one < both != other


def test_the_command(folders, tmp_path, command) -> None:
    done = command("split", *folders, tmp_path / "t", tmp_path / "h", "--fraction", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts == {name: len(contents(tmp_path / name[0])) for name in ("train", "held_out")}
    again = command("split", *folders, tmp_path / "t", tmp_path / "h")
    assert again.returncode == 3 and "exists already" in again.stderr


def test_refusals_write_nothing(folders, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="different folders"):
        split_folders(folders, tmp_path / "t", tmp_path / "t")
    with pytest.raises(ConfigError, match="different folders"):
        split_folders(folders, tmp_path / "t", folders[0], overwrite=True)
    with pytest.raises(ConfigError, match="between 0 and 1, not at 1"):
        split_folders(folders, tmp_path / "t", tmp_path / "h", 1.0)
    with pytest.raises(DataError, match="of 350 documents in 2 folders, 0 would be held out"):
        split_folders(folders, tmp_path / "t", tmp_path / "h", 1e-9)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("file", ["00001.bin", "00001.idx", "00001.mask", "00001.source"])
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda folder, output: shuffle_folders([folder], output),
        lambda folder, output: filter_documents(folder, output, min_tokens(1)),
        lambda folder, output: chunk([folder], output, 2, 2),
        lambda folder, output: split_folders([folder], output, output.with_name("held"), 0.5),
    ],
    ids=["shuffle", "filter", "chunk", "split"],
)
def test_no_rewrite_gives_damaged_documents_new_checksums(folders, tmp_path, file, rewrite) -> None:
    path = folders[0] / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file}: block 0, bytes 0 to {len(content)}: expected checksum"):
        rewrite(folders[0], tmp_path / "output")
    assert not (tmp_path / "output").exists()
