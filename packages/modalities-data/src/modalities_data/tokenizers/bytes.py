"""UTF-8 bytes as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modalities_core.errors import DataError

END_OF_DOCUMENT = 256


class BytesTokenizer:
    """One token per UTF-8 byte, ids 0 to 255, and 256 for the end of a document: needs no training."""

    vocab_size: int = 257
    end_of_document: int = END_OF_DOCUMENT
    fingerprint: str = "bytes-1"
    engine: str = "bytes"
    engine_version: str = "1"

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``."""
        return list(text.encode())

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all documents back to back, uint32, and (documents + 1,) int64 offsets."""
        encoded = [document.encode() for document in documents]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(document) for document in encoded], out=offsets[1:])
        return np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; the end of a document has none, what is not UTF-8 becomes replacement characters.

        Raises:
            DataError: an id is not in [0, 257).
        """
        kept = [int(value) for value in ids if value != END_OF_DOCUMENT]
        if kept and not 0 <= min(kept) <= max(kept) < 256:
            raise DataError(f"token ids of the bytes tokenizer are 0 to 256, found {min(kept)} to {max(kept)}")
        return bytes(kept).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing to write: the name says it all."""
