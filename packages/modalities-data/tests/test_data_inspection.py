"""What ``inspect`` counts, against numpy on all lengths; and what ``verify`` finds about ids."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import xxhash

from modalities_core.errors import DataError
from modalities_data.inspection import inspect_folder
from modalities_data.manifest import write_manifest
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer


@pytest.fixture
def folder(tmp_path, write_jsonl):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 1, 2, 3, *rng.integers(1, 5000, 200).tolist(), 70_000]
    source = write_jsonl(tmp_path / "x.jsonl", ["x" * length for length in lengths])
    pack(source, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=100_000)
    return tmp_path / "out", np.array([length + 1 for length in lengths if length])


def test_statistics_and_histogram_are_of_all_documents(folder) -> None:
    path, lengths = folder
    report = inspect_folder(path, 2, 10)
    summary = report.summary
    assert summary["shards"] > 3
    quantiles = np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1), method="nearest").tolist()
    assert list(summary["document_tokens"].values()) == quantiles
    assert summary["mean_document_tokens"] == pytest.approx(lengths.mean())
    histogram = summary["length_histogram"]
    assert (histogram[0]["from"], histogram[-1]["from"]) == (2, 65536)
    for bucket in histogram:
        inside = lengths[(lengths >= bucket["from"]) & (lengths < bucket["below"])]
        assert (bucket["documents"], bucket["tokens"]) == (len(inside), inside.sum())
    assert sum(bucket["documents"] for bucket in histogram) == len(lengths) == summary["documents"]
    assert json.loads(json.dumps(summary)) == summary
    lines = report.text.splitlines()
    (last,) = (line for line in lines if "65,536-131,071" in line)
    assert "# " in last and " 1 " in last and f"{100 * 70001 / lengths.sum():.1f} % of tokens" in last
    assert all(len(line) < 110 for line in lines)


def test_an_empty_part_is_told_from_a_damaged_folder(tmp_path, write_jsonl) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["a"])
    pack(source, tmp_path / "part", BytesTokenizer(), workers=1, part=(1, 2))
    with pytest.raises(DataError, match="has no documents"):
        inspect_folder(tmp_path / "part", 1, 1)
    assert verify(tmp_path / "part").documents == 0


def test_ids_beyond_the_vocabulary_are_found_even_where_checksums_match(folder) -> None:
    path, _ = folder
    manifest = PackedFolder(path).manifest
    shard = manifest.shards[0]
    tokens = np.fromfile(path / f"{shard.name}.bin", "<u2")
    tokens[0] = 300
    tokens.tofile(path / f"{shard.name}.bin")
    digest = xxhash.xxh3_64_hexdigest(tokens.tobytes())
    forged = msgspec.structs.replace(shard, checksum=digest, block_checksums=[digest])
    write_manifest(path, msgspec.structs.replace(manifest, shards=[forged, *manifest.shards[1:]]))
    with pytest.raises(DataError, match="ids are below 257, found 300"):
        verify(path)
    forged = msgspec.structs.replace(forged, largest_id=300)
    write_manifest(path, msgspec.structs.replace(manifest, shards=[forged, *manifest.shards[1:]]))
    with pytest.raises(DataError, match="largest id is 256, but the largest of a shard is 300"):
        PackedFolder(path)
    write_manifest(path, msgspec.structs.replace(manifest, shards=[forged, *manifest.shards[1:]], largest_id=300))
    with pytest.raises(DataError, match="is not below vocab_size 257"):
        PackedFolder(path)
