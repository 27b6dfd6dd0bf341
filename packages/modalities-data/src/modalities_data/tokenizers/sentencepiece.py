"""SentencePiece models (Kudo and Richardson, 2018), by the library that defines them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.tokenizers.extras import optional
from modalities_data.tokenizers.ids import checked_ids

FILE_NAME = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model; control symbols that occur inside a text are ordinary text.

    Needs the extra ``sentencepiece``.

    Args:
        path: the .model file, or a folder that holds a tokenizer.model.
        end_of_document: the piece written after every document; the model's own end of sentence, often </s>, if absent.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    engine: str = "sentencepiece"

    def __init__(self, path: Path, end_of_document: str | None = None) -> None:
        """Read the model.

        Raises:
            ConfigError: there is no such file, the library is not installed, or the model lacks the piece.
            DataError: the file is no SentencePiece model.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"there is no tokenizer at {file}", about=(self, "path"))
        with user_errors(file):
            self._content = file.read_bytes()
        self._load(file)
        processor = self._processor
        self.fingerprint = xxhash.xxh3_64_hexdigest(self._content)
        self.vocab_size = processor.vocab_size()
        self.end_of_document = processor.eos_id() if end_of_document is None else processor.piece_to_id(end_of_document)
        wanted = "end of sentence" if end_of_document is None else f"piece {end_of_document!r}"
        if self.end_of_document < 0 or processor.is_unknown(self.end_of_document):
            raise ConfigError(
                f"{file} has no {wanted} to end documents with",
                hint="name one of its control pieces as end_of_document",
                about=(self, "end_of_document"),
            )

    def _load(self, file: Path | str) -> None:
        library: Any = optional("sentencepiece", "sentencepiece", "a SentencePiece tokenizer")
        self.engine_version = version("sentencepiece")
        try:
            self._processor = library.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataError(f"{file} is no SentencePiece model: {error}") from error

    @property
    def end_of_document_token(self) -> str:
        """The piece written after every document."""
        return self._processor.id_to_piece(self.end_of_document)

    def __contains__(self, piece: str) -> bool:
        """Whether the model has this piece."""
        return not self._processor.is_unknown(self._processor.piece_to_id(piece))

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without beginning or end of sentence."""
        return self._processor.encode(text, add_bos=False, add_eos=False, enable_sampling=False)

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents back to back, uint32, and (documents + 1,) int64 offsets."""
        # One thread: packing has a process per core already.
        parts = self._processor.encode(
            list(documents), add_bos=False, add_eos=False, enable_sampling=False, num_threads=1
        )
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return np.concatenate([*(np.array(part, np.uint32) for part in parts), np.empty(0, np.uint32)]), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without control pieces; bytes that are not UTF-8 become replacement characters.

        Raises:
            DataError: an id is not in [0, vocab_size).
        """
        values = checked_ids(ids, self.vocab_size)
        return self._processor.decode([value for value in values if value != self.end_of_document])

    def save(self, folder: Path) -> None:
        """Write a copy of the model as ``folder/tokenizer.model``."""
        with replacing(folder / FILE_NAME) as stream:
            stream.write(self._content)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded library, for another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_processor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the model again."""
        self.__dict__.update(state)
        self._load(FILE_NAME)
