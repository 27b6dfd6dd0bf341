"""Other programs' files, written here byte by byte from their published layouts, to packed folders and back."""

from __future__ import annotations

import json
import os
import pickle
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_data.convert.datatrove import from_datatrove, to_datatrove
from modalities_data.convert.legacy_index import read_pairs
from modalities_data.convert.megatron import from_megatron, to_megatron
from modalities_data.convert.pbin import from_pbin
from modalities_data.convert.raw import Vocabulary
from modalities_data.datasets import PackedDataset
from modalities_data.inspection import inspect_folder
from modalities_data.manifest import read_manifest
from modalities_data.packed import PackedFolder, verify, writing_shard
from modalities_data.prepare.chunk import chunk
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

END = 9
WORDS = Vocabulary(1000, END)
DOCUMENTS = [[1, 2, 3, END], [END], [700, 4, END], [5, 6, 7, 8, 999, END]]


def write_pair(prefix: Path, documents, dtype="<u2", entries=None, modes=None, shift=0):
    """A pair as Megatron-LM's builder writes it: sequences back to back, entries the sequence each document starts."""
    code = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}[dtype]
    lengths = [len(document) for document in documents]
    pointers = [shift + sum(lengths[:number]) * np.dtype(dtype).itemsize for number in range(len(lengths))]
    entries = range(len(documents) + 1) if entries is None else entries
    Path(f"{prefix}.bin").write_bytes(bytes(shift) + b"".join(np.array(d, dtype).tobytes() for d in documents))
    content = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(list(entries)))
    content += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    content += np.array(list(entries), "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(content + (b"" if modes is None else np.array(modes, "i1").tobytes()))
    return prefix


def contents(folder):
    opened = PackedFolder(folder)
    return [opened.document(number).tolist() for number in range(opened.manifest.documents)]


def is_linked(one: Path, other: Path) -> bool:
    return os.stat(one).st_ino == os.stat(other).st_ino


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "<i2"])
def test_megatron_pairs_are_linked_or_rewritten(tmp_path, dtype) -> None:
    pairs = [write_pair(tmp_path / "one", DOCUMENTS, dtype), write_pair(tmp_path / "two", DOCUMENTS[:2], dtype)]
    made = from_megatron([pairs[0], Path(f"{pairs[1]}.idx")], tmp_path / "out", WORDS)
    assert made.dtype == ("int32" if dtype == "<i4" else "uint16")
    assert contents(tmp_path / "out") == DOCUMENTS + DOCUMENTS[:2]
    assert is_linked(tmp_path / "one.bin", tmp_path / "out" / "00000.bin") == (dtype in ("<u2", "<i4"))
    if dtype in ("<u2", "<i4"):
        assert (tmp_path / "out" / "00000.idx").read_bytes() == (tmp_path / "one.idx").read_bytes()
    verify(tmp_path / "out")
    assert (made.vocab_size, made.largest_id, made.end_of_document, made.text_bytes) == (1000, 999, END, 0)
    assert [Path(entry.file).name for entry in made.inputs] == ["one.bin", "one.idx", "two.bin", "two.idx"]
    assert PackedDataset(tmp_path / "out", 4).bytes_per_token is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.bin", "one.idx", "out", "two.bin", "two.idx"]
    # An unknown tokenizer is no reason not to cut, but documents cannot be shown as text.
    chunk([tmp_path / "out"], tmp_path / "part", 1, 2)
    with pytest.raises(DataError, match="whether their ids mean the same is unknown"):
        chunk([tmp_path / "out", tmp_path / "part"], tmp_path / "two", 1, 2)
    assert inspect_folder(tmp_path / "out", 0, 10).summary["documents"] == 6
    with pytest.raises(DataError, match="without its tokenizer"):
        inspect_folder(tmp_path / "out", 1, 10)


