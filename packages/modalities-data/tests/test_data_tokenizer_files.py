"""SentencePiece and tiktoken files, gigatoken, parity digests, and the edges of vocabularies."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import tokenizers as hf

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Tokenizer
from modalities_data.jsonl import documents
from modalities_data.lorem import lorem_document
from modalities_data.manifest import read_manifest
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers import extras, huggingface, parity
from modalities_data.tokenizers.engines import GigatokenEngine, TokenizersEngine
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
from modalities_data.tokenizers.opening import named_tokenizer, recorded_tokenizer
from modalities_data.tokenizers.sentencepiece import SentencePieceTokenizer
from modalities_data.tokenizers.tiktoken import TiktokenTokenizer, read_ranks


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece BPE of 400 pieces with byte fallback."""
    library = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([lorem_document(3, number) for number in range(60)]), model_writer=content,
        vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sentencepiece") / "some.model"
    path.write_bytes(content.getvalue())
    return path


def test_sentencepiece_ids_are_those_of_its_library(model_file, lorem_file) -> None:
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(model_file))
    tokenizer = SentencePieceTokenizer(model_file)
    texts = [*list(documents(lorem_file))[:50], "", "a </s> b<s>", "ünï 中文 \U0001f600"]
    ids, offsets = tokenizer.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [library.encode(text) for text in texts]
    assert tokenizer.end_of_document == library.eos_id() not in ids
    assert (tokenizer.vocab_size, tokenizer.end_of_document_token) == (400, "</s>")
    assert tokenizer.decode([*tokenizer.encode("ünï 中文"), tokenizer.end_of_document]) == "ünï 中文"
    assert isinstance(tokenizer, Tokenizer)
    assert [array.tolist() for array in tokenizer.encode_flat([])] == [[], [0]]
    assert deepcopy(tokenizer).encode("as another process") == tokenizer.encode("as another process")
    with pytest.raises(DataError, match="0 to 399, found 5 to 400"):
        tokenizer.decode([5, 400])


def test_sentencepiece_mistakes(model_file, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no piece '<none>' to end documents"):
        SentencePieceTokenizer(model_file, "<none>")
    with pytest.raises(ConfigError, match="no tokenizer at"):
        SentencePieceTokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match=r"bad\.model is no SentencePiece model"):
        named_tokenizer(str(tmp_path / "bad.model"))


@pytest.fixture(scope="module")
def ranks_file(tokenizer_file, tmp_path_factory):
    """The vocabulary of the byte-level BPE as tiktoken writes it, with its own ids."""
    pytest.importorskip("tiktoken")
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary = json.loads(tokenizer_file.read_text())["model"]["vocab"]
    path = tmp_path_factory.mktemp("tiktoken") / "some.tiktoken"
    lines = [
        b64encode(bytes(byte_of[character] for character in token)) + f" {rank}\n".encode()
        for token, rank in vocabulary.items() if token != "<|endoftext|>"
    ]  # fmt: skip
    path.write_bytes(b"".join(lines))
    return path


