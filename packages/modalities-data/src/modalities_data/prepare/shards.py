"""One byte range of a JSONL file to one shard: the unit of work, the same bytes wherever and whenever it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from modalities_core.files import checksum, replacing, write_json
from modalities_core.interfaces import Tokenizer
from modalities_data.disk import user_errors
from modalities_data.jsonl import Block, ByteRange, blocks, failure_error, line_number
from modalities_data.manifest import Accounting, Shard, Source
from modalities_data.packed import ShardWriter, writing_shard

OnError = Literal["fail", "skip"]
Report = Callable[[int, int], None]
"""Called with bytes read and tokens written since the last call."""

STATE_FOLDER = ".state"


class RangeResult(msgspec.Struct, frozen=True):
    """What became of one byte range; ``shard`` is None where no document was left to write."""

    shard: Shard | None
    accounting: Accounting


@dataclass(frozen=True)
class Job:
    """What every worker has to know.

    folder: where shards go.
    key: the JSON key that holds the text.
    on_error: what to do with a line that is no document.
    """

    tokenizer: Tokenizer
    folder: Path
    dtype: str
    key: str
    on_error: OnError


def shard_name(number: int) -> str:
    """The files' name without suffix: at least five digits."""
    return f"{number:05d}"


def pack_range(job: Job, number: int, lines: ByteRange, report: Report) -> RangeResult:
    """Tokenize one range, write its shard and then, as its commit, its result under ``.state``.

    Raises:
        DataError: a line is no document and the job says ``fail``; the input changed or cannot be read.
        ResourceError: the disk is full.
    """
    name = shard_name(number)
    rejected = _Rejected(job.folder / f"{name}.rejected.jsonl", lines.path)
    accounting = Accounting()
    with user_errors(job.folder):
        with ExitStack() as stack:
            writer = stack.enter_context(writing_shard(job.folder, name, job.dtype))
            for block in blocks(lines, job.key):
                if block.failures and job.on_error == "fail":
                    raise failure_error(lines.path, block.failures[0])
                if block.failures:
                    rejected.add(block, stack)
                before = writer.tokens
                accounting += _append(writer, job.tokenizer, block)
                report(block.bytes, writer.tokens - before)
        shard = None
        if writer.documents:
            source = Source(str(lines.path), lines.start, lines.end)
            shard = writer.shard(checksum(job.folder / f"{name}.idx"), source)
        else:
            for suffix in ("bin", "idx"):
                (job.folder / f"{name}.{suffix}").unlink()
        result = RangeResult(shard, accounting)
        write_json(job.folder / STATE_FOLDER / f"{name}.json", msgspec.to_builtins(result))
    return result


def committed(folder: Path, number: int) -> RangeResult | None:
    """The result of a range that an earlier, interrupted run finished, or None."""
    name = shard_name(number)
    try:
        content = (folder / STATE_FOLDER / f"{name}.json").read_bytes()
        result = msgspec.json.decode(content, type=RangeResult)
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


def _append(writer: ShardWriter, tokenizer: Tokenizer, block: Block) -> Accounting:
    """Write the documents of a block but for those a named rule skips."""
    skipped: Counter[str] = Counter()
    texts = [text for text in block.texts if text]
    if len(texts) < len(block.texts):
        skipped["empty"] = len(block.texts) - len(texts)
    ids, offsets = tokenizer.encode_flat(texts)
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
    """The lines that were no documents, listed with their number and reason; no such line, no file."""

    def __init__(self, path: Path, source: Path) -> None:
        self._path, self._source = path, source
        self._stream: BinaryIO | None = None
        self._counted_to = self._line = 0
        path.unlink(missing_ok=True)

    def add(self, block: Block, stack: ExitStack) -> None:
        """List the failures of a block; ``stack`` closes the file when the range is done."""
        if self._stream is None:
            self._stream = stack.enter_context(replacing(self._path))
        for offset, reason in block.failures:
            # Counting on from the last failure reads the file once, however many there are.
            self._line += line_number(self._source, offset, self._counted_to) - (1 if self._line else 0)
            self._counted_to = offset
            entry = {"file": str(self._source), "line": self._line, "offset": offset, "reason": reason}
            self._stream.write(msgspec.json.encode(entry) + b"\n")