def test_megatron_documents_of_several_sequences(tmp_path) -> None:
    sequences = [[1, 2], [3, END], [], [700, 4, END], [5], [6, 7], [8, END]]
    write_pair(tmp_path / "x", sequences, entries=[0, 2, 2, 4, 7], modes=[0] * 7)
    made = from_megatron([tmp_path / "x"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == [[1, 2, 3, END], [700, 4, END], [5, 6, 7, 8, END]]
    assert (made.accounting.documents, made.accounting.skipped) == (4, {"empty": 1})
    assert is_linked(tmp_path / "x.bin", tmp_path / "out" / "00000.bin")
    verify(tmp_path / "out")
    with pytest.raises(DataError, match=r"3 of 6 documents do not end with id 9, the first of them document 0"):
        from_megatron([tmp_path / "x"], tmp_path / "no", WORDS, unit="sequence")
    made = from_megatron([tmp_path / "x"], tmp_path / "each", WORDS, unit="sequence", append_end=True)
    expected = [[*sequence, END] if sequence[-1] != END else sequence for sequence in sequences if sequence]
    assert contents(tmp_path / "each") == expected
    verify(tmp_path / "each")


def test_sequences_out_of_order_are_put_in_order(tmp_path) -> None:
    write_pair(tmp_path / "x", DOCUMENTS)
    content = bytearray((tmp_path / "x.idx").read_bytes())
    lengths, pointers = 34, 34 + 4 * len(DOCUMENTS)
    struct.pack_into("<2i", content, lengths, 1, 4)  # the index gives the second document first
    struct.pack_into("<2q", content, pointers, 8, 0)
    (tmp_path / "x.idx").write_bytes(content)
    from_megatron([tmp_path / "x"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]
    assert not is_linked(tmp_path / "x.bin", tmp_path / "out" / "00000.bin")
    verify(tmp_path / "out")
    with struct_entries(tmp_path / "x.idx", [0, 2, 4]), pytest.raises(DataError, match="do not follow each other"):
        from_megatron([tmp_path / "x"], tmp_path / "no", WORDS)


@contextmanager
def struct_entries(path: Path, entries):
    """The index with other document entries."""
    before = path.read_bytes()
    head = before[:26] + struct.pack("<Q", len(entries)) + before[34 : 34 + 12 * len(DOCUMENTS)]
    path.write_bytes(head + np.array(entries, "<i8").tobytes())
    yield
    path.write_bytes(before)


def test_an_end_that_16_bits_do_not_hold_makes_32_of_them(tmp_path) -> None:
    write_pair(tmp_path / "x", DOCUMENTS)
    made = from_megatron([tmp_path / "x"], tmp_path / "out", Vocabulary(70_001, 70_000), append_end=True)
    assert made.dtype == "int32" and contents(tmp_path / "out") == [[*document, 70_000] for document in DOCUMENTS]
    verify(tmp_path / "out")


def test_megatron_pairs_that_are_refused(tmp_path) -> None:
    def refused(message, vocabulary=WORDS, error=DataError, **pair):
        write_pair(tmp_path / "x", **{"documents": DOCUMENTS, **pair})
        with pytest.raises(error, match=message):
            from_megatron([tmp_path / "x"], tmp_path / "out", vocabulary)
        assert not [path for path in tmp_path.iterdir() if path.name not in ("x.bin", "x.idx")]

    refused("id 999 is not in a vocabulary of 999", Vocabulary(999, END))
    refused("id -5 is not in", dtype="<i4", documents=[[-5, END]])
    refused("is multimodal: 1 sequences", modes=[0, 0, 1, 0])
    refused(r"3 of 4 documents do not end with id 3", Vocabulary(1000, 3), documents=[[3], [1], [2], [END]])
    refused("do not go from 0 to 4", entries=[0, 1, 2])
    refused("do not go from 0 to 4", entries=[0, 3, 2, 4])
    refused("no document to convert", documents=[[], []])
    write_pair(tmp_path / "x", DOCUMENTS)
    content = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<q", content, 34 + 16, -2)  # the first pointer
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(DataError, match="lies outside"):
        from_megatron([tmp_path / "x"], tmp_path / "out", WORDS)
    for size in (0, 10, 33, 40, len(content) - 1):
        (tmp_path / "x.idx").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"x\.idx"):
            from_megatron([tmp_path / "x"], tmp_path / "out", WORDS)
    with pytest.raises(DataError, match="none.idx"):
        from_megatron([tmp_path / "none"], tmp_path / "out", WORDS)
    for numbers in ((None, None, None), (None, 10, None), (None, 10, 10), (BytesTokenizer(), 256, None)):
        with pytest.raises(ConfigError):
            Vocabulary.of(*numbers)


@pytest.fixture(scope="module")
def folder(lorem_file, tokenizer_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("convert") / "corpus"
    pack(lorem_file, output, HuggingFaceTokenizer(tokenizer_file), workers=1, range_bytes=60_000)
    return output


def test_to_megatron_and_back(folder, tokenizer_file, tmp_path) -> None:
    assert to_megatron(folder, tmp_path / "all") == (400, read_manifest(folder).tokens)
    shards = read_manifest(folder).shards
    assert (tmp_path / "all.bin").read_bytes() == b"".join((folder / f"{s.name}.bin").read_bytes() for s in shards)
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    made = from_megatron([tmp_path / "all"], tmp_path / "back", Vocabulary.of(tokenizer, None, None))
    assert contents(tmp_path / "back") == contents(folder) and made.tokenizer.fingerprint == tokenizer.fingerprint
    assert inspect_folder(tmp_path / "back", 1, 20).summary["samples"]["0"]
    to_megatron(tmp_path / "back", tmp_path / "one")
    assert is_linked(tmp_path / "back" / "00000.bin", tmp_path / "one.bin")
    assert (tmp_path / "one.idx").read_bytes() == (tmp_path / "all.idx").read_bytes()
    to_megatron(tmp_path / "back", tmp_path / "one", copy=True, overwrite=True)
    assert not is_linked(tmp_path / "back" / "00000.bin", tmp_path / "one.bin")
    with pytest.raises(DataError, match=r"one\.bin exists"):
        to_megatron(folder, tmp_path / "one.bin")
    verify(tmp_path / "back")


def pbin(documents, itemsize=2, offsets=None, protocol=4, index=None) -> bytes:
    """A file as the original Modalities writes it."""
    data = b"".join(np.array(document, f"<u{itemsize}").tobytes() for document in documents)
    lengths = [len(document) * itemsize for document in documents]
    offsets = [sum(lengths[:number]) for number in range(len(lengths))] if offsets is None else offsets
    pairs = list(zip(offsets, lengths, strict=True))
    tail = pickle.dumps(pairs, protocol=protocol) if index is None else index
    return struct.pack("<QI", len(data), itemsize) + data + tail


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_pbin_files_become_shards(tmp_path, itemsize) -> None:
    documents = [[min(value, 250) for value in document] for document in DOCUMENTS]
    for number in range(2):
        (tmp_path / f"{number}.pbin").write_bytes(pbin(documents[number:], itemsize))
    made = from_pbin([tmp_path / "0.pbin", tmp_path / "1.pbin"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == documents + documents[1:]
    assert made.dtype == ("int32" if itemsize == 4 else "uint16")
    verify(tmp_path / "out")


def test_a_published_header_is_read(tmp_path) -> None:
    """414 bytes of 2-byte tokens, as in the files of the original's own tests."""
    documents = [[1] * 100 + [END], [2] * 105 + [END]]
    content = pbin(documents)
    assert content.startswith(bytes.fromhex("9e0100000000000002000000"))
    (tmp_path / "x.pbin").write_bytes(content)
    from_pbin([tmp_path / "x.pbin"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == documents


def test_merged_pbin_files_are_cut_by_their_lengths(tmp_path, caplog) -> None:
    """The original's merge moves the offsets of every file after the first by its 12 bytes of header."""
    (tmp_path / "x.pbin").write_bytes(pbin(DOCUMENTS, offsets=[0, 8, 10 - 12, 16 - 12]))
    with pytest.raises(DataError, match="negative"):
        from_pbin([tmp_path / "x.pbin"], tmp_path / "out", WORDS)
    (tmp_path / "x.pbin").write_bytes(pbin(DOCUMENTS, offsets=[0, 8, 10, 16 - 12]))
    from_pbin([tmp_path / "x.pbin"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == DOCUMENTS
    assert "offsets of 1 documents are wrong" in caplog.text


def test_pbin_files_that_are_refused(tmp_path) -> None:
    good = pbin(DOCUMENTS)
    bad = {
        b"": "at least 12 bytes", good[:11]: "at least 12 bytes", bytes(8) + good[8:]: "never finished",
        good[:8] + b"\x03" + good[9:]: "no .pbin file", b"\xff" + good[1:]: "no .pbin file",
        good[:-1]: "cut off", good[:50]: "there is no document index|cut off", good + b".": "1 bytes follow",
        pbin(DOCUMENTS, index=pickle.dumps([(0, 8)], 4)): "do not add up",
        pbin(DOCUMENTS, index=pickle.dumps([(0, 3), (3, 25)], 4)): "do not add up",
        pbin(DOCUMENTS, index=pickle.dumps([], 4)): "do not add up",
    }  # fmt: skip
    for content, message in bad.items():
        (tmp_path / "x.pbin").write_bytes(content)
        with pytest.raises(DataError, match=message):
            from_pbin([tmp_path / "x.pbin"], tmp_path / "out", WORDS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pbin"]


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), max_size=30),
    repeats=st.sampled_from([1, 1, 100]),
    protocol=st.integers(2, 5),
)
def test_pickled_pairs_are_read_as_pickle_reads_them(pairs, repeats, protocol) -> None:
    pairs = [tuple(map(int, pair)) for pair in pairs for _ in range(repeats)]
    assert [tuple(pair) for pair in read_pairs(pickle.dumps(pairs, protocol), "x").tolist()] == pairs


def test_a_legacy_index_of_lines_is_read_too(tmp_path) -> None:
    """Beside a JSONL file the original keeps (offset, length) of each line, pickled."""
    lines = [b'{"text": "a"}', b'{"text": "longer"}', b"{}"]
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
    pairs = [(int(start), len(line)) for start, line in zip(starts, lines, strict=False)]
    found = read_pairs(pickle.dumps(pairs), "corpus.idx")
    whole = b"\n".join(lines)
    assert [whole[start : start + length] for start, length in found.tolist()] == lines


class Evil:
    """What a crafted index does to whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_crafted_index_executes_nothing(tmp_path, protocol) -> None:
    witness = tmp_path / "executed"
    for index in (
        pickle.dumps(Evil(witness), protocol), pickle.dumps([(0, 8), Evil(witness)], protocol),
        pickle.dumps([(0, Evil(witness))], protocol),
        f"cos\nsystem\n(S'touch {witness}'\ntR.".encode(),
        pickle.dumps([(0, 8)], 4)[:-1] + f"cos\nsystem\n(S'touch {witness}'\ntR.".encode(),
    ):  # fmt: skip
        (tmp_path / "x.pbin").write_bytes(pbin(DOCUMENTS, index=index))
        with pytest.raises(DataError, match="document index"):
            from_pbin([tmp_path / "x.pbin"], tmp_path / "out", WORDS)
        assert not witness.exists()
    pickle.loads(pickle.dumps(Evil(witness), protocol))  # noqa: S301  the witness is real
    assert witness.exists()


def test_other_objects_are_refused() -> None:
    for value in (
        None, {}, [1, 2], [(1,)], [(1, 2, 3)], [[1, 2]], [(1, -2)], [(1, 2**63)], [(1, 2.0)], [("a", "b")], [(True, 1)],
        ((0, 1),), [[(0, 1)]], [(0, (1, 2))],
    ):  # fmt: skip
        for protocol in range(2, 6):
            with pytest.raises(DataError, match="document index"):
                read_pairs(pickle.dumps(value, protocol), "x")
    # A memo index of four billion makes the standard unpickler allocate as much; here it is skipped.
    assert read_pairs(b"\x80\x02]r\xff\xff\xff\xff(K\x01K\x02\x86e.", "x").tolist() == [[1, 2]]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_pickles_end_in_one_kind_of_error(data) -> None:
    content = bytearray(pickle.dumps([(number, 2**number) for number in range(60)], 4))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_pairs(content[: data.draw(st.integers(0, len(content)))], "x")
    except DataError:
        return
    assert found.dtype == np.int64 and found.shape[1] == 2


def write_ds(path: Path, documents, itemsize=2, losses=None) -> Path:
    """A file and its neighbours as datatrove's TokenizedFile writes them."""
    path.write_bytes(b"".join(np.array(document, f"<u{itemsize}").tobytes() for document in documents))
    ends = np.cumsum([len(document) for document in documents])
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends.tolist()))
    Path(f"{path}.metadata").write_text(f"gpt2|{itemsize}\n{ends[-1]}\n{ends[-1]} T")
    if losses is not None:
        Path(f"{path}.loss").write_bytes(struct.pack(f"<{len(losses)}?", *losses))
    return path


@pytest.mark.parametrize("itemsize", [2, 4])
def test_datatrove_files_are_linked_with_their_losses(tmp_path, itemsize) -> None:
    (tmp_path / "in").mkdir()
    losses = [number % 3 > 0 for number in range(sum(map(len, DOCUMENTS)))]
    one = write_ds(tmp_path / "in" / "00000_00000.ds", DOCUMENTS, itemsize, losses)
    write_ds(tmp_path / "in" / "00001_00000.ds", DOCUMENTS[1:], itemsize)
    made = from_datatrove([tmp_path / "in"], tmp_path / "out", WORDS)
    assert contents(tmp_path / "out") == DOCUMENTS + DOCUMENTS[1:]
    assert is_linked(one, tmp_path / "out" / "00000.bin") and made.dtype == ("uint16" if itemsize == 2 else "int32")
    opened = PackedFolder(tmp_path / "out")
    assert opened.mask(0).tolist() == losses and opened.mask(1) is None
    verify(tmp_path / "out")
    to_datatrove(tmp_path / "out", tmp_path / "back")
    for name in ("00000", "00001"):
        source = next((tmp_path / "in").glob(f"{name}_*.ds"))
        for suffix in ("", ".index", ".loss"):
            if Path(f"{source}{suffix}").exists():
                assert (tmp_path / "back" / f"{name}.ds{suffix}").read_bytes() == Path(f"{source}{suffix}").read_bytes()
    name, count, _ = (tmp_path / "back" / "00000.ds.metadata").read_text().split("\n")
    assert (name.split("|")[1], int(count)) == (str(itemsize), len(losses))
    # A missing end goes with a 1 in the mask.
    made = from_datatrove([one], tmp_path / "appended", Vocabulary(1001, 1000), append_end=True)
    assert contents(tmp_path / "appended") == [[*document, 1000] for document in DOCUMENTS]
    assert PackedFolder(tmp_path / "appended").mask(0).sum() == sum(losses) + len(DOCUMENTS)
    verify(tmp_path / "appended")


def test_datatrove_files_that_are_refused(tmp_path, folder) -> None:
    write_ds(tmp_path / "x.ds", DOCUMENTS, losses=[True])
    with pytest.raises(DataError, match="a byte for each of 14 tokens"):
        from_datatrove([tmp_path / "x.ds"], tmp_path / "out", WORDS)
    for losses in (bytes([2] * 14), bytes(13) + b"\xff"):
        (tmp_path / "x.ds.loss").write_bytes(losses)
        for vocabulary, append_end in ((WORDS, False), (Vocabulary(1001, 1000), True)):
            with pytest.raises(DataError, match="made of 0 and 1"):
                from_datatrove([tmp_path / "x.ds"], tmp_path / "out", vocabulary, append_end=append_end)
    (tmp_path / "x.ds.loss").unlink()
    for index, message in ((b"", "8 bytes per document"), (bytes(15), "8 bytes per document"),
                           (struct.pack("<2Q", 4, 13), "end at 13 tokens"), (struct.pack("<2Q", 20, 14), "end at"),
                           (bytes(8), "end at 0 tokens")):  # fmt: skip
        (tmp_path / "x.ds.index").write_bytes(index)
        with pytest.raises(DataError, match=message):
            from_datatrove([tmp_path / "x.ds"], tmp_path / "out", WORDS)
    (tmp_path / "x.ds.index").unlink()
    with pytest.raises(DataError, match=r"x\.ds\.index"):
        from_datatrove([tmp_path / "x.ds"], tmp_path / "out", WORDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .ds file"):
        from_datatrove([tmp_path / "empty"], tmp_path / "out", WORDS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds other files"):
        to_datatrove(folder, tmp_path / "mine", overwrite=True)
    to_datatrove(folder, tmp_path / "empty", overwrite=True)
    to_datatrove(folder, tmp_path / "empty", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "x.ds", "x.ds.metadata"]


def test_sidecars_go_where_their_documents_go(tmp_path) -> None:
    losses = [number % 3 > 0 for number in range(sum(map(len, DOCUMENTS)))]
    from_datatrove([write_ds(tmp_path / "x.ds", DOCUMENTS, losses=losses)], tmp_path / "in", WORDS)
    from modalities_data.prepare.shuffle import shuffle_folders

    shuffle_folders([tmp_path / "in"], tmp_path / "out", seed=1)
    mask, found = PackedFolder(tmp_path / "out").mask(0).tolist(), {}
    for document in contents(tmp_path / "out"):
        found[tuple(document)], mask = mask[: len(document)], mask[len(document) :]
    for document in DOCUMENTS:
        assert found[tuple(document)] == losses[: len(document)]
        losses = losses[len(document) :]
    verify(tmp_path / "out")


def test_the_commands(command, folder, tmp_path) -> None:
    def run(*arguments):
        done = command("convert", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    tokenizer = ("--tokenizer", folder / "tokenizer.json")
    assert run("to-megatron", folder, tmp_path / "m" / "all")["documents"] == 400
    assert run("from-megatron", tmp_path / "m" / "all", tmp_path / "a", *tokenizer)["written"] == 400
    assert run("to-datatrove", tmp_path / "a", tmp_path / "d")["files"] == 1
    again = run("from-datatrove", tmp_path / "d", tmp_path / "b", "--vocab-size", 600, "--end-id", 0)
    assert again["fingerprint"] == read_manifest(tmp_path / "a").fingerprint
    (tmp_path / "x.pbin").write_bytes(pbin(contents(folder)))
    assert run("from-pbin", tmp_path / "x.pbin", tmp_path / "c", *tokenizer)["tokens"] == again["tokens"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c") == contents(folder)
    mistakes = {
        ("from-pbin", tmp_path / "x.pbin", tmp_path / "y"): (2, "--vocab-size and --end-id"),
        ("from-pbin", tmp_path / "x.pbin", tmp_path / "c", *tokenizer): (3, "exists already"),
        ("from-pbin", folder / "00000.bin", tmp_path / "y", *tokenizer): (3, "is no .pbin file"),
        ("from-megatron", tmp_path / "none", tmp_path / "y", *tokenizer): (3, "none.idx"),
    }
    for arguments, (code, message) in mistakes.items():
        done = command("convert", *arguments)
        assert (done.returncode, done.stdout) == (code, "") and message in done.stderr, done.stderr
    assert not (tmp_path / "y").exists()


def test_a_writer_of_packed_folders_and_megatron_agree_on_int32(tmp_path) -> None:
    """The index of a shard is byte by byte what Megatron-LM's builder would write."""
    for dtype, stored in (("uint16", "<u2"), ("int32", "<i4")):
        with writing_shard(tmp_path, dtype, dtype) as writer:
            for document in DOCUMENTS:
                writer.append(np.array(document), np.array([len(document)]), 0)
        write_pair(tmp_path / "theirs", DOCUMENTS, stored)
        for suffix in ("bin", "idx"):
            assert (tmp_path / f"{dtype}.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
