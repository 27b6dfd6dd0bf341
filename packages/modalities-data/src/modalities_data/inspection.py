"""What is in a packed folder, for a human and for a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from modalities_core.errors import DataError
from modalities_data.packed import PackedFolder
from modalities_data.terminal import amount
from modalities_data.tokenizers.opening import recorded_tokenizer

BAR_WIDTH = 40


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
    if not manifest.documents:
        raise DataError(f"{folder} has no documents", hint="a part of a job can be empty: merge it with the others")
    lengths, counts = _lengths(packed)
    chosen = np.unique(np.linspace(0, manifest.documents - 1, documents).astype(int)).tolist() if documents else []
    tokenizer = recorded_tokenizer(folder, manifest.tokenizer) if chosen else None
    # A token is at least one byte of text in no tokenizer we know of, so cut tokens before text is decoded.
    samples = {n: tokenizer.decode(packed.document(n)[: characters * 4].tolist())[:characters] for n in chosen}  # type: ignore[union-attr]
    summary = {
        "folder": str(folder), "tokens": manifest.tokens, "documents": manifest.documents,
        "shards": len(manifest.shards), "dtype": manifest.dtype, "vocab_size": manifest.vocab_size,
        "largest_id": manifest.largest_id, "end_of_document": manifest.end_of_document,
        "text_bytes": manifest.text_bytes, "bytes_per_token": manifest.text_bytes / manifest.tokens,
        "document_tokens": _quantiles(lengths, counts), "mean_document_tokens": manifest.tokens / manifest.documents,
        "length_histogram": _histogram(lengths, counts),
        "accounting": msgspec.to_builtins(manifest.accounting), "tokenizer": msgspec.to_builtins(manifest.tokenizer),
        "inputs": msgspec.to_builtins(manifest.inputs),
        "fingerprint": manifest.fingerprint, "samples": {str(n): text for n, text in samples.items()},
    }  # fmt: skip
    return Inspection(_text(summary), summary)


def _lengths(packed: PackedFolder) -> tuple[np.ndarray, np.ndarray]:
    """The different lengths of documents in tokens, rising, and how many have each; bounded by how many there are."""
    found = [np.zeros(0, np.int64)] * 2
    for number in range(len(packed.manifest.shards)):
        lengths, counts = np.unique(packed.index(number).lengths.astype(np.int64), return_counts=True)
        every, place = np.unique(np.concatenate([found[0], lengths]), return_inverse=True)
        found = [every, np.bincount(place, np.concatenate([found[1], counts])).astype(np.int64)]
    return found[0], found[1]


def _quantiles(lengths: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    """Lengths that these shares of the documents do not exceed."""
    ranks = np.cumsum(counts)
    wanted = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}
    places = {name: round(share * (int(ranks[-1]) - 1)) for name, share in wanted.items()}
    return {name: int(lengths[np.searchsorted(ranks, place, side="right")]) for name, place in places.items()}


def _histogram(lengths: np.ndarray, counts: np.ndarray) -> list[dict[str, int]]:
    """Documents and tokens in buckets that double: 1, 2 to 3, 4 to 7 tokens, and so on, from the first to the last."""
    buckets = np.frexp(lengths.astype(np.float64))[1] - 1
    first, last = int(buckets[0]), int(buckets[-1])
    documents = np.bincount(buckets - first, counts)
    tokens = np.bincount(buckets - first, counts * lengths)
    return [
        {"from": 1 << n, "below": 2 << n, "documents": int(documents[n - first]), "tokens": int(tokens[n - first])}
        for n in range(first, last + 1)
    ]


def _bars(histogram: list[dict[str, int]]) -> list[str]:
    """One line per bucket: a bar for its documents, and its share of all tokens."""
    most = max(bucket["documents"] for bucket in histogram)
    tokens = sum(bucket["tokens"] for bucket in histogram)
    lines = []
    for bucket in histogram:
        # Rounded up, so that no bucket with a document looks empty.
        bar = "#" * -(-bucket["documents"] * BAR_WIDTH // most)
        share = f"{100 * bucket['tokens'] / tokens:5.1f} % of tokens"
        spread = f"{bucket['from']:,}-{bucket['below'] - 1:,}"
        lines.append(f"  {spread:>23} {bar:{BAR_WIDTH}} {bucket['documents']:>13,}  {share}")
    return lines


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
        f"  lengths     {spread}, mean {summary['mean_document_tokens']:.1f} tokens",
        *_bars(summary["length_histogram"]),
        f"  vocabulary  {summary['vocab_size']:,}, largest id {summary['largest_id']:,}, "
        f"documents end with {summary['end_of_document']}",
        f"  tokenizer   {tokenizer['fingerprint']}, packed with {tokenizer['engine']} {tokenizer['engine_version']}",
        f"  fingerprint {summary['fingerprint']}",
    ]
    for number, text in summary["samples"].items():
        lines += [f"\ndocument {number}:", text]
    return "\n".join(lines)
