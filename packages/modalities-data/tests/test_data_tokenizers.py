"""Tokenizers: ids against the ``tokenizers`` library, the choice of the engine, and training."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Tokenizer
from modalities_data.jsonl import documents
from modalities_data.tokenizers import huggingface, parity
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.engines import FastokensEngine, TokenizersEngine
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
from modalities_data.tokenizers.opening import named_tokenizer
from modalities_data.tokenizers.train import train_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
fastokens_installed = pytest.mark.skipif(
    huggingface._loaded("fastokens", "{}")[1].startswith("No module"), reason="no wheel of fastokens for this platform"
)


@given(texts=st.lists(TEXT, max_size=5))
def test_bytes_are_utf8(texts) -> None:
    tokenizer = BytesTokenizer()
    ids, offsets = tokenizer.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert bytes(ids.tolist()) == "".join(texts).encode()
    for number, text in enumerate(texts):
        part = ids[offsets[number] : offsets[number + 1]].tolist()
        assert tokenizer.decode([*part, tokenizer.end_of_document]) == text
        assert tokenizer.encode(text) == part
    assert isinstance(tokenizer, Tokenizer)


def test_bytes_that_are_not_utf8_and_ids_that_are_no_bytes() -> None:
    assert BytesTokenizer().decode([65, 255, 66]) == "A\N{REPLACEMENT CHARACTER}B"
    with pytest.raises(DataError, match=r"0 to 256, found 65 to 300"):
        BytesTokenizer().decode([65, 300])


@pytest.fixture(scope="module")
def reference(tokenizer_file):
    return hf.Tokenizer.from_file(str(tokenizer_file))


@pytest.mark.parametrize("engine", ["auto", "tokenizers", pytest.param("fastokens", marks=fastokens_installed)])
def test_ids_are_those_of_the_tokenizers_library(tokenizer_file, lorem_file, reference, engine) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine=engine)
    texts = [*documents(lorem_file), *parity.odd_strings([])]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    ids, offsets = tokenizer.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (600, reference.token_to_id("<|endoftext|>"))
    assert isinstance(tokenizer, Tokenizer)
    nothing = tokenizer.encode_flat([])
    assert (nothing[0].tolist(), nothing[1].tolist()) == ([], [0])


@pytest.fixture(scope="module")
def engines(tokenizer_file):
    content = tokenizer_file.read_text()
    return FastokensEngine(content), TokenizersEngine(content)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return HuggingFaceTokenizer(tokenizer_file, engine="tokenizers")


@fastokens_installed
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
def test_both_engines_agree_and_decode_to_the_text(engines, tokenizer, texts) -> None:
    assert parity.first_difference(*engines, texts) == ""
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("engine", ["tokenizers", pytest.param("fastokens", marks=fastokens_installed)])
def test_a_document_cannot_forge_control_tokens(tokenizer_file, engine) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine=engine)
    text = "a <|endoftext|> b<|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


@pytest.mark.parametrize("engine", ["tokenizers", pytest.param("fastokens", marks=fastokens_installed)])
def test_nothing_is_cut_padded_or_added(tokenizer_file, reference, tmp_path, engine) -> None:
    """A tokenizer.json as saved by transformers can ask for all three."""
    changed = hf.Tokenizer.from_file(str(tokenizer_file))
    changed.enable_truncation(4)
    changed.enable_padding(length=64)
    changed.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path, engine=engine)
    text = "this is more than four tokens long"
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_fingerprint_is_of_the_content_not_of_the_file(tokenizer_file, tmp_path) -> None:
    same = json.loads(tokenizer_file.read_text())
    (tmp_path / "same.json").write_text(json.dumps(dict(reversed(same.items())), indent=8))
    merges = same["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (tmp_path / "other.json").write_text(json.dumps(same))
    prints = [HuggingFaceTokenizer(p).fingerprint for p in (tokenizer_file, tmp_path / "same.json")]
    assert prints[0] == prints[1] != HuggingFaceTokenizer(tmp_path / "other.json").fingerprint


def test_an_unknown_end_of_document_token_names_near_ones(tokenizer_file) -> None:
    with pytest.raises(ConfigError, match=r"no end-of-document token '<\|endoftxt\|>'[^\n]*\n.*<\|endoftext\|>"):
        HuggingFaceTokenizer(tokenizer_file, "<|endoftxt|>")


def test_files_that_are_no_tokenizers(tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no tokenizer at"):
        named_tokenizer(str(tmp_path / "none.json"))
    for content in (b"{}", b"[1]", b"\xff\xfe", b"not json", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json is no tokenizer\.json"):
            named_tokenizer(str(tmp_path / "bad.json"))


def test_ids_out_of_the_vocabulary_are_refused(tokenizer_file) -> None:
    with pytest.raises(DataError, match=r"0 to 599, found 5 to 600"):
        HuggingFaceTokenizer(tokenizer_file).decode([5, 600])


class WrongOn(FastokensEngine):
    """An engine that loses the last token of some documents."""

    suspect = ""

    def encode_flat(self, documents):
        ids, offsets = TokenizersEngine.encode_flat(self.right, documents)
        parts = [ids[a:b] for a, b in pairwise(offsets)]
        parts = [part[:-1] if self.suspect in text else part for text, part in zip(documents, parts, strict=True)]
        sizes = [0, *(len(part) for part in parts)]
        return np.concatenate([*parts, np.empty(0, np.uint32)]), np.cumsum(sizes)

    def __init__(self, content: str) -> None:
        self.right, self.version = TokenizersEngine(content), "0"


def test_auto_falls_back_with_one_line_where_built_in_strings_differ(tokenizer_file, monkeypatch, caplog) -> None:
    monkeypatch.setattr(huggingface, "FastokensEngine", WrongOn)
    monkeypatch.setattr(WrongOn, "suspect", "camelCase")
    with caplog.at_level(logging.WARNING):
        tokenizer = HuggingFaceTokenizer(tokenizer_file)
    assert tokenizer.engine == "tokenizers"
    (record,) = caplog.records
    assert "fastokens is not exact on one of the built-in strings" in record.message
    assert "camelCase" in record.message


def test_auto_falls_back_where_the_first_documents_differ(tokenizer_file, reference, monkeypatch, caplog) -> None:
    monkeypatch.setattr(huggingface, "FastokensEngine", WrongOn)
    monkeypatch.setattr(WrongOn, "suspect", "my own strange word")
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    assert tokenizer.engine == "fastokens"
    text = "here is my own strange word"
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert (tokenizer.engine, tokenizer.engine_version) == ("tokenizers", hf.__version__)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "failure", [ImportError("No module named 'fastokens'"), ValueError("unsupported"), BaseException("panic")]
)
def test_auto_falls_back_where_the_engine_does_not_load(tokenizer_file, monkeypatch, caplog, failure) -> None:
    def refuse(content):
        raise failure

    monkeypatch.setattr(huggingface, "FastokensEngine", refuse)
    assert HuggingFaceTokenizer(tokenizer_file).engine == "tokenizers"
    assert len(caplog.records) == 1 and str(failure) in caplog.text
    with pytest.raises(ConfigError, match="fastokens cannot load this tokenizer"):
        HuggingFaceTokenizer(tokenizer_file, engine="fastokens")


def test_a_kind_of_model_only_tokenizers_knows(tmp_path, caplog) -> None:
    tokenizer = hf.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert ours.encode("b a z") == [2, 1, 3]
    assert (ours.engine == "tokenizers") == bool(caplog.records)


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_another_process_gets_the_settled_engine(tokenizer_file, engine, caplog) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine=engine)
    copy = deepcopy(tokenizer)  # by the same state as a process gets
    assert (copy.engine, copy.fingerprint, copy.vocab_size) == (tokenizer.engine, tokenizer.fingerprint, 600)
    assert copy.encode("some text") == tokenizer.encode("some text")
    assert copy.decode(copy.encode("some text")) == "some text"


TRAIN = """
import sys
from pathlib import Path
from modalities_data.jsonl import documents
from modalities_data.tokenizers.train import train_tokenizer
print(train_tokenizer(documents(Path(sys.argv[1])), Path(sys.argv[2]), 700))
"""


def test_training_is_deterministic_whatever_the_threads(script, lorem_file, tmp_path) -> None:
    for threads in ("1", "4"):
        done = script(
            TRAIN, lorem_file, tmp_path / f"{threads}.json", RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads
        )
        assert (done.returncode, done.stdout) == (0, "700\n"), done.stderr
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "4.json").read_bytes()
    tokenizer = hf.Tokenizer.from_file(str(tmp_path / "1.json"))
    assert tokenizer.get_vocab_size() == 700
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "4.json"]


def test_training_tells_what_it_reached_and_refuses_what_cannot_be(tmp_path) -> None:
    assert train_tokenizer(iter(["ab ab"]), tmp_path / "t.json", 10_000, "<eod>") < 300
    assert HuggingFaceTokenizer(tmp_path / "t.json", "<eod>").end_of_document == 0
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer(iter(["a"]), tmp_path / "u.json", 256)
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(iter(texts), tmp_path / "u.json", 300)
    assert not (tmp_path / "u.json").exists()
