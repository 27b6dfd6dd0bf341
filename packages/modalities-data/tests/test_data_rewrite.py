"""Shuffling, cutting and filtering packed folders and JSONL files: no document is lost, changed or invented."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import checksum
from modalities_data.datasets import PackedDataset
from modalities_data.jsonl import documents
from modalities_data.manifest import read_manifest
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare import filter as filters
from modalities_data.prepare import joined
from modalities_data.prepare.chunk import chunk
from modalities_data.prepare.filter import filter_documents
from modalities_data.prepare.pack import pack
from modalities_data.prepare.shuffle import shuffle_folders, shuffle_lines
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
from modalities_data.tokenizers.train import train_tokenizer


def contents(folder):
    """Every document, read one by one."""
    opened = PackedFolder(folder)
    return [tuple(opened.document(number).tolist()) for number in range(opened.manifest.documents)]


@pytest.fixture(scope="module")
def folder(lorem_file, tokenizer_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("rewrite") / "corpus"
    pack(lorem_file, output, HuggingFaceTokenizer(tokenizer_file), workers=1, range_bytes=60_000)
    return output


def test_shuffled_folder_has_the_same_documents_in_another_order(folder, tmp_path, monkeypatch) -> None:
    before = contents(folder)
    made = shuffle_folders([folder], tmp_path / "a", seed=5, shard_tokens=20_000)
    after = contents(tmp_path / "a")
    assert Counter(after) == Counter(before) and after != before
    places = {document: number for number, document in enumerate(before)}
    moved = np.array([places[document] for document in after])
    assert abs(np.corrcoef(moved, np.arange(len(moved)))[0, 1]) < 0.2
    verify(tmp_path / "a")
    source = read_manifest(folder)
    assert (made.documents, made.tokens, made.text_bytes) == (source.documents, source.tokens, source.text_bytes)
    assert made.tokenizer == source.tokenizer and "text_bytes" not in made.options
    assert made.accounting.written == made.accounting.documents == 400
    assert len(made.shards) > 3 and all(20_000 <= shard.tokens < 22_000 for shard in made.shards[:-1])
    assert made.inputs[0].file.endswith("manifest.json")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    # The same whatever is held in memory; another seed, another order.
    monkeypatch.setattr(joined, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(joined, "OPEN_INDEXES", 1)
    monkeypatch.setattr(joined, "BATCH_TOKENS", 1000)
    again = shuffle_folders([folder], tmp_path / "b", seed=5, shard_tokens=20_000)
    assert again.fingerprint == made.fingerprint
    shuffle_folders([folder], tmp_path / "c", seed=6)
    assert contents(tmp_path / "c") != after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert PackedDataset(tmp_path / "a", 64).bytes_per_token == PackedDataset(folder, 64).bytes_per_token


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"x").replace(b"\r", b"y")), max_size=60),
    bucket=st.integers(1, 400),
    seed=st.integers(0, 2**63 - 1),
)
def test_shuffled_lines_are_the_same_lines(tmp_path_factory, lines, bucket, seed) -> None:
    folder = tmp_path_factory.mktemp("lines")
    lines = [line.removeprefix(b"\xef\xbb\xbf") for line in lines]
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    kept = [line for line in lines if line and not line.isspace()]
    if not kept:
        with pytest.raises(DataError, match="no lines"):
            shuffle_lines(folder / "in.jsonl", folder / "out.jsonl", seed)
        return
    record = shuffle_lines(folder / "in.jsonl", folder / "out.jsonl", seed, bucket_bytes=bucket)
    content = (folder / "out.jsonl").read_bytes()
    assert Counter(content[:-1].split(b"\n")) == Counter(kept)
    assert record.accounting.written == len(kept) and record.bytes == len(content)
    shuffle_lines(folder / "in.jsonl", folder / "again.jsonl", seed)
    assert (folder / "again.jsonl").read_bytes() == content
    assert len(list(folder.iterdir())) == 5  # two outputs, two records and the input: no bucket is left


def test_lines_keep_their_bytes_but_for_ends_and_mark(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \r\n{ "text" : "\xc3\xbc"}')
    record = shuffle_lines(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = (tmp_path / "out.jsonl").read_bytes()
    assert sorted(found.splitlines()) == [b'{ "text" : "\xc3\xbc"}', b'{"text": "a"}']
    assert record.accounting.blank_lines == 2
    stored = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert stored["options"]["seed"] == 0 and stored["accounting"]["written"] == 2
    with pytest.raises(ConfigError, match="is an input too"):
        shuffle_lines(tmp_path / "in.jsonl", tmp_path / "in.jsonl")


def test_an_interrupted_job_leaves_nothing_and_a_killed_one_is_done_again(folder, tmp_path) -> None:
    made = shuffle_folders([folder], tmp_path / "right", seed=5)

    def interrupt(done, total, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shuffle_folders([folder], tmp_path / "out", seed=5, on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]
    # What a killed process leaves: shards that look whole, of the same job or of another.
    (tmp_path / ".out.partial" / ".state").mkdir(parents=True)
    (tmp_path / ".out.partial" / ".state" / "job.json").write_text("{}")
    for name in ("00000.bin", "00000.idx", "00007.bin", ".lock", "tokenizer.model"):
        (tmp_path / ".out.partial" / name).write_bytes(b"left")
    assert shuffle_folders([folder], tmp_path / "out", seed=5).fingerprint == made.fingerprint
    verify(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "right").iterdir()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "right"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_killed_anywhere_and_run_again(kind, folder, lorem_file, tmp_path) -> None:
    """SIGKILL at ten moments between the start and the end: never a wrong output, never a refusal to start again."""
    source = folder
    if kind == "lines":
        source = tmp_path / "big.jsonl"
        source.write_bytes(lorem_file.read_bytes() * 100)
    arguments = [sys.executable, "-m", "modalities_data", "shuffle", str(source), str(tmp_path / "out"), "--overwrite"]
    arguments += ["--shard-tokens", "1000"] if kind == "folder" else []
    started = time.monotonic()
    right = [str(tmp_path / "right") if argument == str(tmp_path / "out") else argument for argument in arguments]
    subprocess.run(right, check=True, timeout=120, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - started
    for moment in range(10):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.3 + 0.07 * moment))
        process.kill()
        process.wait(timeout=60)
        if kind == "folder" and (tmp_path / "out").exists():
            verify(tmp_path / "out")
        elif (tmp_path / "out").exists():
            assert (tmp_path / "out").read_bytes() == (tmp_path / "right").read_bytes()
    subprocess.run(arguments, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert not (tmp_path / ".out.partial").exists()
    if kind == "folder":
        assert read_manifest(tmp_path / "out").fingerprint == verify(tmp_path / "right").fingerprint
    else:
        assert (tmp_path / "out").read_bytes() == (tmp_path / "right").read_bytes()


def test_several_inputs_compressed_and_of_other_kinds(tmp_path) -> None:
    lines = [json.dumps({"text": f"text {number}", "even": number % 2 == 0}).encode() for number in range(1000)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines[:300]))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b"\r\n".join(lines[300:]) + b"\n"))
    record = shuffle_lines(tmp_path / "in", tmp_path / "out.jsonl", bucket_bytes=5000)
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(lines)
    assert [entry.bytes for entry in record.inputs] == [
        file.stat().st_size for file in sorted((tmp_path / "in").iterdir())
    ]
    assert record.inputs[1].checksum == checksum(tmp_path / "in" / "b.jsonl.gz")
    even = filter_documents(tmp_path / "in", tmp_path / "even.jsonl", filters.key_equals("even", "true"))
    assert even.accounting.written == 500 and even.inputs == record.inputs
    assert (tmp_path / "even.jsonl").read_bytes().splitlines() == lines[::2]
    (tmp_path / "x.txt").write_text("one text")
    filter_documents(tmp_path / "x.txt", tmp_path / "x.jsonl", filters.contains(("one",)))
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"text": "one text"}
    with pytest.raises(ConfigError, match="works on lines of JSON"):
        shuffle_lines(tmp_path / "x.txt", tmp_path / "y.jsonl")
    for failing in (shuffle_lines, filter_documents):
        with pytest.raises(DataError, match=r"c\.jsonl\.gz is (no|cut)"):
            (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
            more = (filters.contains(("a",)),) if failing is filter_documents else ()
            failing(tmp_path / "c.jsonl.gz", tmp_path / "y.jsonl", *more)
    assert not (tmp_path / "y.jsonl").exists() and not list(tmp_path.glob(".*"))


def test_several_folders_are_mixed(folder, tmp_path) -> None:
    made = shuffle_folders([folder, folder], tmp_path / "out", seed=1)
    assert Counter(contents(tmp_path / "out")) == Counter(contents(folder) * 2)
    assert made.text_bytes == 2 * read_manifest(folder).text_bytes
    origins = PackedFolder(tmp_path / "out").origins(0)
    assert origins.sum() == 400 and 100 < origins[:400].sum() < 300


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_chunks_share_out_every_document_equally(folder, tmp_path, parts) -> None:
    found, sizes = [], []
    for part in range(1, parts + 1):
        made = chunk([folder, folder], tmp_path / str(part), part, parts)
        verify(tmp_path / str(part))
        found += contents(tmp_path / str(part))
        sizes.append(made.tokens)
        assert made.accounting.skipped == {"other_part": 800 - made.documents}
        source = read_manifest(folder)
        assert made.text_bytes / made.tokens == pytest.approx(source.text_bytes / source.tokens, rel=0.05)
        assert ("text_bytes" in made.options) == (parts > 1)
        # Where each document came from: the first or the second folder.
        origins = np.concatenate([PackedFolder(tmp_path / str(part)).origins(n) for n in range(len(made.shards))])
        assert np.all(np.diff(origins.astype(int)) >= 0) and set(origins) == {0, 1}
    assert Counter(found) == Counter(contents(folder) * 2)
    longest = max(map(len, found))
    assert max(sizes) - min(sizes) <= 2 * longest


def test_a_shuffled_chunk_has_the_documents_of_the_plain_one(folder, tmp_path) -> None:
    chunk([folder], tmp_path / "plain", 1, 3)
    chunk([folder], tmp_path / "shuffled", 1, 3, seed=3)
    plain, shuffled = contents(tmp_path / "plain"), contents(tmp_path / "shuffled")
    assert Counter(plain) == Counter(shuffled) and plain != shuffled
    with pytest.raises(DataError, match="has no documents"):
        chunk([folder], tmp_path / "none", 3, 1_000_000)
    with pytest.raises(ConfigError, match="numbers 1 to 3, not 4"):
        chunk([folder], tmp_path / "none", 4, 3)
    with pytest.raises(DataError, match="plain exists already"):
        chunk([folder], tmp_path / "plain", 1, 3)
    before = contents(tmp_path / "plain")
    assert chunk([folder], tmp_path / "plain", 2, 3, overwrite=True).documents == len(contents(tmp_path / "plain"))
    assert before != contents(tmp_path / "plain")


def test_folders_of_different_tokenizers_are_not_joined(folder, lorem_file, tmp_path) -> None:
    train_tokenizer(documents(lorem_file), tmp_path / "other.json", 600)
    pack(lorem_file, tmp_path / "other", HuggingFaceTokenizer(tmp_path / "other.json"), workers=1)
    prints = [read_manifest(path).tokenizer.fingerprint for path in (folder, tmp_path / "other")]
    with pytest.raises(DataError, match="different tokenizers") as caught:
        chunk([folder, tmp_path / "other"], tmp_path / "out", 1, 2)
    assert all(found in caught.value.message for found in prints)
    assert not (tmp_path / "out").exists()


def test_filtered_folder_keeps_what_passes_and_counts_the_rest(folder, lorem_file, tmp_path) -> None:
    before, texts = contents(folder), list(documents(lorem_file))
    rules = {
        "min_tokens": filters.min_tokens(150), "max_tokens": filters.max_tokens(400),
        "not_contains": filters.not_contains(("中文",)),
    }  # fmt: skip
    made = filter_documents(folder, tmp_path / "out", rules)
    sizes = [len(document) - 1 for document in before]
    expected = [
        document for document, size, text in zip(before, sizes, texts, strict=True)
        if 150 <= size <= 400 and "中文" not in text
    ]  # fmt: skip
    assert contents(tmp_path / "out") == expected and 0 < len(expected) < 400
    skipped = {
        "max_tokens": sum(size > 400 for size in sizes), "min_tokens": sum(size < 150 for size in sizes),
        "not_contains": sum(150 <= s <= 400 and "中文" in text for s, text in zip(sizes, texts, strict=True)),
    }  # fmt: skip
    assert made.accounting.skipped == {rule: count for rule, count in skipped.items() if count}
    assert made.accounting.documents == 400 and made.options["rules"] == sorted(rules)
    verify(tmp_path / "out")
    with pytest.raises(DataError, match="no document is left"):
        filter_documents(folder, tmp_path / "none", {"min_tokens": filters.min_tokens(10**9)})
    with pytest.raises(ConfigError, match="keeps no fields"):
        filter_documents(folder, tmp_path / "none", filters.key_equals("a", "b"))
    with pytest.raises(ConfigError, match="no rule"):
        filter_documents(folder, tmp_path / "none", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_filtered_lines_are_unchanged(tmp_path) -> None:
    lines = [
        b'{"text": "one two", "lang": "en", "meta": {"score": 3}}', b'{"text": "drei", "lang": "de"}',
        b'{"lang": "en",  "text": "four \\u00fc", "meta": {"score": "3"}}', b'{"text": "", "lang": "en"}',
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")

    def kept(*predicates, **options):
        rules = {str(number): one for number, one in enumerate(predicates)}
        record = filter_documents(tmp_path / "in.jsonl", tmp_path / "out.jsonl", rules, overwrite=True, **options)
        assert record.accounting.balanced() and record.accounting.blank_lines == 1
        return [lines.index(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]

    assert kept(filters.key_equals("lang", "en")) == [0, 2, 3]
    assert kept(filters.key_equals("meta.score", "3")) == [0, 2]
    assert kept(filters.key_equals("meta.score", '"3"')) == [2]
    assert kept(filters.contains(("o", "w"))) == [0]
    assert kept(filters.min_tokens(5), tokenizer=BytesTokenizer()) == [0, 2]
    assert kept(lambda document: document.fields.get("meta") is None) == [1, 3]
    with pytest.raises(ConfigError, match="counted by a tokenizer"):
        kept(filters.max_tokens(3))
    with pytest.raises(DataError, match="exists already"):
        filter_documents(tmp_path / "in.jsonl", tmp_path / "out.jsonl", filters.contains(("o",)))
    (tmp_path / "bad.jsonl").write_bytes(lines[0] + b"\nnot json\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        filter_documents(tmp_path / "bad.jsonl", tmp_path / "x.jsonl", filters.contains(("o",)))
    record = filter_documents(tmp_path / "bad.jsonl", tmp_path / "x.jsonl", filters.contains(("o",)), on_error="skip")
    assert (record.accounting.written, record.accounting.failed) == (1, 1)


def test_registered_predicates(monkeypatch) -> None:
    class Entry:
        name = "short"

        def load(self):
            return lambda document: len(document.text) < 5

    monkeypatch.setattr(filters, "entry_points", lambda group: [Entry()] if group == "modalities.predicates" else [])
    assert filters.registered("short")(filters.Document(lambda: "abc", lambda: 3, dict))
    with pytest.raises(ConfigError, match=r"no predicate 'long'\n.*short"):
        filters.registered("long")


def test_the_commands(command, folder, lorem_file, tmp_path) -> None:
    def run(*arguments):
        done = command(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    shuffled = run("shuffle", folder, tmp_path / "shuffled", "--seed", 3)
    assert (shuffled["written"], shuffled["fingerprint"]) == (400, verify(tmp_path / "shuffled").fingerprint)
    assert run("shuffle", lorem_file, tmp_path / "shuffled.jsonl")["written"] == 400
    assert Counter(documents(tmp_path / "shuffled.jsonl")) == Counter(documents(lorem_file))
    parts = [run("chunk", folder, tmp_path / f"part-{part}", "--part", f"{part}/2") for part in (1, 2)]
    assert sum(part["written"] for part in parts) == 400
    rules = ("--max-tokens", 300, "--not-contains", "ünï", "--not-contains", "😀")
    kept = run("filter", folder, tmp_path / "filtered", *rules)
    assert kept["written"] + sum(kept["skipped"].values()) == 400
    assert set(kept["skipped"]) <= {"max_tokens", "not_contains"}
    lines = run("filter", lorem_file, tmp_path / "filtered.jsonl", *rules, "--tokenizer", folder / "tokenizer.json")
    assert lines["written"] == kept["written"]
    mistakes = {
        ("chunk", folder, tmp_path / "x", "--part", "3/2"): (2, "is not I/N"),
        ("filter", folder, tmp_path / "x"): (2, "no rule to filter by"),
        ("filter", lorem_file, tmp_path / "x", "--key-equals", "lang"): (2, "not like KEY=VALUE"),
        ("filter", lorem_file, tmp_path / "x", "--predicate", "none"): (2, "there is no predicate 'none'"),
        ("shuffle", folder, tmp_path / "shuffled"): (3, "exists already"),
        ("shuffle", tmp_path / "none", tmp_path / "x"): (3, "No such file"),
    }
    for arguments, (code, message) in mistakes.items():
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (code, "") and message in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()
