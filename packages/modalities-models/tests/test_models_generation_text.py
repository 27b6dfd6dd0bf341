"""Text as it comes: pieces against decoding at once, stop strings wherever tokens end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modalities_core.errors import ConfigError
from modalities_models.generation import Continuation, Sampling, generate_text
from modalities_models.generation.text import TextStream, joined

TEXT = st.text(st.sampled_from("ab c\n€漢🙂"), max_size=12)


class Bytes:
    """Each byte is a token; 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes"

    def encode(self, text):
        return list(text.encode())

    def encode_flat(self, documents):
        raise AssertionError("generation reads one prompt at a time")

    def decode(self, ids):
        return bytes(value for value in ids if value < 256).decode(errors="replace")


def byte_fallback():
    """As Llama 2: words begin with a blank that the first of a text loses, other characters are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", *[f"<0x{value:02X}>" for value in range(256)], "a", "b", "c", "▁", "\n", "▁a", "▁b"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def pieces_of(decode, tokens, context=(), stop=()):
    stream = TextStream(decode, stop, context)
    found = []
    for token in tokens:
        stopped = stream.add(token)
        found.append(stream.take(last=stopped))
        if stopped:
            return found
    return [*found, stream.take(last=True)]


@settings(deadline=None)
@given(TEXT, TEXT)
def test_pieces_are_the_text_in_whole_characters(before, after):
    decode = Bytes().decode
    pieces = pieces_of(decode, after.encode(), list(before.encode()))
    assert "".join(pieces) == after
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_are_what_decoding_at_once_makes_of_them(tokens):
    decode = Bytes().decode
    assert "".join(pieces_of(decode, tokens)) == decode(tokens)


@settings(deadline=None)
@given(TEXT, TEXT, st.booleans())
def test_blanks_between_words_and_characters_of_several_tokens_survive(before, after, special):
    tokenizer = byte_fallback()
    ids = tokenizer.encode(before + after).ids
    cut = len(tokenizer.encode(before).ids)
    # What the prompt's tokens do not cover is the continuation's; a control token has no text.
    prompt, rest = ids[:cut], ids[cut:]
    if special:
        rest = [1, *rest]
    whole, known = tokenizer.decode(ids), tokenizer.decode(prompt)
    if whole.startswith(known):
        assert known + "".join(pieces_of(tokenizer.decode, rest, prompt)) == whole


@settings(deadline=None)
@given(TEXT, st.lists(st.text(st.sampled_from("ab c€"), min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_found_across_tokens_and_nothing_of_it_shown(text, stop):
    pieces = pieces_of(Bytes().decode, text.encode(), stop=stop)
    # What the reader has at each moment never has to be taken back, and ends where the first stop string is complete.
    ends = [place + len(word) for word in stop if (place := text.find(word)) >= 0]
    if not ends:
        assert "".join(pieces) == text
    else:
        read = text[: min(ends)]
        shown = min(place for word in stop if (place := read.find(word)) >= 0)
        assert "".join(pieces) == read[:shown]
        assert len(pieces) == len(read.encode())


def test_only_what_could_begin_a_stop_string_is_held_back():
    assert pieces_of(Bytes().decode, b"xENx\nEND!", stop=["END"]) == ["x", "", "", "ENx", "\n", "", "", ""]
    assert pieces_of(Bytes().decode, b"xEN", stop=["END"]) == ["x", "", "", "EN"]
    assert pieces_of(Bytes().decode, b"aab", stop=["ab"]) == ["", "a", ""]


class Script(nn.Module):
    """A Model that goes on with a fixed text: the token at each place is what the text has there."""

    vocab_size = 257

    def __init__(self, text):
        super().__init__()
        self.sequence_length = len(text) + 8
        self.text = nn.Parameter(torch.tensor([*text, 256]), requires_grad=False)
        self.head = nn.Identity()

    def forward(self, tokens_BT):
        places_T = (torch.arange(tokens_BT.shape[1]) + 1).clamp(max=len(self.text) - 1)
        return nn.functional.one_hot(self.text[places_T], 257).float().expand(len(tokens_BT), -1, -1)


def test_texts_of_a_batch_with_their_reasons():
    model = Script(b"_one, two, three.")

    def run(prompts, **options):
        ids = [list(text.encode()) for text in prompts]
        found = generate_text(model, Bytes(), ids, 12, Sampling(temperature=0), **options)
        return joined(found, len(prompts))

    assert run(["?"], stop=["three", "two"]) == [Continuation("one, ", tuple(b"one, two"), "stop")]
    assert run(["?", "123456789012"]) == [
        Continuation("one, two, th", tuple(b"one, two, th"), "length"),
        Continuation("hree.", tuple(b"hree."), "end"),
    ]
    assert run(["?"], end_tokens=[ord(","), ord("t")]) == [Continuation("one", tuple(b"one"), "end")]
    with pytest.raises(ConfigError, match="stop string is empty"):
        run(["?"], stop=[""])


def test_pieces_come_as_the_tokens_do():
    model = Script("_a€b".encode())
    pieces = list(generate_text(model, Bytes(), [[63]], 20, Sampling(temperature=0)))
    assert [piece.text for piece in pieces] == ["a", "", "", "€", "b", ""]
    assert [piece.finish for piece in pieces] == [None] * 5 + ["end"]
    assert pieces[1].tokens == ("€".encode()[0],) and pieces[-1].tokens == ()
