"""Packed folders: Megatron's layout read independently, and every way a folder can be damaged."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import DataError
from modalities_data import packed as packed_module
from modalities_data import packed_writer
from modalities_data.jsonl import documents
from modalities_data.manifest import Accounting, read_manifest
from modalities_data.megatron_index import index_bytes, read_index, token_dtype
from modalities_data.packed import PackedFolder, verify, writing_shard
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer


def megatron_documents(folder, name):
    """Read a shard as Megatron-LM does: header field by field, then lengths, pointers and document entries."""
    with (folder / f"{name}.idx").open("rb") as stream:
        assert stream.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", stream.read(8)) == (1,)
        dtype = {8: np.uint16, 4: np.int32}[struct.unpack("<B", stream.read(1))[0]]
        (sequences,) = struct.unpack("<Q", stream.read(8))
        (entries,) = struct.unpack("<Q", stream.read(8))
        lengths = np.frombuffer(stream.read(4 * sequences), np.int32)
        pointers = np.frombuffer(stream.read(8 * sequences), np.int64)
        starts = np.frombuffer(stream.read(8 * entries), np.int64)
        assert stream.read() == b""
    assert starts.tolist() == list(range(sequences + 1))
    data = (folder / f"{name}.bin").read_bytes()
    return [np.frombuffer(data, dtype, n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]


@pytest.fixture(scope="module")
def folder(lorem_file, tokenizer_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "corpus"
    pack(lorem_file, output, HuggingFaceTokenizer(tokenizer_file), workers=1, range_bytes=60_000)
    return output


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


def test_megatron_reads_the_shards_and_gets_the_documents(folder, lorem_file, tokenizer_file) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    names = [shard.name for shard in read_manifest(folder).shards]
    assert names == ["00000", "00001", "00002", "00003", "00004"][: len(names)] and len(names) > 2
    found = [document for name in names for document in megatron_documents(folder, name)]
    assert found == [[*tokenizer.encode(text), tokenizer.end_of_document] for text in documents(lorem_file)]
    opened = PackedFolder(folder)
    assert [opened.document(number).tolist() for number in range(len(found))] == found
    for number in (-1, len(found)):
        with pytest.raises(IndexError):
            opened.document(number)


def test_the_manifest_says_what_is_there(folder, lorem_file, tokenizer_file) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    texts = list(documents(lorem_file))
    assert raw["format"] == "modalities-packed" and raw["version"] == 1
    assert raw["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert raw["accounting"] == {
        "documents": 400, "written": 400, "skipped": {}, "failed": 0, "blank_lines": 0,
    }  # fmt: skip
    assert raw["tokenizer"]["fingerprint"] == HuggingFaceTokenizer(tokenizer_file).fingerprint
    assert raw["tokenizer"]["end_of_document_token"] == "<|endoftext|>"
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    position = 0
    for shard in raw["shards"]:
        data = (folder / f"{shard['name']}.bin").read_bytes()
        assert len(data) == shard["bytes"] == 2 * shard["tokens"]
        assert xxhash.xxh3_64_hexdigest(data) == shard["checksum"] == shard["block_checksums"][0]
        index = (folder / f"{shard['name']}.idx").read_bytes()
        assert xxhash.xxh3_64_hexdigest(index) == shard["index_checksum"]
        assert len(index) == shard["index_bytes"]
        assert max(struct.unpack(f"<{shard['tokens']}H", data)) == shard["largest_id"]
        assert (shard["source"]["file"], shard["source"]["start"]) == (str(lorem_file), position)
        position = shard["source"]["end"]
    assert position == lorem_file.stat().st_size
    assert raw["largest_id"] == max(shard["largest_id"] for shard in raw["shards"])
    known = {f"{shard['name']}.{end}" for shard in raw["shards"] for end in ("bin", "idx")}
    assert {path.name for path in folder.iterdir()} == known | {"manifest.json", "tokenizer.json"}
    assert verify(folder).fingerprint == read_manifest(folder).fingerprint


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=10)


@settings(max_examples=20, deadline=None)
@given(texts=TEXTS, target=st.integers(1, 300), learned=st.booleans())
def test_what_is_packed_decodes_to_what_was_there(tmp_path_factory, write_jsonl, tokenizers, texts, target, learned):
    folder = tmp_path_factory.mktemp("round")
    source = write_jsonl(folder / "x.jsonl", [*texts, "the last"])
    pack(source, folder / "out", tokenizers[learned], workers=1, range_bytes=target)
    manifest = verify(folder / "out")
    opened = PackedFolder(folder / "out")
    kept = [tokenizers[learned].decode(opened.document(number).tolist()) for number in range(manifest.documents)]
    assert kept == [text for text in [*texts, "the last"] if text]
    empty = texts.count("")
    assert manifest.accounting == Accounting(len(texts) + 1, len(kept), {"empty": empty} if empty else {}, 0, 0)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_file):
    return BytesTokenizer(), HuggingFaceTokenizer(tokenizer_file)


def test_the_dtype_follows_megatrons_rule() -> None:
    assert [token_dtype(size) for size in (257, 65_499, 65_500, 65_536, 200_000)] == ["uint16"] * 2 + ["int32"] * 3


class Wide(BytesTokenizer):
    """Bytes with large ids."""

    vocab_size = 2**31
    end_of_document = 2**31 - 1
    fingerprint = "wide"


def test_ids_of_large_vocabularies_are_int32(tmp_path, write_jsonl) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["ab", "c"])
    made = pack(source, tmp_path / "out", Wide(), workers=1).manifest
    assert (made.dtype, made.largest_id) == ("int32", 2**31 - 1)
    assert megatron_documents(tmp_path / "out", "00000") == [[97, 98, 2**31 - 1], [99, 2**31 - 1]]
    assert np.fromfile(tmp_path / "out" / "00000.bin", "<i4").tolist() == [97, 98, 2**31 - 1, 99, 2**31 - 1]


def test_checksums_of_blocks_are_independent_of_how_it_was_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packed_writer, "CHECKSUM_BLOCK", 100)
    tokens = np.random.default_rng(0).integers(0, 500, 425).astype(np.uint32)
    with writing_shard(tmp_path, "a", "uint16") as writer:
        for part in np.split(tokens, [1, 2, 150, 151, 400]):
            writer.append(part, np.array([len(part)]), 0)
    data = (tmp_path / "a.bin").read_bytes()
    assert data == tokens.astype("<u2").tobytes()
    shard = writer.shard("")
    blocks = [xxhash.xxh3_64_hexdigest(data[start : start + 100]) for start in range(0, 850, 100)]
    assert (shard.block_checksums, shard.checksum) == (blocks, xxhash.xxh3_64_hexdigest(data))
    index = read_index(tmp_path / "a.idx", (tmp_path / "a.idx").read_bytes(), 850)
    assert index.lengths.tolist() == [1, 1, 148, 1, 249, 25]
    assert index_bytes(6) == (tmp_path / "a.idx").stat().st_size


def test_a_shard_that_fails_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), writing_shard(tmp_path, "a", "uint16") as writer:
        writer.append(np.zeros(4, np.uint32), np.array([4]), 0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ON_OPEN = {
    "bin gone": (lambda f: (f / "00001.bin").unlink(), r"00001\.bin is missing; the manifest expects \d+ bytes"),
    "idx gone": (lambda f: (f / "00001.idx").unlink(), r"00001\.idx is missing"),
    "bin cut": (lambda f: cut(f / "00001.bin", 11), r"00001\.bin: the manifest expects \d+ bytes, the file has 11"),
    "bin empty": (lambda f: cut(f / "00000.bin", 0), r"00000\.bin: the manifest expects \d+ bytes, the file has 0"),
    "bin longer": (lambda f: (f / "00001.bin").open("ab").write(b"x"), r"00001\.bin: the manifest expects"),
    "idx cut": (lambda f: cut(f / "00000.idx", 40), r"00000\.idx: the manifest expects \d+ bytes, the file has 40"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "manifest cut": (lambda f: cut(f / "manifest.json", 200), r"manifest\.json is damaged"),
    "manifest random": (lambda f: (f / "manifest.json").write_bytes(bytes(range(256))), r"manifest\.json is damaged"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is damaged"),
    "format": (lambda f: edit(f / "manifest.json", format="x"), "expected format 'modalities-packed', found 'x'"),
    "version": (lambda f: edit(f / "manifest.json", version=2), "version 2, this program reads up to version 1"),
    "field gone": (lambda f: (f / "manifest.json").write_text('{"format": "modalities-packed", "version": 1}'),
                   "missing required field"),
    "negative": (lambda f: edit(f / "manifest.json", tokens=-1), "damaged"),
    "dtype": (lambda f: edit(f / "manifest.json", dtype="float32"), "dtype is uint16 or int32, found 'float32'"),
    "other dtype": (lambda f: edit(f / "manifest.json", dtype="int32"), r"tokens of 4 bytes, but \d+ bytes"),
    "tokens": (lambda f: edit(f / "manifest.json", tokens=5), r"tokens is 5, but the shards add up to \d+"),
    "largest id": (lambda f: edit(f / "manifest.json", vocab_size=300), r"not below vocab_size 300"),
    "lost documents": (lambda f: edit(f / "manifest.json", accounting={"documents": 401, "written": 400}),
                       "documents are not what was written"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_OPEN)
def test_damage_found_when_opened(damaged, name) -> None:
    damage, message = ON_OPEN[name]
    damage(damaged)
    with pytest.raises(DataError, match=message):
        PackedFolder(damaged)


@pytest.mark.parametrize("name", ["no folder", "a file", "an empty folder"])
def test_what_is_no_packed_folder(tmp_path, name) -> None:
    path = tmp_path / "x"
    if name == "a file":
        path.write_bytes(b"x")
    elif name == "an empty folder":
        path.mkdir()
    with pytest.raises(DataError, match="is no folder|has no manifest"):
        PackedFolder(path)


def test_verify_finds_a_flipped_bit_anywhere(damaged) -> None:
    size = (damaged / "00001.bin").stat().st_size
    for path, position in [("00001.bin", 0), ("00001.bin", size - 1), ("00002.idx", 3), ("00002.idx", 50)]:
        flip(damaged / path, position)
        with pytest.raises(DataError, match=rf"{path.replace('.', '.')}.*expected checksum \w+, found \w+"):
            verify(damaged)
        flip(damaged / path, position)
    verify(damaged)


def test_verify_lists_all_damaged_shards(damaged) -> None:
    flip(damaged / "00000.bin", 7)
    flip(damaged / "00002.bin", 7)
    with pytest.raises(DataError) as caught:
        verify(damaged)
    assert "00000.bin" in caught.value.message and "00002.bin" in caught.value.message


def test_verify_finds_an_index_and_ends_that_lie(damaged) -> None:
    """Checksums can be made to match by whoever wrote the wrong files."""
    path, manifest = damaged / "00000.idx", damaged / "manifest.json"
    data = bytearray(path.read_bytes())
    first, second = struct.unpack_from("<ii", data, 34)
    struct.pack_into("<ii", data, 34, first + 1, second - 1)
    path.write_bytes(data)
    raw = json.loads(manifest.read_text())
    raw["shards"][0]["index_checksum"] = xxhash.xxh3_64_hexdigest(bytes(data))
    manifest.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="do not lie back to back"):
        verify(damaged)


INDEX = {
    "tiny": (b"MMIDIDX", "has at least 34 bytes, this file has 7"),
    "empty": (b"", "this file has 0"),
    "random": (bytes(range(100)), "expected a Megatron index"),
    "version": (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 1) + bytes(8), "version 2"),
    "dtype": (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 99, 0, 1) + bytes(8), "dtype code 99"),
    "counts": (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2**60, 1), "its header promises"),
    "end": (b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 4, 0, 0, 1), "ends at byte 8, but the .bin .* 10"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX)
def test_files_that_are_no_index(tmp_path, name) -> None:
    content, message = INDEX[name]
    with pytest.raises(DataError, match=message):
        read_index(tmp_path / "x.idx", content, 10)


def test_an_index_of_the_same_size_but_random_is_refused(damaged) -> None:
    size = (damaged / "00001.idx").stat().st_size
    (damaged / "00001.idx").write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(DataError, match=r"00001\.idx: expected a Megatron index"):
        PackedFolder(damaged).index(1)


def test_more_shards_than_may_stay_open(damaged, monkeypatch) -> None:
    monkeypatch.setattr(packed_module, "OPEN_SHARDS", 2)
    opened = PackedFolder(damaged)
    count = len(opened.manifest.shards)
    for number in [*range(count), 0, *reversed(range(count))]:
        expected = np.fromfile(damaged / f"{opened.manifest.shards[number].name}.bin", "<u2")
        assert np.array_equal(opened.tokens(number), expected)
        assert len(opened._mapped) <= 2


def test_the_fingerprint_is_of_the_tokens(folder, damaged, lorem_file, tokenizer_file, tmp_path) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine="tokenizers")
    again = pack(lorem_file, tmp_path / "again", tokenizer, workers=1, range_bytes=60_000).manifest
    assert again.fingerprint == read_manifest(damaged).fingerprint == read_manifest(folder).fingerprint
    other = pack(lorem_file, tmp_path / "other", BytesTokenizer(), workers=1).manifest
    assert other.fingerprint != again.fingerprint