def byte_characters() -> list[str]:
    """How GPT-2 spells each byte: itself where it is a visible character, else the next one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def test_tiktoken_ids_are_those_of_the_tokenizers_library(ranks_file, tokenizer_file, lorem_file) -> None:
    reference = hf.Tokenizer.from_file(str(tokenizer_file))
    reference.encode_special_tokens = True
    tokenizer = TiktokenTokenizer(ranks_file, "gpt2", {"<|endoftext|>": 0})
    # The library differs from tiktoken on white space only it counts as such; those are not in texts.
    texts = [
        *list(documents(lorem_file))[:100],
        "",
        "a <|endoftext|> b",
        "I'm 12,345\n\n\tx  y ",
        "ünï 中文 \U0001f600",
    ]
    ids, offsets = tokenizer.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [reference.encode(text).ids for text in texts]
    assert [tokenizer.decode([*tokenizer.encode(text), 0]) for text in texts] == texts
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (600, 0)
    assert isinstance(tokenizer, Tokenizer)
    assert deepcopy(tokenizer).encode("as another process") == tokenizer.encode("as another process")
    assert TiktokenTokenizer(ranks_file, "gpt2").end_of_document == 600
    assert TiktokenTokenizer(ranks_file, "cl100k").fingerprint != TiktokenTokenizer(ranks_file, "gpt2").fingerprint
    with pytest.raises(DataError, match="not in the vocabulary"):
        tokenizer.decode([600])


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_tiktoken_patterns_lose_nothing(ranks_file, name) -> None:
    tokenizer = TiktokenTokenizer(ranks_file, name)
    texts = [text for text in parity.odd_strings(["<|endoftext|>"]) if text.isprintable() or len(text) < 200]
    texts = [text for text in texts if not any(0xD800 <= ord(character) < 0xE000 for character in text)]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_cl100k_cuts_numbers_and_contractions() -> None:
    """As the encoding's authors describe: at most three digits, contractions in any case, line ends with what ends."""
    library = pytest.importorskip("tiktoken")
    from modalities_data.tokenizers.tiktoken import PATTERNS

    def words(name, text):
        """Words of two characters or more merge to one token each, so tokens are words."""
        found = {bytes([byte]): byte for byte in range(256)}
        for word in text.split("|"):
            for end in range(2, len(word.encode()) + 1):
                found.setdefault(word.encode()[:end], len(found))
        encoding = library.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=found, special_tokens={})
        return [encoding.decode([token]) for token in encoding.encode(text.replace("|", ""))]

    for name, text in (("cl100k", "123|45|'LL| go|!!\n| A"), ("gpt2", "12345|'ll| go|!!|\n| A")):
        assert words(name, text) == text.split("|")


@pytest.mark.parametrize("name", ["bytes", "some.model", "some.tiktoken"])
def test_engines_are_of_tokenizer_json_files_only(name) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no choice of engines, so not fastokens"):
        named_tokenizer(name, engine="fastokens")


def test_tiktoken_mistakes(ranks_file, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"need the pattern[^\n]*\n.*some\.tiktoken\.json"):
        named_tokenizer(str(ranks_file))
    with pytest.raises(ConfigError, match="ids of special tokens"):
        TiktokenTokenizer(ranks_file, "gpt2", {"<|endoftext|>": 7})
    with pytest.raises(ConfigError, match=r"no end-of-document token '<\|endoftext\|>'"):
        TiktokenTokenizer(ranks_file, "gpt2", {"<eod>": 0})
    with pytest.raises(ConfigError, match="does not take the pattern"):
        TiktokenTokenizer(ranks_file, "(", {"<|endoftext|>": 0})
    bad = {
        b"": "no ranks", b"YQ== 1\n!! 2\n": ":2: expected a token", b"YQ==\n": ":1: expected",
        b"YQ== 1\nYg== 1\n": "twice", b"YQ== 1\n": "lacks 255", b"YQ== -1\n": "not negative",
    }  # fmt: skip
    for content, message in bad.items():
        with pytest.raises(DataError, match=message):
            read_ranks(content, tmp_path / "x.tiktoken")


def test_packed_folders_keep_and_reopen_their_tokenizer(model_file, ranks_file, lorem_file, tmp_path) -> None:
    ranks = tmp_path / "tokenizer.model"  # Llama 3 names its ranks so
    ranks.write_bytes(ranks_file.read_bytes())
    (tmp_path / "tokenizer.model.json").write_text('{"pattern": "gpt2", "special_tokens": {"<|endoftext|>": 0}}')
    texts = list(documents(lorem_file))
    for number, file in enumerate((model_file, ranks)):
        tokenizer = named_tokenizer(str(file))
        manifests = [
            pack(lorem_file, tmp_path / f"{number}-{workers}", tokenizer, workers=workers, range_bytes=100_000).manifest
            for workers in (1, 2)
        ]
        assert manifests[0].fingerprint == manifests[1].fingerprint
        folder = tmp_path / f"{number}-1"
        reopened = recorded_tokenizer(folder, manifests[0].tokenizer)
        assert reopened.fingerprint == tokenizer.fingerprint
        assert verify(folder).documents == 400
        opened = PackedFolder(folder)
        for place in (0, 399):
            assert opened.document(place).tolist() == [*tokenizer.encode(texts[place]), tokenizer.end_of_document]


