"""What computes the ids of a tokenizer.json: ``tokenizers``, the reference, ``fastokens`` and ``gigatoken``, faster.

All read special tokens that occur inside a document as ordinary text: only we write control tokens.
"""

from __future__ import annotations

import ctypes
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """Ids of many documents at once."""

    name: str
    version: str

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids back to back, uint32, and (documents + 1,) int64 offsets."""
        ...


class TokenizersEngine:
    """The ``tokenizers`` library of Hugging Face: loads everything, defines what is right."""

    name = "tokenizers"
    CALL_CHARACTERS = 1 << 17
    """How much text is encoded at once: the library's encodings take some hundred bytes per token until they go."""
    LONG_CHARACTERS = 1 << 19
    """A document from here on is given the memory that was freed before it, which takes 50 to 100 ms."""

    def __init__(self, content: str) -> None:
        """Load ``content``, the text of a tokenizer.json; cutting and padding are switched off."""
        from tokenizers import Tokenizer

        self.version = version("tokenizers")
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids back to back, uint32, and (documents + 1,) int64 offsets."""
        ids: list[np.ndarray] = []
        for batch in _batches(documents, self.CALL_CHARACTERS):
            if len(batch[-1]) > self.LONG_CHARACTERS:
                _return_freed_memory()
            # Through an array: three times as fast as numpy's own way from a list.
            ids += [
                np.frombuffer(array("I", encoding.ids), np.uint32)
                for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(part) for part in ids], out=offsets[1:])
        return np.concatenate([*ids, np.empty(0, np.uint32)]), offsets


def _return_freed_memory() -> None:
    """Hand what was freed back to the system: a long document would come on top of what glibc keeps for the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _batches(documents: Sequence[str], characters: int) -> Iterator[list[str]]:
    """The documents in their order, as many at a time as reach ``characters``."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class FastokensEngine:
    """The ``fastokens`` library: the same ids many times faster, for most but not all tokenizer.json files."""

    name = "fastokens"

    def __init__(self, content: str) -> None:
        """Load ``content``; raises ImportError or whatever fastokens refuses it with."""
        import fastokens

        self.version = version("fastokens")
        self._tokenizer = fastokens.Tokenizer.from_json_str(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids back to back, uint32, and (documents + 1,) int64 offsets."""
        ids, offsets = self._tokenizer.encode_batch_flat(list(documents), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


class GigatokenEngine:
    """The ``gigatoken`` library, an extra: as fast, for byte-level and byte-fallback BPE.

    Its cache of words has no bound in version 0.10.0 (https://github.com/marcelroed/gigatoken/issues/36), so it is
    loaded anew after every RECYCLE_CHARACTERS of text.
    """

    name = "gigatoken"
    RECYCLE_CHARACTERS = 256 << 20

    def __init__(self, content: str) -> None:
        """Load ``content``; raises ImportError or whatever gigatoken refuses it with."""
        import gigatoken

        self.version = version("gigatoken")
        description = json.loads(content)
        # It would find special tokens inside a text; those it does not know are text.
        tokens = description.get("added_tokens") or ()
        description["added_tokens"] = [token for token in tokens if not token.get("special")]
        self._load = lambda: gigatoken.Tokenizer.from_json(json.dumps(description))
        self._tokenizer = self._load()
        self._characters = 0

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids back to back, uint32, and (documents + 1,) int64 offsets."""
        if self._characters > self.RECYCLE_CHARACTERS:
            self._tokenizer, self._characters = self._load(), 0
        self._characters += sum(map(len, documents))
        # One thread: packing has a process per core already.
        layout: Any = self._tokenizer.encode_batch(list(documents), parallel=False).layout
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        ids = np.asarray(layout.content.data)
        return ids[offsets[0] : offsets[-1]].astype(np.uint32, copy=False), offsets - offsets[0]
