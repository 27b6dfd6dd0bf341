"""Inputs of every kind give the documents that were put in, in an order that never changes, wherever they are cut."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_data import jsonl
from modalities_data.inputs.files import find_inputs
from modalities_data.inputs.reading import documents, read
from modalities_data.inputs.units import cut
from modalities_data.lorem import lorem_document
from modalities_data.packed import PackedFolder
from modalities_data.prepare.pack import pack
from modalities_data.prepare.split import split
from modalities_data.tokenizers.bytes import BytesTokenizer

TEXTS = [lorem_document(5, number) + ("ünï \U0001f600" if number % 3 == 0 else "") for number in range(60)]


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, texts=TEXTS) -> Path:
    """``texts`` in the form the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines(texts)))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(texts)))
    else:
        path.write_bytes(lines(texts))
    return path


def decoded(folder: Path) -> list[str]:
    opened = PackedFolder(folder)
    return [BytesTokenizer().decode(opened.document(n).tolist()) for n in range(opened.manifest.documents)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_documents_and_the_same_tokens(tmp_path, ending) -> None:
    source = write(tmp_path / f"x{ending}")
    assert list(documents(source)) == TEXTS
    seen: list[tuple[int, int, int]] = []
    report = pack(
        source, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=3000,
        on_progress=lambda *now: seen.append(now),
    )  # fmt: skip
    assert decoded(tmp_path / "out") == TEXTS
    assert seen[-1][0] == seen[-1][1] == report.bytes_read
    (entry,) = report.manifest.inputs
    assert (entry.file, entry.bytes) == (str(source), source.stat().st_size)
    whole = ending.count(".") == 2
    assert (len(report.manifest.shards) == 1) == whole
    if whole:
        assert entry.checksum == xxhash.xxh3_64_hexdigest(source.read_bytes())


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6), min_size=1),
    kinds=st.lists(st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]), min_size=8, max_size=8),
    target=st.integers(1, 400),
)
def test_any_files_and_any_cut_give_all_documents_in_order(tmp_path_factory, files, kinds, target) -> None:
    folder = tmp_path_factory.mktemp("files")
    for number, texts in enumerate(files):
        write(folder / f"{number:03d}{kinds[number % 8]}", texts)
    found = find_inputs(folder)
    expected = [text for texts in files for text in texts]
    if not any(file.bytes for file in found) or not expected:
        return
    units = cut(found, target, "text")
    assert [text for unit in units for piece in unit for block in read(piece) for text in block.texts] == expected
    sizes = [sum(piece.bytes for piece in unit) for unit in units]
    assert all(size >= target for size in sizes[:-1])
    assert list(documents(folder)) == expected


def test_files_folders_patterns_in_the_order_of_their_names(tmp_path, caplog) -> None:
    for name in ("b.jsonl", "a/z.jsonl.gz", "a/c.parquet", "a/.hidden.jsonl", "_temporary/x.jsonl", "readme.md"):
        write(tmp_path / name, [name])
    with caplog.at_level(logging.WARNING):
        names = [Path(file.name).relative_to(tmp_path).as_posix() for file in find_inputs(tmp_path)]
    assert names == ["a/c.parquet", "a/z.jsonl.gz", "b.jsonl"]
    assert "1 files of other kinds are not read" in caplog.text and "readme.md" in caplog.text
    matches = [Path(file.name).name for file in find_inputs(f"{tmp_path}/**/*.jsonl*")]
    assert matches == ["x.jsonl", "z.jsonl.gz", "b.jsonl"]
    given_order = find_inputs([tmp_path / "b.jsonl", tmp_path / "a"])
    assert [Path(file.name).name for file in given_order] == ["b.jsonl", "c.parquet", "z.jsonl.gz"]
    assert [file.format for file in find_inputs(tmp_path / "readme.md")] == ["jsonl"]
    assert len(find_inputs(tmp_path, "text")) == 4
    with caplog.at_level(logging.WARNING):
        assert len(find_inputs([tmp_path / "b.jsonl"] * 2)) == 2
    assert "more than once" in caplog.text


