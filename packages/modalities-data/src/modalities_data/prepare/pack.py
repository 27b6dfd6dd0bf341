"""JSONL to a packed folder, in several processes; a killed job goes on where it was, and the bytes never differ."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import msgspec

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import sync_folder, write_json
from modalities_core.interfaces import Tokenizer
from modalities_data import manifest as manifests
from modalities_data.disk import user_errors
from modalities_data.jsonl import ByteRange, blocks, byte_ranges
from modalities_data.manifest import Accounting, Manifest, TokenizerRecord, write_manifest
from modalities_data.megatron_index import token_dtype
from modalities_data.prepare.shards import STATE_FOLDER, Job, OnError, RangeResult, committed, pack_range
from modalities_data.prepare.workers import pack_in_processes

RANGE_BYTES = 64 << 20
SUFFIXES = ("bin", "idx")

OnProgress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all, and tokens written by this process and its workers."""


@dataclass(frozen=True)
class PackReport:
    """A finished job: the manifest, what was done now, and how many shards an interrupted job had left."""

    manifest: Manifest
    bytes_read: int
    tokens_written: int
    seconds: float
    workers: int
    shards_reused: int


def pack(
    source: Path,
    output: Path,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    on_error: OnError = "fail",
    overwrite: bool = False,
    key: str = "text",
    range_bytes: int = RANGE_BYTES,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> PackReport:
    """Tokenize every document of ``source`` into the packed folder ``output``.

    The folder gets its name when it is complete. Until then its parts lie beside it in ``.NAME.partial``; the same
    command takes up what a killed one left there. Workers are new processes, so a script that calls this with more
    than one needs the usual ``if __name__ == "__main__":``.

    Args:
        source: JSON Lines, one document per line.
        output: the folder to make.
        tokenizer: gives the ids; picklable where there is more than one worker.
        workers: processes; None takes one per available core. The output does not depend on it.
        on_error: ``fail`` at the first line that is no document, or ``skip`` it and list it in ``*.rejected.jsonl``.
        overwrite: replace an existing packed folder when the new one is complete.
        key: the JSON key that holds the text.
        range_bytes: input bytes per shard, at least; decides where shards end.
        on_progress: told about progress a few times a second.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the input is damaged, without documents or unreadable, or the output exists.
        ResourceError: the disk is full, or a worker was killed.
    """
    _check_arguments(workers, on_error, range_bytes)
    source, output = Path(source), Path(os.path.abspath(output))
    _check_replaceable(output, overwrite)
    ranges = byte_ranges(source, range_bytes)
    # The engine is settled here, on the first documents, so that all workers use the same.
    tokenizer.encode_flat(_first_documents(ranges[0], key))
    started = monotonic()
    partial = output.with_name(f".{output.name}.partial")
    options = {"key": key, "on_error": on_error, "range_bytes": range_bytes}
    with user_errors(partial), _working_folder(partial, _identity(source, tokenizer, options)):
        job = Job(tokenizer, partial, token_dtype(tokenizer.vocab_size), key, on_error)
        results = {number: done for number in range(len(ranges)) if (done := committed(partial, number)) is not None}
        reused = len(results)
        left = {number: lines for number, lines in enumerate(ranges) if number not in results}
        count = min(workers or _cores(), max(1, len(left)))
        results |= _pack_ranges(job, left, count, on_progress)
        manifest = _manifest(job, [results[number] for number in range(len(ranges))], options)
        if not manifest.tokens:
            raise DataError(f"{source} has no documents to write: {_spelled(manifest.accounting)}")
        _commit(partial, output, manifest, tokenizer, overwrite)
    bytes_read = sum(lines.end - lines.start for lines in left.values())
    tokens_written = sum(shard.tokens for number in left if (shard := results[number].shard) is not None)
    return PackReport(manifest, bytes_read, tokens_written, monotonic() - started, count, reused)


def _pack_ranges(
    job: Job, ranges: dict[int, ByteRange], workers: int, on_progress: OnProgress
) -> dict[int, RangeResult]:
    """Pack what is left, here or in worker processes."""
    total = sum(lines.end - lines.start for lines in ranges.values())
    done = tokens = 0

    def report(new_bytes: int, new_tokens: int) -> None:
        nonlocal done, tokens
        done, tokens = done + new_bytes, tokens + new_tokens
        on_progress(done, total, tokens)

    if workers == 1:
        return {number: pack_range(job, number, lines, report) for number, lines in ranges.items()}
    return pack_in_processes(job, ranges, workers, report)


def _check_arguments(workers: int | None, on_error: str, range_bytes: int) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is at least 1, not {workers}")
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error is fail or skip, not {on_error!r}")
    if range_bytes < 1:
        raise ConfigError(f"range_bytes is at least 1, not {range_bytes}")


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Only a packed folder is ever replaced, and only when asked to."""
    if not output.exists():
        return
    if not overwrite:
        raise DataError(f"{output} exists already", hint="choose another name, or pass --overwrite to replace it")
    if not (output / manifests.FILE_NAME).is_file():
        raise DataError(f"{output} is no packed folder, so --overwrite does not replace it")


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_documents(lines: ByteRange, key: str) -> list[str]:
    """Some documents from the start of the input."""
    for block in blocks(lines, key):
        if texts := list(islice(filter(None, block.texts), 64)):
            return texts
    return []


def _identity(source: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for a killed job's shards to be taken up."""
    status = source.stat()
    return {
        "source": str(source.resolve()),
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "tokenizer": [tokenizer.fingerprint, tokenizer.end_of_document, *_engine(tokenizer)],
        "version": manifests.VERSION,
        **options,
    }


def _engine(tokenizer: Tokenizer) -> tuple[str, str]:
    """Name and version of what computes the ids; a tokenizer of a plugin need not tell."""
    return getattr(tokenizer, "engine", type(tokenizer).__name__), getattr(tokenizer, "engine_version", "")


@contextmanager
def _working_folder(partial: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold ``partial`` for this process alone, with the shards of the same job or with none."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("a") as lock:
        _lock(lock, partial)
        job_file = partial / STATE_FOLDER / "job.json"
        if not (job_file.is_file() and _read(job_file) == identity):
            for entry in partial.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            job_file.parent.mkdir()
            write_json(job_file, identity)
        yield


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError:
        return None


def _lock(stream, partial: Path) -> None:
    """Refuse to work where another process does; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is packing into {partial}", hint="wait for it, or end it first") from None


def _manifest(job: Job, results: list[RangeResult], options: dict[str, Any]) -> Manifest:
    shards = [result.shard for result in results if result.shard is not None]
    accounting = sum((result.accounting for result in results), Accounting())
    assert accounting.balanced() and accounting.written == sum(shard.documents for shard in shards)
    tokenizer = job.tokenizer
    engine, engine_version = _engine(tokenizer)
    return Manifest(
        dtype=job.dtype,
        vocab_size=tokenizer.vocab_size,
        largest_id=max((shard.largest_id for shard in shards), default=0),
        end_of_document=tokenizer.end_of_document,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        tokenizer=TokenizerRecord(
            tokenizer.fingerprint,
            engine,
            engine_version,
            getattr(tokenizer, "end_of_document_token", ""),
            getattr(tokenizer, "parity_digest", ""),
        ),
        accounting=accounting,
        shards=shards,
        producer=f"modalities-data {version('modalities-data')}",
        options=options,
    )


def _spelled(accounting: Accounting) -> str:
    skipped = "".join(f", {count} skipped as {rule}" for rule, count in accounting.skipped.items())
    return f"{accounting.documents} documents in{skipped}, {accounting.failed} failed"


def _commit(partial: Path, output: Path, manifest: Manifest, tokenizer: Tokenizer, overwrite: bool) -> None:
    """Write the manifest last, drop the state of the job, and give the folder its name."""
    save = getattr(tokenizer, "save", None)
    if save is not None:
        save(partial)
    write_manifest(partial, manifest)
    kept = {"manifest.json"} | {f"{s.name}.{suffix}" for s in manifest.shards for suffix in SUFFIXES}
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif (
            entry.name not in kept
            and not entry.name.startswith("tokenizer.")
            and not entry.name.endswith(".rejected.jsonl")
        ):
            entry.unlink()
    sync_folder(partial)
    _check_replaceable(output, overwrite)
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    sync_folder(output.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
