"""Training a byte-level BPE tokenizer (Sennrich et al., 2016; Radford et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import write_text
from modalities_data.disk import user_errors

SMALLEST_VOCABULARY = 257
"""All bytes and the end of a document."""


def train_tokenizer(texts: Iterator[str], output: Path, vocab_size: int, end_of_document: str = "<|endoftext|>") -> int:
    """Train a byte-level BPE with GPT-2's pre-tokenizer and write it as a tokenizer.json; equal texts, equal file.

    Args:
        texts: documents; read once, only the counts of their words are kept.
        output: the tokenizer.json, written whole or not at all.
        vocab_size: ids to have in all: the end-of-document token, 256 bytes and the merges.
        end_of_document: the special token written after every document; its id is 0.

    Returns:
        The vocabulary size reached; smaller than asked for where the texts have too few different words.

    Raises:
        ConfigError: the vocabulary is smaller than 257.
        DataError: there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"a byte-level vocabulary has at least {SMALLEST_VOCABULARY} ids, not {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("there is no text to train a tokenizer on")
    with user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, tokenizer.to_str(pretty=True))
    return tokenizer.get_vocab_size(with_added_tokens=True)