def test_a_missing_extra_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r'(?s)needs the package no_such.*pip install "modalities-data\[some\]"'):
        extras.optional("no_such_module", "some", "this")


@pytest.fixture(scope="module")
def gigatoken_engine(tokenizer_file):
    pytest.importorskip("gigatoken")
    return GigatokenEngine(tokenizer_file.read_text())


def test_gigatoken_gives_the_same_ids(gigatoken_engine, tokenizer_file, lorem_file, monkeypatch) -> None:
    reference = TokenizersEngine(tokenizer_file.read_text())
    texts = [*documents(lorem_file), *parity.odd_strings(["<|endoftext|>"])]
    assert parity.first_difference(gigatoken_engine, reference, texts) == ""
    assert [array.tolist() for array in gigatoken_engine.encode_flat([])] == [[], [0]]
    # Loaded anew, because its cache has no bound: the same ids.
    monkeypatch.setattr(GigatokenEngine, "RECYCLE_CHARACTERS", 1000)
    before = gigatoken_engine._tokenizer
    for start in range(0, 40, 10):
        part = texts[start : start + 10]
        assert parity.first_difference(gigatoken_engine, reference, part) == ""
    assert gigatoken_engine._tokenizer is not before


def test_gigatoken_is_taken_only_when_named(gigatoken_engine, tokenizer_file, monkeypatch) -> None:
    """Version 0.10.0 reads characters of newer Unicode versions as letters where the reference reads symbols."""

    def refuse(content):
        raise ValueError("unsupported")

    monkeypatch.setattr(huggingface, "FastokensEngine", refuse)
    assert HuggingFaceTokenizer(tokenizer_file).engine == "tokenizers"
    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine="gigatoken")
    reference = hf.Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.encode("some text") == reference.encode("some text").ids
    assert deepcopy(tokenizer).engine == "gigatoken"
    assert tokenizer.parity_digest == ""


def test_the_parity_digest_covers_texts_and_versions(tokenizer_file, lorem_file, tmp_path) -> None:
    prints = []
    for text in ("one text", "one text", "another text"):
        tokenizer = HuggingFaceTokenizer(tokenizer_file)
        before = tokenizer.parity_digest
        tokenizer.encode(text)
        prints.append(tokenizer.parity_digest)
        assert len(before) == 16 and before != prints[-1]
    assert prints[0] == prints[1] != prints[2]
    assert HuggingFaceTokenizer(tokenizer_file, engine="tokenizers").parity_digest == ""
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    made = [pack(lorem_file, tmp_path / str(n), tokenizer, workers=n, range_bytes=100_000).manifest for n in (1, 2)]
    assert made[0].tokenizer == made[1].tokenizer
    assert read_manifest(tmp_path / "1").tokenizer.parity_digest == tokenizer.parity_digest


class Numbers:
    """A tokenizer whose texts are numbers, each its own id; the largest id ends documents."""

    fingerprint = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_document = vocab_size, vocab_size - 1

    def encode(self, text):
        return [int(word) for word in text.split()]

    def encode_flat(self, documents):
        parts = [self.encode(text) for text in documents]
        offsets = np.cumsum([0, *map(len, parts)])
        return np.array([value for part in parts for value in part], np.uint32), offsets

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, "uint16"), (256, "uint16"), (257, "uint16"), (65_499, "uint16"), (65_500, "int32"), (65_536, "int32"),
     (65_537, "int32"), (2**31, "int32")],
)  # fmt: skip
def test_edges_of_vocabularies(vocab_size, dtype, write_jsonl, tmp_path) -> None:
    last = vocab_size - 2
    texts = ["0", f"{last}", f"{last} 0 {last}", f"{max(0, last - 1)} {last // 2}"]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    tokenizer = Numbers(vocab_size)
    assert isinstance(tokenizer, Tokenizer)
    manifest = pack(source, tmp_path / "out", tokenizer, workers=1).manifest
    assert (manifest.dtype, manifest.vocab_size, manifest.largest_id) == (dtype, vocab_size, vocab_size - 1)
    opened = PackedFolder(tmp_path / "out")
    found = [opened.document(number).tolist() for number in range(4)]
    assert found == [[*tokenizer.encode(text), tokenizer.end_of_document] for text in texts]
    verify(tmp_path / "out")
