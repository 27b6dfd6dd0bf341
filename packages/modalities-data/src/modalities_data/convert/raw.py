"""Tokens as another program left them, and the vocabulary they are ids of."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Tokenizer
from modalities_data.disk import user_errors
from modalities_data.manifest import (
    TokenizerRecord,
)
from modalities_data.tokenizers.opening import UNKNOWN_ENGINE


class RawTokens(NamedTuple):
    """Documents in a file.

    path: of the file.
    offset: bytes before the first token.
    dtype: of the tokens, little-endian.
    tokens: how many there are in the file, from ``offset`` on.
    starts, lengths: (documents,) int64, in tokens.
    mask: a file with one byte per token, 1 where it counts as a target; None where all do.
    """

    path: Path
    offset: int
    dtype: np.dtype
    tokens: int
    starts: np.ndarray
    lengths: np.ndarray
    mask: Path | None = None

    def back_to_back(self) -> bool:
        """Whether the documents are exactly what is in the file, in its order."""
        ends = np.cumsum(self.lengths)
        total = int(ends[-1]) if len(ends) else 0
        return total == self.tokens and np.array_equal(self.starts, ends - self.lengths)

    def mapped(self) -> np.ndarray:
        """(tokens,) read-only."""
        if not self.tokens:
            return np.empty(0, self.dtype)
        with user_errors(self.path), self.path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, self.dtype, self.tokens, self.offset)


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a file without a manifest mean.

    vocab_size: one more than the largest id there can be.
    end_of_document: the id that ends every document.
    tokenizer: that made the ids; None where unknown.
    """

    vocab_size: int
    end_of_document: int
    tokenizer: Tokenizer | None = None

    @staticmethod
    def of(tokenizer: Tokenizer | None, vocab_size: int | None, end_of_document: int | None) -> Vocabulary:
        """From a tokenizer, or from the two numbers.

        Raises:
            ConfigError: neither is there, both contradict each other, or the end is not in the vocabulary.
        """
        if tokenizer is not None:
            if vocab_size is not None and vocab_size < tokenizer.vocab_size:
                raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the vocabulary size is {vocab_size}")
            vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
            end_of_document = tokenizer.end_of_document if end_of_document is None else end_of_document
        if vocab_size is None or end_of_document is None:
            raise ConfigError(
                "these files do not say what their ids mean",
                hint="pass --tokenizer, or --vocab-size and --end-id",
            )
        if not 0 <= end_of_document < vocab_size <= 2**31:
            raise ConfigError(f"end-of-document id {end_of_document} is not in a vocabulary of {vocab_size} ids")
        return Vocabulary(vocab_size, end_of_document, tokenizer)

    def record(self) -> TokenizerRecord:
        """For the manifest."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return TokenizerRecord("", UNKNOWN_ENGINE, "")
        return TokenizerRecord(
            tokenizer.fingerprint, getattr(tokenizer, "engine", type(tokenizer).__name__), "",
            getattr(tokenizer, "end_of_document_token", ""),
        )  # fmt: skip
