"""Documents in another order: of a packed folder, or the lines of a JSONL file; in bounded memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.manifest import Accounting, Manifest
from modalities_data.order import ORDER_VERSION, check_seed, permuted
from modalities_data.prepare.lines import LinesRecord, count_lines, lines_of, write_record
from modalities_data.prepare.rewrite import SHARD_TOKENS, JoinedFolders, OnProgress, in_blocks, write_documents

BUCKET_BYTES = 64 << 20
RECORD = np.dtype([("place", "<i8"), ("length", "<i8")])


def shuffle_folder(
    source: Path,
    output: Path,
    seed: int = 0,
    *,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Write the documents of the packed folder ``source`` in an order drawn by ``seed`` to ``output``.

    The order is the keyed bijection of ``modalities_data.order``: a function of seed and document number, so nothing
    of it is stored; documents are gathered a few million tokens at a time.

    Args:
        source: a packed folder.
        output: the packed folder to make.
        seed: 0 to 2**63 - 1.
        shard_tokens: tokens per shard, at least.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: the seed is out of range.
        DataError: the source is damaged, or the output exists.
    """
    check_seed(seed)
    joined = JoinedFolders([source])
    order = (permuted(block, joined.documents, seed, 0) for block in in_blocks(0, joined.documents))
    return write_documents(
        joined, order, output, options={"command": "shuffle", "seed": seed, "order": ORDER_VERSION},
        accounting=lambda written: Accounting(joined.documents, written), shard_tokens=shard_tokens,
        overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def shuffle_lines(
    source: Path,
    output: Path,
    seed: int = 0,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> LinesRecord:
    """Write the lines of a JSONL file in an order drawn by ``seed``, each unchanged.

    Blank lines are left out and counted. Lines go to buckets on disk, beside the output, by their place in the order;
    then every bucket is put in order. Memory holds one bucket; the disk holds the file once more.

    Args:
        source: JSON Lines; it is read three times.
        output: the file to write, whole or not at all; beside it ``OUTPUT.manifest.json``.
        seed: 0 to 2**63 - 1.
        bucket_bytes: how much is held in memory; does not change the output.
        on_progress: told about progress.

    Raises:
        ConfigError: the seed is out of range, or source and output are one file.
        DataError: the source is missing or has no lines.
    """
    check_seed(seed)
    if source.resolve() == output.resolve():
        raise ConfigError("a file is not shuffled onto itself; name another output")
    with user_errors(source):
        size = source.stat().st_size
        count, blank = count_lines(source)
    if not count:
        raise DataError(f"{source} has no lines to shuffle")
    buckets = -(-size // bucket_bytes)
    with user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".buckets", dir=output.parent))
        try:
            per_bucket = -(-count // buckets)
            _fill(folder, source, count, per_bucket, seed, bucket_bytes, lambda done: on_progress(done, 2 * size, 0))
            with replacing(output) as stream:
                done = size
                for bucket in sorted(folder.iterdir()):
                    done += _empty(bucket, stream)
                    on_progress(done, 2 * size, 0)
        finally:
            shutil.rmtree(folder)
        options = {"command": "shuffle", "seed": seed, "order": ORDER_VERSION}
        return write_record(output, source, options, Accounting(count, count, blank_lines=blank))


class _Line(NamedTuple):
    place: int
    content: bytes


def _fill(folder: Path, source: Path, count: int, per_bucket: int, seed: int, limit: int, on_progress) -> None:
    """Write every line with its place into the bucket of that place, opening each bucket only to flush it."""
    waiting: dict[int, list[_Line]] = {}
    size = done = 0
    for first, lines in _numbered(source):
        places = permuted(np.arange(first, first + len(lines)), count, seed, 0)
        # permuted gives the line for a place; as a bijection it gives a place for a line just as well.
        for place, line in zip(places.tolist(), lines, strict=True):
            waiting.setdefault(place // per_bucket, []).append(_Line(place, line))
            size += len(line)
        if size > limit:
            done += size
            _flush(folder, waiting)
            waiting, size = {}, 0
            on_progress(done)
    _flush(folder, waiting)


def _numbered(source: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Lines some at a time, with the number of the first of them."""
    first, lines, size = 0, [], 0
    for line in lines_of(source):
        lines.append(line)
        size += len(line)
        if size > 1 << 20:
            yield first, lines
            first, lines, size = first + len(lines), [], 0
    yield first, lines


def _flush(folder: Path, waiting: dict[int, list[_Line]]) -> None:
    for bucket, lines in waiting.items():
        record = np.array([(line.place, len(line.content)) for line in lines], RECORD)
        with (folder / f"{bucket:09d}").open("ab") as stream:
            stream.write(len(lines).to_bytes(8, "little"))
            stream.write(record.tobytes())
            stream.writelines(line.content for line in lines)


def _empty(bucket: Path, output: BinaryIO) -> int:
    """Write the lines of a bucket in order."""
    found: list[_Line] = []
    with bucket.open("rb") as stream:
        while head := stream.read(8):
            record = np.frombuffer(stream.read(RECORD.itemsize * int.from_bytes(head, "little")), RECORD)
            for place, length in zip(record["place"].tolist(), record["length"].tolist(), strict=True):
                found.append(_Line(place, stream.read(length)))
    bucket.unlink()
    found.sort()
    output.writelines(line.content + b"\n" for line in found)
    return sum(len(line.content) for line in found)