def test_what_a_pattern_names_is_not_hidden_and_a_dot_is_a_folder(tmp_path, monkeypatch) -> None:
    write(tmp_path / "_raw" / "_x.jsonl", ["a"])
    write(tmp_path / "_raw" / ".y.jsonl", ["b"])
    assert [Path(file.name).name for file in find_inputs(f"{tmp_path}/_raw/*.jsonl")] == ["_x.jsonl"]
    monkeypatch.chdir(tmp_path / "_raw")
    with pytest.raises(DataError, match="there is no such file"):
        find_inputs(".")
    write(tmp_path / "_raw" / "z.jsonl", ["c"])
    assert [file.name for file in find_inputs(".")] == ["./z.jsonl"]


def test_splitting_reads_every_format_and_keeps_lines_as_they_are(tmp_path) -> None:
    write(tmp_path / "in" / "a.parquet", TEXTS[:30])
    (tmp_path / "in" / "b.jsonl").write_text(
        "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS[30:]))
    )
    report = split(tmp_path / "in", tmp_path / "train.jsonl", tmp_path / "held-out.jsonl", 0.3)
    sides = [(tmp_path / name).read_text().splitlines() for name in ("train.jsonl", "held-out.jsonl")]
    assert [len(side) for side in sides] == [report.train, report.held_out] and min(map(len, sides)) > 5
    texts = [json.loads(line)["text"] for side in sides for line in side]
    assert sorted(texts) == sorted(TEXTS)
    assert set((tmp_path / "in" / "b.jsonl").read_text().splitlines()) <= {line for side in sides for line in side}


