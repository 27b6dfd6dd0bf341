"""The tokenizer a user names, and the one a packed folder was made with."""

from __future__ import annotations

from pathlib import Path

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Tokenizer
from modalities_data.manifest import TokenizerRecord

DEFAULT_END = "<|endoftext|>"
UNKNOWN_ENGINE = "unknown"
"""What a packed folder names that was converted without its tokenizer."""


def named_tokenizer(name: str, end_of_document: str = DEFAULT_END, engine: str = "auto") -> Tokenizer:
    """``bytes``, or the path of a tokenizer.json, of a SentencePiece .model or of a .tiktoken file of ranks.

    A SentencePiece model that lacks the usual end-of-document token ends documents with its own end of sentence.

    Raises:
        ConfigError: there is no such tokenizer, its vocabulary lacks the end-of-document token, or an engine is named
            that it has not.
    """
    path = _file(Path(name))
    if engine != "auto" and (name == "bytes" or path.suffix in (".tiktoken", ".model")):
        raise ConfigError(f"{name} has no choice of engines, so not {engine}", hint="leave --engine out")
    if name == "bytes":
        from modalities_data.tokenizers.bytes import BytesTokenizer

        return BytesTokenizer()
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and _has_ranks(path)):
        from modalities_data.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(path, end_of_document=end_of_document)
    if path.suffix == ".model":
        from modalities_data.tokenizers.sentencepiece import SentencePieceTokenizer

        model = SentencePieceTokenizer(path, None if end_of_document == DEFAULT_END else end_of_document)
        return SentencePieceTokenizer(path, DEFAULT_END) if end_of_document == DEFAULT_END in model else model
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path, end_of_document, engine)  # type: ignore[arg-type]


def _file(path: Path) -> Path:
    """The tokenizer file of a folder, or ``path`` itself."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken"):
            if (path / name).is_file():
                return path / name
    return path


def _has_ranks(path: Path) -> bool:
    """Whether a .model file is tiktoken's: Llama 3 and others name theirs so."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        words = stream.readline(1 << 16).split()
    return len(words) == 2 and words[1].isdigit()


def recorded_tokenizer(folder: Path, record: TokenizerRecord) -> Tokenizer:
    """The tokenizer of a packed folder, from the copy beside its manifest.

    Raises:
        DataError: the copy is not the tokenizer the manifest names, or the manifest names none.
    """
    if record.engine == UNKNOWN_ENGINE:
        raise DataError(
            f"{folder} was converted without its tokenizer, so its tokens cannot be read as text",
            hint="convert it again with --tokenizer; `inspect --documents 0` shows the counts alone",
        )
    files = {"bytes": None, "sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}
    file = files.get(record.engine, "tokenizer.json")
    tokenizer = named_tokenizer("bytes" if file is None else str(folder / file), record.end_of_document_token)
    if tokenizer.fingerprint != record.fingerprint:
        raise DataError(
            f"{folder}: its tokenizer has fingerprint {tokenizer.fingerprint}, the manifest says {record.fingerprint}",
            hint="the tokenizer file beside the manifest was exchanged",
        )
    return tokenizer
