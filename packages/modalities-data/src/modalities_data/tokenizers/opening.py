"""The tokenizer a user names, and the one a packed folder was made with."""

from __future__ import annotations

from pathlib import Path

from modalities_core.errors import DataError
from modalities_core.interfaces import Tokenizer
from modalities_data.manifest import TokenizerRecord


def named_tokenizer(name: str, end_of_document: str = "<|endoftext|>", engine: str = "auto") -> Tokenizer:
    """``bytes``, or the path of a tokenizer.json.

    Raises:
        ConfigError: there is no such tokenizer, or its vocabulary lacks the end-of-document token.
    """
    if name == "bytes":
        from modalities_data.tokenizers.bytes import BytesTokenizer

        return BytesTokenizer()
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(Path(name), end_of_document, engine)  # type: ignore[arg-type]


def recorded_tokenizer(folder: Path, record: TokenizerRecord) -> Tokenizer:
    """The tokenizer of a packed folder, from the copy beside its manifest.

    Raises:
        DataError: the copy is not the tokenizer the manifest names.
    """
    if record.engine == "bytes":
        tokenizer = named_tokenizer("bytes")
    else:
        tokenizer = named_tokenizer(str(folder / "tokenizer.json"), record.end_of_document_token)
    if tokenizer.fingerprint != record.fingerprint:
        raise DataError(
            f"{folder}: its tokenizer has fingerprint {tokenizer.fingerprint}, the manifest says {record.fingerprint}",
            hint="the tokenizer.json beside the manifest was exchanged",
        )
    return tokenizer
