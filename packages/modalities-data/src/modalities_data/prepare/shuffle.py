"""Documents in another order: of packed folders, or the lines of JSONL files; in bounded memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.inputs.files import InputFile, Sources, find_inputs
from modalities_data.manifest import Accounting, Input, Manifest
from modalities_data.order import ORDER_VERSION, check_seed, permuted
from modalities_data.prepare.folder import partial_folder
from modalities_data.prepare.joined import JoinedFolders, in_blocks
from modalities_data.prepare.lines import LinesRecord, lines_of, only_lines, write_record
from modalities_data.prepare.rewrite import SHARD_TOKENS, OnProgress, making_folder, write_documents

BUCKET_BYTES = 64 << 20
RECORD = np.dtype([("place", "<i8"), ("length", "<i8")])


def shuffle_folders(
    sources: Sequence[Path],
    output: Path,
    seed: int = 0,
    *,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Write the documents of packed folders, all mixed, in an order drawn by ``seed`` to ``output``.

    The order is the keyed bijection of ``modalities_data.order``: a function of seed and document number, so nothing
    of it is stored; documents are gathered a few million tokens at a time.

    Args:
        sources: packed folders of one tokenizer.
        output: the packed folder to make.
        seed: 0 to 2**63 - 1.
        shard_tokens: tokens per shard, at least.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: the seed is out of range.
        DataError: a source is damaged, the tokenizers differ, or the output exists.
    """
    check_seed(seed)
    joined = JoinedFolders(sources)
    order = (permuted(block, joined.documents, seed, 0) for block in in_blocks(0, joined.documents))
    return write_documents(
        joined, order, output, options={"command": "shuffle", "seed": seed, "order": ORDER_VERSION},
        accounting=lambda written: Accounting(joined.documents, written), shard_tokens=shard_tokens,
        overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def shuffle_lines(
    sources: Sources,
    output: Path,
    seed: int = 0,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> LinesRecord:
    """Write the lines of JSONL files, all mixed, in an order drawn by ``seed``; each is unchanged.

    Blank lines are left out and counted. Lines go to buckets on disk, beside the output, by their place in the order;
    then every bucket is put in order. Memory holds one bucket; the disk holds the lines once more.

    Args:
        sources: files, plain or compressed, folders, patterns or addresses; read twice.
        output: the file to write, whole or not at all; beside it ``OUTPUT.manifest.json``.
        seed: 0 to 2**63 - 1.
        bucket_bytes: how much is held in memory, about; does not change the output.
        on_progress: told about progress.

    Raises:
        ConfigError: the seed is out of range, an input is no JSONL file, or is the output.
        DataError: an input is missing, or there are no lines.
    """
    check_seed(seed)
    files = find_inputs(sources)
    only_lines(files, output)
    sizes = [(len(part.lines), part.blank, sum(map(len, part.lines))) for file in files for part in lines_of(file)]
    count, blank, size = (sum(column) for column in zip(*sizes, strict=True))
    if not count:
        raise DataError(f"{files[0].name} has no lines to shuffle")
    output = Path(os.path.abspath(output))
    with user_errors(output):
        # A killed job's buckets are under the same name, and are dropped.
        partial = partial_folder(output)
        with making_folder(partial, {"started": time.time_ns()}):
            folder = partial / "buckets"
            folder.mkdir()
            buckets = _Buckets(folder, -(-count // -(-size // bucket_bytes)), bucket_bytes)
            inputs = _fill(buckets, files, count, seed, lambda done: on_progress(done, 2 * size, 0))
            with replacing(output) as stream:
                done = size
                for bucket in sorted(folder.iterdir()):
                    done += _empty(bucket, stream)
                    on_progress(done, 2 * size, 0)
            shutil.rmtree(partial)
        options = {"command": "shuffle", "seed": seed, "order": ORDER_VERSION}
        return write_record(output, inputs, options, Accounting(count, count, blank_lines=blank))


def _fill(
    buckets: _Buckets, files: Sequence[InputFile], count: int, seed: int, on_progress: Callable[[int], None]
) -> list[Input]:
    """Put every line into the bucket of its place; what was read."""
    first = done = 0
    inputs = []
    for file in files:
        digest = xxhash.xxh3_64()
        for part in lines_of(file, digest):
            # permuted gives the line for a place; as a bijection it gives a place for a line just as well.
            places = permuted(np.arange(first, first + len(part.lines)), count, seed, 0)
            buckets.add(places, part.lines)
            first += len(part.lines)
            done += sum(map(len, part.lines))
            on_progress(done)
        inputs.append(Input(file.name, file.bytes, digest.hexdigest()))
    if first != count:
        raise DataError("an input changed while it was read")
    buckets.flush()
    return inputs


class _Line(NamedTuple):
    place: int
    content: bytes


class _Buckets:
    """Lines by ranges of their places, each in a file that is open only while it is written to."""

    def __init__(self, folder: Path, places: int, limit: int) -> None:
        self._folder, self._places, self._limit = folder, places, limit
        self._waiting: dict[int, list[_Line]] = {}
        self._size = 0

    def add(self, places: np.ndarray, lines: list[bytes]) -> None:
        """Take lines, and write to the files when many wait."""
        for place, line in zip(places.tolist(), lines, strict=True):
            self._waiting.setdefault(place // self._places, []).append(_Line(place, line))
            self._size += len(line)
        if self._size > self._limit:
            self.flush()

    def flush(self) -> None:
        """Write all that waits."""
        for bucket, lines in self._waiting.items():
            record = np.array([(line.place, len(line.content)) for line in lines], RECORD)
            with (self._folder / f"{bucket:09d}").open("ab") as stream:
                stream.write(len(lines).to_bytes(8, "little"))
                stream.write(record.tobytes())
                stream.writelines(line.content for line in lines)
        self._waiting, self._size = {}, 0


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