def test_nothing_there_is_an_error_that_says_what_is_read(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    for source in (tmp_path / "empty", f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match="there is no such file"):
            find_inputs(source)
    with pytest.raises(DataError, match=r"no input files \(1 others\)\n.*\.parquet"):
        find_inputs(tmp_path / "pictures")
    with pytest.raises(DataError, match="No such file"):
        find_inputs(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="there is no input"):
        find_inputs([])
    with pytest.raises(ConfigError, match="format is one of"):
        find_inputs(tmp_path, "csv")
    (tmp_path / "x.parquet.gz").touch()
    with pytest.raises(ConfigError, match="compressed inside"):
        find_inputs(tmp_path / "x.parquet.gz")


def test_a_text_file_is_a_document(tmp_path) -> None:
    texts = {"a.txt": "\ufeffone\r\ntwo\n", "b.txt": "", "c.txt": "drei ü"}
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text.encode())
    (tmp_path / "in" / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    made = pack(tmp_path / "in", tmp_path / "out", BytesTokenizer(), workers=1).manifest
    assert decoded(tmp_path / "out") == ["one\r\ntwo\n", "drei ü", "packed"]
    assert made.accounting.documents == 4 and made.accounting.skipped == {"empty": 1}
    source = made.shards[0].source
    assert source is not None and source.file.endswith("a.txt") and source.last_file.endswith("d.txt.gz")
    assert [Path(entry.file).name for entry in made.inputs] == ["a.txt", "b.txt", "c.txt", "d.txt.gz"]
    (tmp_path / "in" / "c.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"c\.txt: the text is not UTF-8 \(.* at byte 3\)"):
        pack(tmp_path / "in", tmp_path / "other", BytesTokenizer(), workers=1)


def test_what_is_wrong_in_a_compressed_file_is_named_with_its_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 100)
    content = lines(["a" * 30] * 20) + b"\n{broken\n" + lines(["b"]) + b'{"txt": 1}\n' + lines(["c"])
    for name, compressed in (("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", pytest.importorskip("zstandard").compress)):
        (tmp_path / name).write_bytes(compressed(content))
        with pytest.raises(DataError, match=rf"{name}:22: JSON is malformed"):
            pack(tmp_path / name, tmp_path / "out", BytesTokenizer(), workers=1)
        made = pack(tmp_path / name, tmp_path / name[8:], BytesTokenizer(), workers=1, on_error="skip").manifest
        assert (made.accounting.documents, made.accounting.written, made.accounting.failed) == (24, 22, 2)
        rejected = (tmp_path / name[8:] / "00000.rejected.jsonl").read_text().splitlines()
        assert [json.loads(line)["line"] for line in rejected] == [22, 24]


def test_compressed_files_of_several_parts_and_cut_ones(tmp_path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for name, compress in (("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)):
        path = tmp_path / name
        whole = compress(lines(TEXTS[:30])) + compress(lines(TEXTS[30:]))
        path.write_bytes(whole)
        assert list(documents(path)) == TEXTS
        for cut_at in (10, len(whole) // 3, len(whole) - 5):
            path.write_bytes(whole[:cut_at])
            with pytest.raises(DataError, match="cut off|damaged|empty"):
                list(documents(path))
        path.write_bytes(b"this is neither" * 10)
        with pytest.raises(DataError, match="no gzip file|no zstd file"):
            list(documents(path))
        flipped = bytearray(whole)
        flipped[len(flipped) // 4] ^= 0x55
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            list(documents(path))


def test_rows_of_parquet_without_text(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"], "n": [1, 2, 3, 4]}), path, row_group_size=2)
    with pytest.raises(DataError, match=r"x\.parquet: row 1: there is no text \(null\)"):
        pack(path, tmp_path / "out", BytesTokenizer(), workers=1)
    made = pack(path, tmp_path / "out", BytesTokenizer(), workers=1, on_error="skip").manifest
    assert decoded(tmp_path / "out") == ["a", "b"]
    assert (made.accounting.failed, made.accounting.skipped) == (1, {"empty": 1})
    (line,) = (tmp_path / "out" / "00000.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 1
    with pytest.raises(DataError, match=r"no column 'body'\n.*it has: text, n"):
        list(documents(path, "body"))
    with pytest.raises(DataError, match="the column 'n' holds int64, not text"):
        list(documents(path, "n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or no Parquet file"):
        list(documents(path))


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view", "invalid"])
def test_columns_of_text_of_every_kind(tmp_path, kind) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["a", "ü", "a"])
    if kind == "large_string":
        column = column.cast(pyarrow.large_string())
    elif kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "string_view":
        column = column.cast(pyarrow.string_view())
    else:
        column = pyarrow.array([b"a", b"\xff\xfe", b"a"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    if kind == "invalid":
        with pytest.raises(DataError, match=r"row 1: the text is not UTF-8"):
            list(documents(tmp_path / "x.parquet"))
    else:
        assert list(documents(tmp_path / "x.parquet")) == ["a", "ü", "a"]


def test_addresses(tmp_path) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("one.jsonl", "two.jsonl.gz", "three.parquet"):
        local = write(tmp_path / "local" / name, [name, *TEXTS])
        system.pipe_file(f"/corpus/{name}", local.read_bytes())
    expected = [text for name in ("one.jsonl", "three.parquet", "two.jsonl.gz") for text in (name, *TEXTS)]
    assert list(documents("memory://corpus")) == expected
    assert list(documents("memory://corpus/*.jsonl")) == ["one.jsonl", *TEXTS]
    assert list(documents("memory://corpus/one.jsonl")) == ["one.jsonl", *TEXTS]
    pack("memory://corpus", tmp_path / "remote", BytesTokenizer(), workers=1, range_bytes=3000)
    assert decoded(tmp_path / "remote") == expected
    made = pack(f"file://{tmp_path}/local", tmp_path / "file", BytesTokenizer(), workers=2, range_bytes=3000).manifest
    pack(tmp_path / "local", tmp_path / "plain", BytesTokenizer(), workers=1, range_bytes=3000)
    assert decoded(tmp_path / "file") == expected
    assert made.fingerprint == PackedFolder(tmp_path / "plain").manifest.fingerprint
    for address in ("memory://none/x.jsonl", f"file://{tmp_path}/none.jsonl"):
        with pytest.raises(DataError, match="none"):
            find_inputs(address)
    with pytest.raises(ConfigError, match="cannot read nosuch://x"):
        find_inputs("nosuch://x")


@pytest.mark.parametrize(("ending", "package"), [(".parquet", "pyarrow"), (".jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, script, ending, package) -> None:
    source = write(tmp_path / f"x{ending}")
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from modalities_data.__main__ import _run\n"
        "sys.argv = ['modalities-data', 'pack', sys.argv[1], sys.argv[2], '--tokenizer', 'bytes', '--workers', '1']\n"
        "sys.exit(_run())\n"
    )
    done = script(code, source, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert f"needs {package}" in done.stderr and 'pip install "modalities-data[' in done.stderr


def test_a_document_of_50_megabytes(tmp_path) -> None:
    long = "0123456789abcdef" * (50 << 16)
    (tmp_path / "x.jsonl").write_bytes(lines(["a", long, "b"]))
    made = pack(tmp_path / "x.jsonl", tmp_path / "out", BytesTokenizer(), workers=1).manifest
    assert made.accounting.written == 3 and made.tokens == len(long) + 5
    opened = PackedFolder(tmp_path / "out")
    assert bytes(opened.document(1)[:-1].astype("u1")) == long.encode()
