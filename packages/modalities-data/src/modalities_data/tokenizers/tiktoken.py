"""Byte-level BPE in the form of tiktoken: a file of ranks, a pattern, and special tokens."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing, write_json
from modalities_data.disk import user_errors
from modalities_data.tokenizers.extras import optional

FILE_NAME = "tokenizer.tiktoken"

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}
"""Published patterns by the name of their encoding (https://github.com/openai/tiktoken, openai_public.py)."""


class TiktokenTokenizer:
    """A file of ranks as tiktoken reads it; special tokens that occur inside a text are ordinary text.

    Needs the extra ``tiktoken``.

    Args:
        path: the file: per line a token in base64, a blank, and its rank; or a folder with a tokenizer.tiktoken.
        pattern: the regular expression that cuts a text into words, or gpt2 or cl100k for that of these encodings. If
            absent, it is read with the special tokens from the file's neighbour NAME.json, such as
            ``{"pattern": "cl100k", "special_tokens": {"<|endoftext|>": 100257}}``.
        special_tokens: ids of tokens that are no text; if absent, the end of a document gets the first id after the
            ranks.
        end_of_document: the special token written after every document.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    engine: str = "tiktoken"

    def __init__(
        self,
        path: Path,
        pattern: str | None = None,
        special_tokens: dict[str, int] | None = None,
        end_of_document: str = "<|endoftext|>",
    ) -> None:
        """Read the ranks.

        Raises:
            ConfigError: there is no such file, no pattern, no such special token, or the library is not installed.
            DataError: the file holds no ranks.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"there is no tokenizer at {file}", about=(self, "path"))
        with user_errors(file):
            self._content = file.read_bytes()
        if pattern is None:
            pattern, beside = _settings(self, file)
            special_tokens = beside if special_tokens is None else special_tokens
        ranks = read_ranks(self._content, file)
        if special_tokens is None:
            special_tokens = {end_of_document: max(ranks.values()) + 1}
        if end_of_document not in special_tokens:
            raise ConfigError(
                f"the special tokens have no end-of-document token {end_of_document!r}",
                hint=f"they are: {', '.join(special_tokens)}",
                about=(self, "end_of_document"),
            )
        if taken := set(special_tokens.values()) & set(ranks.values()):
            raise ConfigError(f"{file} has ranks with ids of special tokens: {sorted(taken)[:5]}",
                              about=(self, "special_tokens"))  # fmt: skip
        self.pattern, self.special_tokens = PATTERNS.get(pattern, pattern), dict(special_tokens)
        self.end_of_document_token = end_of_document
        self.end_of_document = special_tokens[end_of_document]
        self._load(ranks)
        self.vocab_size = max(*ranks.values(), *special_tokens.values()) + 1
        self.fingerprint = _fingerprint(ranks, self.pattern, self.special_tokens)

    def _load(self, ranks: dict[bytes, int]) -> None:
        library: Any = optional("tiktoken", "tiktoken", "a tiktoken tokenizer")
        self.engine_version = version("tiktoken")
        try:
            self._encoding = library.Encoding(
                "ranks", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # ranks without all bytes end in a panic, which is no Exception
            raise ConfigError(f"tiktoken does not take the pattern or the ranks: {error}",
                              about=(self, "pattern")) from error  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token."""
        return self.encode_flat([text])[0].tolist()

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents back to back, uint32, and (documents + 1,) int64 offsets."""
        encode = self._encoding.encode_to_numpy
        parts = [encode(text, allowed_special=set(), disallowed_special=()) for text in documents]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return np.concatenate([*parts, np.empty(0, np.uint32)]), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; bytes that are not UTF-8 become replacement characters.

        Raises:
            DataError: the vocabulary has no such id.
        """
        specials = set(self.special_tokens.values())
        values = [int(value) for value in ids if int(value) not in specials]
        try:
            return self._encoding.decode(values)
        except (KeyError, OverflowError) as error:
            raise DataError(f"a token id is not in the vocabulary: {error}") from error

    def save(self, folder: Path) -> None:
        """Write a copy of the ranks as ``folder/tokenizer.tiktoken``, and of the rest as a JSON file beside it."""
        with replacing(folder / FILE_NAME) as stream:
            stream.write(self._content)
        write_json(folder / f"{FILE_NAME}.json", {"pattern": self.pattern, "special_tokens": self.special_tokens})

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded library, for another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_encoding"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the ranks again."""
        self.__dict__.update(state)
        self._load(read_ranks(self._content, Path(FILE_NAME)))


def read_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids.

    Raises:
        DataError: a line is not a token in base64 and a number, or a token or a rank occurs twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{file}:{number}: expected a token in base64, a blank and its rank: {error}") from error
        if int(rank) < 0:
            raise DataError(f"{file}:{number}: a rank is not negative")
    if not ranks or len(set(ranks.values())) != len(ranks):
        raise DataError(f"{file} has {'no ranks' if not ranks else 'a rank that occurs twice'}")
    if missing := 256 - sum(bytes([byte]) in ranks for byte in range(256)):
        raise DataError(f"{file} lacks {missing} of the 256 single bytes, so not every text has ids")
    return ranks


def _settings(owner: object, file: Path) -> tuple[str, dict[str, int] | None]:
    """Pattern and special tokens from the JSON file beside the ranks."""
    beside = file.with_name(f"{file.name}.json")
    if not beside.is_file():
        raise ConfigError(
            f"the ranks of {file} need the pattern that cuts texts into words",
            hint=f'write {{"pattern": "cl100k", "special_tokens": {{...}}}} to {beside}',
            about=(owner, "pattern"),
        )
    try:
        found = msgspec.json.decode(beside.read_bytes(), type=_Settings)
    except msgspec.MsgspecError as error:
        raise DataError(f"{beside}: {error}") from error
    return found.pattern, found.special_tokens


class _Settings(msgspec.Struct):
    """What a file of ranks does not say."""

    pattern: str
    special_tokens: dict[str, int] | None = None


def _fingerprint(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> str:
    """xxh3-64 of everything that decides ids."""
    digest = xxhash.xxh3_64(json.dumps([pattern, sorted(special_tokens.items())]).encode())
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        digest.update(f" {rank} {len(token)} ".encode() + token)
    return digest.hexdigest()
