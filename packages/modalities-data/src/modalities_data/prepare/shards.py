"""One unit of input to one shard: the unit of work, the same bytes wherever and whenever it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np
import xxhash

from modalities_core.files import checksum, replacing, write_json
from modalities_core.interfaces import Tokenizer
from modalities_data.disk import user_errors
from modalities_data.inputs.reading import failure_error, read, record_number, rejection
from modalities_data.inputs.units import Piece, Unit
from modalities_data.jsonl import Block
from modalities_data.manifest import Accounting, Shard, Source
from modalities_data.packed import ShardWriter, writing_shard
from modalities_data.prepare.folder import STATE_FOLDER
from modalities_data.prepare.recheck import Recheck, rechecking

OnError = Literal["fail", "skip"]
Report = Callable[[int, int], None]
"""Called with bytes read and tokens written since the last call."""


class UnitResult(msgspec.Struct, frozen=True):
    """What became of one unit.

    shard: None where no document was left to write.
    accounting: of its documents.
    checksums: of what was read of each piece, xxh3-64 with the piece's start as seed.
    """

    shard: Shard | None
    accounting: Accounting
    checksums: list[str]


@dataclass(frozen=True)
class Job:
    """What every worker has to know.

    folder: where shards go.
    key: the JSON key or Parquet column that holds the text.
    on_error: what to do with a record that is no document.
    verify_every: encode every n-th document of a unit again; None leaves that out.
    """

    tokenizer: Tokenizer
    folder: Path
    dtype: str
    key: str
    on_error: OnError
    verify_every: int | None = None


def shard_name(number: int) -> str:
    """The files' name without suffix: at least five digits."""
    return f"{number:05d}"


def pack_unit(job: Job, number: int, unit: Unit, report: Report) -> UnitResult:
    """Tokenize one unit, write its shard and then, as its commit, its result under ``.state``.

    Raises:
        DataError: a record is no document and the job says ``fail``; the input changed or cannot be read.
        ResourceError: the disk is full.
    """
    name = shard_name(number)
    accounting = Accounting()
    checksums = []
    with user_errors(job.folder):
        with ExitStack() as stack:
            rejected = _Rejected(job.folder / f"{name}.rejected.jsonl", stack)
            writer = stack.enter_context(writing_shard(job.folder, name, job.dtype))
            recheck = stack.enter_context(rechecking(job.tokenizer, job.verify_every))
            for piece in unit:
                digest = xxhash.xxh3_64(seed=piece.start)
                for block in read(piece, job.key, digest):
                    if block.failures and job.on_error == "fail":
                        raise failure_error(piece, block, block.failures[0])
                    rejected.add(piece, block)
                    before = writer.tokens
                    accounting += _append(writer, job.tokenizer, piece, block, recheck)
                    report(block.bytes, writer.tokens - before)
                checksums.append(digest.hexdigest())
        shard = None
        if writer.documents:
            shard = writer.shard(checksum(job.folder / f"{name}.idx"), _source(unit))
        else:
            for suffix in ("bin", "idx"):
                (job.folder / f"{name}.{suffix}").unlink()
        result = UnitResult(shard, accounting, checksums)
        write_json(job.folder / STATE_FOLDER / f"{name}.json", msgspec.to_builtins(result))
    return result


def _source(unit: Unit) -> Source:
    first, last = unit[0], unit[-1]
    return Source(first.file, first.start, last.end, last.file if last.file != first.file else "")


def committed(folder: Path, number: int) -> UnitResult | None:
    """The result of a unit that an earlier, interrupted run finished, or None."""
    name = shard_name(number)
    try:
        content = (folder / STATE_FOLDER / f"{name}.json").read_bytes()
        result = msgspec.json.decode(content, type=UnitResult)
        if result.shard is not None:
            sizes = [(folder / f"{name}.{suffix}").stat().st_size for suffix in ("bin", "idx")]
            if sizes != [result.shard.bytes, result.shard.index_bytes]:
                return None
    except (OSError, msgspec.MsgspecError):
        return None
    return result


def with_ends(ids: np.ndarray, offsets: np.ndarray, end: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Put ``end`` behind every document.

    Args:
        ids: (tokens,) of all documents back to back.
        offsets: (documents + 1,) int64.
        end: the end-of-document id.
        dtype: of the result.

    Returns:
        (tokens + documents,) ids and (documents,) int64 lengths with the end.
    """
    documents = len(offsets) - 1
    result = np.empty(len(ids) + documents, dtype)
    ends = offsets[1:] + np.arange(documents)
    is_text = np.ones(len(result), bool)
    is_text[ends] = False
    result[is_text] = ids
    result[ends] = end
    return result, np.diff(offsets) + 1


def _append(
    writer: ShardWriter, tokenizer: Tokenizer, piece: Piece, block: Block, recheck: Recheck | None
) -> Accounting:
    """Write the documents of a block but for those a named rule skips."""
    skipped: Counter[str] = Counter()
    texts = [text for text in block.texts if text]
    if len(texts) < len(block.texts):
        skipped["empty"] = len(block.texts) - len(texts)
    ids, offsets = tokenizer.encode_flat(texts)
    if recheck is not None:
        numbers = [number for number, text in enumerate(block.texts) if text]
        for chosen in recheck.chosen(len(texts)):
            record = block.first + block.record(numbers[chosen])
            recheck.add(piece, record, texts[chosen], ids[offsets[chosen] : offsets[chosen + 1]])
    has_tokens = np.diff(offsets) > 0
    if not has_tokens.all():
        # A normalizer can leave nothing of a text; a document of its end alone would teach only that.
        skipped["no_tokens"] = int((~has_tokens).sum())
        texts = [text for text, kept in zip(texts, has_tokens, strict=True) if kept]
        offsets = np.concatenate([offsets[:1], offsets[1:][has_tokens]])
    tokens, lengths = with_ends(ids, offsets, tokenizer.end_of_document, writer.dtype)
    writer.append(tokens, lengths, text_bytes(texts))
    failed = len(block.failures)
    return Accounting(len(block.texts) + failed, len(texts), dict(skipped), failed, block.blank_lines)


def text_bytes(texts: Sequence[str]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


class _Rejected:
    """The records that were no documents, listed with their place and reason; no such record, no file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._stream: BinaryIO | None = None
        self._before: dict[Piece, int] = {}
        path.unlink(missing_ok=True)

    def add(self, piece: Piece, block: Block) -> None:
        """List the failures of a block; the file is closed when the unit is done."""
        if block.failures and self._stream is None:
            self._stream = self._stack.enter_context(replacing(self._path))
        for failure in block.failures:
            entry = rejection(piece, block, failure, lambda: self._records_before(piece))
            self._stream.write(msgspec.json.encode(entry) + b"\n")  # type: ignore[union-attr]

    def _records_before(self, piece: Piece) -> int:
        """Counted once for each piece, and only where something failed."""
        if piece not in self._before:
            self._before = {piece: record_number(piece, 0)}
        return self._before[piece]
