"""Corpora that need no network, and the split."""

from __future__ import annotations

import json
import math
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_data import corpus
from modalities_data.corpus import write_lorem, write_standard_library
from modalities_data.jsonl import documents
from modalities_data.lorem import lorem_document
from modalities_data.prepare.split import split


def test_lorem_is_a_pure_function_of_seed_and_number() -> None:
    texts = [lorem_document(4, number) for number in range(300)]
    assert [lorem_document(4, number) for number in reversed(range(300))] == texts[::-1]
    assert len(set(texts)) == 300 and lorem_document(5, 0) != texts[0]
    assert sum(map(len, texts)) / 300 == pytest.approx(550, rel=0.2)


def test_the_lorem_of_version_1_is_pinned() -> None:
    """Another text under the same seed has to count LOREM_VERSION up: datasets are told apart by it."""
    assert corpus.lorem_document(0, 0) == PINNED


PINNED = (
    "Lu quiamotaman saelox nedaet a diagi treplaem bia repaen taem. Sian lia davidaequian miboquu. Piater "
    "sova lianipliar sian lia en taa, naeciabidaen cux vor cut cut cadaenaedaen bia quur.\n"
)


def test_lorem_has_frequencies_and_order_to_learn() -> None:
    """Zipf: the first ranks are far from even; Markov: the word before tells more than the frequencies alone."""
    sentences = [
        sentence.lower().replace(",", "").split()
        for number in range(600)
        for sentence in lorem_document(0, number).replace("\n", " ").split(".")
    ]
    single = Counter(word for words in sentences for word in words)
    pairs = Counter(pair for words in sentences for pair in pairwise(words))
    first = Counter()
    for (a, _), count in pairs.items():
        first[a] += count
    entropy = -sum(c / single.total() * math.log2(c / single.total()) for c in single.values())
    conditional = -sum(c / pairs.total() * math.log2(c / first[pair[0]]) for pair, c in pairs.items())
    assert single.most_common(1)[0][1] > 20 * sorted(single.values())[len(single) // 2]
    assert entropy < math.log2(len(single)) - 1
    assert conditional < entropy - 1.5


def test_lorem_file(tmp_path) -> None:
    report = write_lorem(tmp_path / "deep" / "x.jsonl", 20, seed=2)
    assert list(documents(tmp_path / "deep" / "x.jsonl")) == [lorem_document(2, number) for number in range(20)]
    assert report.documents == 20
    with pytest.raises(ConfigError, match="seed"):
        write_lorem(tmp_path / "x.jsonl", 1, seed=-1)


def test_a_small_library(tmp_path, monkeypatch) -> None:
    root = tmp_path / "lib"
    for name, content in {
        "b.py": b"b", "a/z.py": b"z", "a/copy.py": b"b", "a/latin.py": b"\xe9", "a/empty.py": b"", "a/data.txt": b"no",
        "encodings/cp1.py": b"t",
        "site-packages/x.py": b"x", "dist-packages/x.py": b"x", "a/__pycache__/x.py": b"x", "a.py": "é\r\n".encode(),
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    report = write_standard_library(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["source"], line["text"]) for line in lines] == [
        ("a.py", "é\r\n"),
        ("a/copy.py", "b"),
        ("a/z.py", "z"),
    ]
    assert report == (3, 6, {"duplicate": 1, "empty": 1, "not_utf8": 1, "table": 1})
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(DataError, match="no text to write"):
        write_standard_library(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_the_standard_library(tmp_path) -> None:
    report = write_standard_library(tmp_path / "x.jsonl")
    first = (tmp_path / "x.jsonl").read_bytes()
    entries = [json.loads(line) for line in first.splitlines()]
    assert len(entries) == report.documents and report.text_bytes > 5_000_000
    root = Path(sysconfig.get_paths()["stdlib"])
    for entry in entries[::100]:
        assert (root / entry["source"]).read_bytes().decode() == entry["text"]
    assert [entry["source"] for entry in entries] == sorted({entry["source"] for entry in entries})
    assert len({entry["text"] for entry in entries}) == len(entries)


def test_split_goes_by_the_text_alone(tmp_path) -> None:
    lines = [json.dumps({"text": f"text {number % 1500}", "id": number}) for number in range(2000)]
    source = tmp_path / "x.jsonl"
    source.write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    report = split(source, tmp_path / "t.jsonl", tmp_path / "h.jsonl", fraction=0.2)
    train, held_out = ((tmp_path / name).read_text().splitlines() for name in ("t.jsonl", "h.jsonl"))
    assert sorted(train + held_out) == sorted(lines)
    assert train == [line for line in lines if line in set(train)]
    assert report == (len(train), len(held_out)) and 320 < len(held_out) < 480
    for line in held_out:
        assert xxhash.xxh3_64_intdigest(json.loads(line)["text"].encode(), 0) < 0.2 * 2**64
    assert not {json.loads(line)["text"] for line in train} & {json.loads(line)["text"] for line in held_out}
    split(source, tmp_path / "t2.jsonl", tmp_path / "h2.jsonl", fraction=0.2, seed=1)
    assert (tmp_path / "h2.jsonl").read_text().splitlines() != held_out


def test_split_writes_both_files_or_none(tmp_path, write_jsonl) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["a", "b"])
    targets = tmp_path / "t.jsonl", tmp_path / "h.jsonl"
    with pytest.raises(DataError, match="of 2 documents in .*, 0 would be held out"):
        split(source, *targets, fraction=1e-9)
    source.write_text('{"text": "a"}\nbroken\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: JSON is malformed"):
        split(source, *targets, fraction=0.5)
    for fraction in (0, 1, -0.5, 1.5):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split(source, *targets, fraction=fraction)
    with pytest.raises(ConfigError, match="three different files"):
        split(source, source, targets[1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
