"""Any tokenizer.json, on the fastest engine that is exact."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import write_text
from modalities_data.disk import user_errors
from modalities_data.tokenizers import parity
from modalities_data.tokenizers.engines import Engine, FastokensEngine, GigatokenEngine, TokenizersEngine
from modalities_data.tokenizers.ids import checked_ids

EngineName = Literal["auto", "fastokens", "gigatoken", "tokenizers"]
FILE_NAME = "tokenizer.json"

log = logging.getLogger(__name__)


class HuggingFaceTokenizer:
    """A tokenizer.json file; special tokens inside a text are ordinary text, and nothing is cut off or padded.

    ``engine`` and ``engine_version`` tell what computes the ids. Under ``auto`` that is fastokens, unless it does not
    load the file or its ids differ from those of the ``tokenizers`` library on a built-in set of odd strings or on the
    first documents given to ``encode_flat``; then it is ``tokenizers``, and one warning says why. ``parity_digest`` is
    a hash of what was compared and of its ids; empty where nothing was.

    Args:
        path: the tokenizer.json file, or a folder that holds one.
        end_of_document: the token written after every document; it has to be in the vocabulary.
        engine: what computes the ids: auto, fastokens, gigatoken or tokenizers.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    parity_digest: str = ""

    def __init__(self, path: Path, end_of_document: str = "<|endoftext|>", engine: EngineName = "auto") -> None:
        """Read the file and choose the engine.

        Raises:
            ConfigError: there is no such file, the end-of-document token is unknown, or the engine does not load it.
            DataError: the file is no tokenizer.json.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"there is no tokenizer at {file}", about=(self, "path"))
        with user_errors(file):
            content = file.read_bytes()
        try:
            self._content = content.decode()
            description = json.loads(self._content)
            self._reference: TokenizersEngine | None = TokenizersEngine(self._content)
        except Exception as error:  # the library raises bare Exception for a file it does not understand
            raise DataError(f"{file} is no tokenizer.json: {error}") from error
        self._end_token = end_of_document
        self.fingerprint = _fingerprint(description)
        vocabulary = self._reference.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = _token_id(self, vocabulary, end_of_document, file)
        self._specials = [entry["content"] for entry in description.get("added_tokens") or ()]
        self._choose(engine)

    @property
    def engine(self) -> str:
        """What computes the ids: fastokens, gigatoken or tokenizers."""
        return self._engine.name

    @property
    def engine_version(self) -> str:
        """The version of that library."""
        return self._engine.version

    @property
    def end_of_document_token(self) -> str:
        """The token written after every document, as text."""
        return self._end_token

    @property
    def text(self) -> str:
        """The content of the file."""
        return self._content

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token."""
        return self.encode_flat([text])[0].tolist()

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents back to back, uint32, and (documents + 1,) int64 offsets."""
        self.settle(documents)
        return self._engine.encode_flat(documents)

    def settle(self, documents: Sequence[str]) -> None:
        """Compare the engine with the reference on the first of ``documents``, where that is still to be done."""
        if self._unproven and documents:
            self._unproven = False
            self._engine = self._proven(self._engine, parity.leading_documents(documents), "of the first documents")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; bytes that are not UTF-8 become replacement characters.

        Raises:
            DataError: an id is not in [0, vocab_size).
        """
        values = checked_ids(ids, self.vocab_size)
        return self._tokenizers().tokenizer.decode(values, skip_special_tokens=True)

    def reference(self) -> Engine:
        """The ``tokenizers`` library on the same file, which defines what the right ids are."""
        return self._tokenizers()

    def save(self, folder: Path) -> None:
        """Write a copy of the file as ``folder/tokenizer.json``."""
        write_text(folder / FILE_NAME, self._content)

    def _tokenizers(self) -> TokenizersEngine:
        """The reference, loaded when it is first needed: a packing worker never does."""
        if self._reference is None:
            self._reference = TokenizersEngine(self._content)
        return self._reference

    def _choose(self, engine: str) -> None:
        """Set the engine, and whether its ids still have to be compared on documents."""
        self._unproven = False
        if engine == "tokenizers":
            self._engine: Engine = self._tokenizers()
        elif engine == "auto":
            self._engine = self._fastest()
            self._unproven = self._engine is not self._reference
        else:
            fast, refusal = _loaded(engine, self._content)
            if fast is None:
                raise ConfigError(
                    f"{engine} cannot load this tokenizer: {refusal}",
                    hint="engine: auto falls back to tokenizers",
                    about=(self, "engine"),
                )
            self._engine = fast

    def _fastest(self) -> Engine:
        """fastokens if it loads the file and is exact on the odd strings, else the reference."""
        # Not gigatoken: 0.10.0 cuts text at 4,657 characters newer than Unicode 15 in other places than `tokenizers`.
        fast, refusal = _loaded("fastokens", self._content)
        if fast is None:
            log.warning("tokenizing with tokenizers, many times slower: fastokens cannot load it (%s)", refusal)
            return self._tokenizers()
        return self._proven(fast, list(parity.odd_strings(self._specials)), "of the built-in strings")

    def _proven(self, engine: Engine, documents: list[str], origin: str) -> Engine:
        """``engine`` if its ids are right on ``documents``, else the reference and a warning."""
        difference = self._difference(engine, documents)
        if not difference:
            return engine
        self.parity_digest = ""
        log.warning(
            "tokenizing with tokenizers, many times slower: %s is not exact on one %s: %s",
            engine.name, origin, difference,
        )  # fmt: skip
        return self._tokenizers()

    def _difference(self, engine: Engine, documents: list[str]) -> str:
        """What is wrong with the ids of ``documents``; empty where nothing is, which the digest then covers."""
        try:
            difference = parity.first_difference(engine, self._tokenizers(), documents)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the library is no Exception
            return f"it failed ({error})"
        if not difference:
            self.parity_digest = parity.digest(self.parity_digest, engine, self._tokenizers(), documents)
        return difference

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded libraries, for another process."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_engine", "_reference")}
        return {**state, "_engine": self.engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the engine the other process had settled on."""
        self.__dict__.update(state)
        self._reference = None
        load = {"fastokens": FastokensEngine, "gigatoken": GigatokenEngine}.get(state["_engine"])
        self._engine = self._tokenizers() if load is None else load(self._content)


def _fingerprint(description: Any) -> str:
    """xxh3-64 of the canonical content; cutting and padding, which are switched off, do not count."""
    kept = {name: value for name, value in description.items() if name not in ("truncation", "padding")}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_64_hexdigest(canonical.encode(errors="surrogatepass"))


def _token_id(owner: object, vocabulary: dict[str, int], token: str, file: Path) -> int:
    """The id of ``token``.

    Raises:
        ConfigError: the vocabulary lacks it.
    """
    if token in vocabulary:
        return vocabulary[token]
    controls = [name for name in vocabulary if name[:1] in "<[" and name[-1:] in ">]"]
    near = difflib.get_close_matches(token, controls, n=3, cutoff=0.4) or sorted(controls)[:3]
    raise ConfigError(
        f"the vocabulary of {file} has no end-of-document token {token!r}",
        hint=f"it has: {', '.join(near)}" if near else "train one with `modalities-data train-tokenizer`",
        about=(owner, "end_of_document"),
    )


def _loaded(name: str, content: str) -> tuple[Engine | None, str]:
    """The fast engine of this name, or None and why not."""
    try:
        return (FastokensEngine if name == "fastokens" else GigatokenEngine)(content), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # not installed, file refused, or a panic inside the library
        return None, str(error) or type(error).__name__
