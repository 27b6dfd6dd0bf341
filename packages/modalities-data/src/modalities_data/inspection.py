"""What is in a packed folder, for a human and for a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from modalities_data.packed import PackedFolder
from modalities_data.terminal import amount
from modalities_data.tokenizers.opening import recorded_tokenizer


class Inspection(NamedTuple):
    """The same facts twice: as lines of text, and as JSON values."""

    text: str
    summary: dict[str, Any]


def inspect_folder(folder: Path, documents: int, characters: int) -> Inspection:
    """Count what is in ``folder`` and decode some documents, evenly spread over it.

    Args:
        folder: a packed folder.
        documents: how many to decode.
        characters: how much of each to show.

    Raises:
        DataError: the folder or its tokenizer is damaged.
    """
    packed = PackedFolder(folder)
    manifest = packed.manifest
    lengths = np.concatenate([packed.index(number).lengths for number in range(len(manifest.shards))])
    quantiles = [int(value) for value in np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1), method="nearest")]
    chosen = np.unique(np.linspace(0, manifest.documents - 1, documents).astype(int)).tolist() if documents else []
    tokenizer = recorded_tokenizer(folder, manifest.tokenizer) if chosen else None
    # A token is at least one byte of text in no tokenizer we know of, so cut tokens before text is decoded.
    samples = {n: tokenizer.decode(packed.document(n)[: characters * 4].tolist())[:characters] for n in chosen}  # type: ignore[union-attr]
    summary = {
        "folder": str(folder), "tokens": manifest.tokens, "documents": manifest.documents,
        "shards": len(manifest.shards), "dtype": manifest.dtype, "vocab_size": manifest.vocab_size,
        "largest_id": manifest.largest_id, "end_of_document": manifest.end_of_document,
        "text_bytes": manifest.text_bytes, "bytes_per_token": manifest.text_bytes / manifest.tokens,
        "document_tokens": dict(zip(("min", "5%", "50%", "95%", "max"), quantiles, strict=True)),
        "accounting": msgspec.to_builtins(manifest.accounting), "tokenizer": msgspec.to_builtins(manifest.tokenizer),
        "fingerprint": manifest.fingerprint, "samples": {str(n): text for n, text in samples.items()},
    }  # fmt: skip
    return Inspection(_text(summary), summary)


def _text(summary: dict[str, Any]) -> str:
    """One fact per line, then the documents."""
    counts, tokenizer = summary["accounting"], summary["tokenizer"]
    skipped = "".join(f", {count} skipped as {rule}" for rule, count in counts["skipped"].items())
    spread = ", ".join(f"{name} {value}" for name, value in summary["document_tokens"].items())
    lines = [
        f"{summary['folder']}",
        f"  tokens      {summary['tokens']:,} in {summary['shards']} shards of {summary['dtype']}",
        f"  text        {amount(summary['text_bytes'], 'B')}, {summary['bytes_per_token']:.2f} bytes per token",
        f"  documents   {counts['documents']:,}: {counts['written']:,} written{skipped}, {counts['failed']} failed",
        f"  lengths     {spread} tokens",
        f"  vocabulary  {summary['vocab_size']:,}, largest id {summary['largest_id']:,}, "
        f"documents end with {summary['end_of_document']}",
        f"  tokenizer   {tokenizer['fingerprint']}, packed with {tokenizer['engine']} {tokenizer['engine_version']}",
        f"  fingerprint {summary['fingerprint']}",
    ]
    for number, text in summary["samples"].items():
        lines += [f"\ndocument {number}:", text]
    return "\n".join(lines)
