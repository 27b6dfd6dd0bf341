"""Text to a packed folder, in several processes; a killed job goes on where it was, and the bytes never differ."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Literal, get_args

import msgspec
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.freed_memory import keep_freed
from modalities_core.interfaces import Tokenizer
from modalities_data import manifest as manifests
from modalities_data.disk import user_errors
from modalities_data.inputs.files import FormatChoice, InputFile, Sources, find_inputs
from modalities_data.inputs.reading import read
from modalities_data.inputs.units import Unit, cut, unit_bytes
from modalities_data.manifest import Accounting, Input, Manifest, TokenizerRecord, write_manifest
from modalities_data.megatron_index import token_dtype
from modalities_data.prepare.folder import check_replaceable, give_name, partial_folder, working_folder
from modalities_data.prepare.recheck import reference_engine
from modalities_data.prepare.shards import Job, OnError, UnitResult, committed, pack_unit
from modalities_data.prepare.workers import KEPT_MEMORY, ONE_THREAD, environment, pack_in_processes

SUFFIXES = ("bin", "idx")
RunOn = Literal["processes", "ray"]

OnProgress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all, and tokens written by this process and its workers."""

log = logging.getLogger(__name__)


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
    source: Sources,
    output: Path,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    on_error: OnError = "fail",
    overwrite: bool = False,
    key: str = "text",
    range_bytes: int | None = None,
    format: FormatChoice = "auto",
    part: tuple[int, int] | None = None,
    verify_every: int | None = None,
    run_on: RunOn = "processes",
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> PackReport:
    """Tokenize every document of ``source`` into the packed folder ``output``.

    The folder gets its name when it is complete. Until then its parts lie beside it in ``.NAME.partial``; the same
    command takes up what a killed one left there. Workers are new processes, so a script that calls this with more
    than one needs the usual ``if __name__ == "__main__":``.

    Args:
        source: files, folders, patterns or addresses; see ``inputs.files.find_inputs``.
        output: the folder to make.
        tokenizer: gives the ids; picklable where there is more than one worker.
        workers: processes of one thread each; None takes one per available core. The output does not depend on it.
        on_error: ``fail`` at the first record that is no document, or ``skip`` it and list it in
            ``*.rejected.jsonl``.
        overwrite: replace an existing packed folder when the new one is complete.
        key: the JSON key or the Parquet column that holds the text.
        range_bytes: input bytes per shard, at least; decides where shards end. By default 64 MiB, and more for inputs
            beyond 256 GiB, so that there are some 4096 shards.
        format: what the files hold; ``auto`` goes by their endings.
        part: ``(number, of)``: write only this part of the shards, numbered from one; ``merge`` joins the parts to
            what a single run would have written.
        verify_every: encode every so many documents again with the ``tokenizers`` library, beside the work.
        run_on: new processes on this machine, or tasks of a Ray cluster that shares the output's file system.
        on_progress: told about progress a few times a second.

    Raises:
        ConfigError: an argument is out of range, or an optional package is not installed.
        DataError: the input is damaged, without documents or unreadable, the output exists, or ids were not exact.
        ResourceError: the disk is full, or a worker was killed.
    """
    _check_arguments(workers, on_error, range_bytes, part, verify_every, run_on)
    output = Path(os.path.abspath(output))
    check_replaceable(output, overwrite)
    files = find_inputs(source, format)
    range_bytes = range_bytes or unit_bytes(files)
    units = cut(files, range_bytes, key)
    if empty := sum(not file.bytes and file.format != "text" for file in files):
        log.warning("%d of %d inputs are empty", empty, len(files))
    # The engine is settled here, on the first documents, so that all workers and all parts use the same.
    getattr(tokenizer, "settle", tokenizer.encode_flat)(_first_documents(units[0], key))
    if verify_every is not None:
        reference_engine(tokenizer)
    started = monotonic()
    partial = partial_folder(output)
    options: dict[str, Any] = {"key": key, "on_error": on_error, "range_bytes": range_bytes, "format": format}
    options |= {"verify_every": verify_every} if verify_every else {}
    identity = _identity(files, tokenizer, options)
    mine = _share(units, part)
    if part is not None:
        # Whether it begins inside a file, which `merge` has to know to add up checksums.
        continues = any(unit[0].start > 0 for unit in list(mine.values())[:1])
        options["part"] = {"number": part[0], "of": part[1], "job": _digest(identity), "continues": continues}
    with user_errors(partial), working_folder(partial, {**identity, "part": part and list(part)}):
        job = Job(tokenizer, partial, token_dtype(tokenizer.vocab_size), key, on_error, verify_every)
        results = {number: done for number in mine if (done := committed(partial, number)) is not None}
        reused = len(results)
        left = {number: unit for number, unit in mine.items() if number not in results}
        count = min(workers or _cores(), max(1, len(left)))
        results |= _pack_units(job, left, count, run_on, on_progress)
        manifest = _manifest(job, files, mine, results, options)
        if not manifest.tokens and part is None:
            raise DataError(f"{_named(files)} no documents to write: {_spelled(manifest.accounting)}")
        _commit(partial, output, manifest, tokenizer, overwrite)
    bytes_read = sum(piece.bytes for unit in left.values() for piece in unit)
    tokens_written = sum(shard.tokens for number in left if (shard := results[number].shard) is not None)
    return PackReport(manifest, bytes_read, tokens_written, monotonic() - started, count, reused)


def _pack_units(
    job: Job, units: dict[int, Unit], workers: int, run_on: RunOn, on_progress: OnProgress
) -> dict[int, UnitResult]:
    """Pack what is left: here, in worker processes, or on a Ray cluster."""
    total = sum(piece.bytes for unit in units.values() for piece in unit)
    done = tokens = 0

    def report(new_bytes: int, new_tokens: int) -> None:
        nonlocal done, tokens
        done, tokens = done + new_bytes, tokens + new_tokens
        on_progress(done, total, tokens)

    if run_on == "ray":
        from modalities_data.prepare.on_ray import pack_on_ray

        return pack_on_ray(job, units, workers, report)
    if workers == 1:
        keep_freed(KEPT_MEMORY)
        # The tokenizers library holds a fifth less memory without a pool of threads.
        with environment(ONE_THREAD):
            return {number: pack_unit(job, number, unit, report) for number, unit in units.items()}
    return pack_in_processes(job, units, workers, report)


def _check_arguments(
    workers: int | None,
    on_error: str,
    range_bytes: int | None,
    part: tuple[int, int] | None,
    verify_every: int | None,
    run_on: str,
) -> None:
    for name, count in (("workers", workers), ("range_bytes", range_bytes), ("verify_every", verify_every)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} is at least 1, not {count}")
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error is fail or skip, not {on_error!r}")
    if run_on not in get_args(RunOn):
        raise ConfigError(f"run_on is processes or ray, not {run_on!r}")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ConfigError(f"part {part[0]} of {part[1]} does not exist", hint="parts are numbered from 1")


def _share(units: list[Unit], part: tuple[int, int] | None) -> dict[int, Unit]:
    """The units of a part by their numbers in the whole: neighbours, so that the parts in order are the whole."""
    number, of = part or (1, 1)
    return {n: units[n] for n in range(len(units) * (number - 1) // of, len(units) * number // of)}


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_documents(unit: Unit, key: str) -> list[str]:
    """Some documents from the start of the input."""
    for piece in unit:
        for block in read(piece, key):
            if texts := list(islice(filter(None, block.texts), 64)):
                return texts
    return []


def _named(files: list[InputFile]) -> str:
    return f"{files[0].name} has" if len(files) == 1 else f"the {len(files)} inputs have"


def _identity(files: list[InputFile], tokenizer: Tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for a killed job's shards to be taken up, and for parts to be of one job."""
    listed = [[_absolute(file.name), file.format, file.bytes, file.version] for file in files]
    return {
        "inputs": _digest(listed),
        "tokenizer": [tokenizer.fingerprint, tokenizer.end_of_document, *_engine(tokenizer)],
        "version": manifests.VERSION,
        **options,
    }


def _absolute(name: str) -> str:
    return name if "://" in name else str(Path(name).resolve())


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(value))


def _engine(tokenizer: Tokenizer) -> tuple[str, str]:
    """Name and version of what computes the ids; a tokenizer of a plugin need not tell."""
    return getattr(tokenizer, "engine", type(tokenizer).__name__), getattr(tokenizer, "engine_version", "")


def _manifest(
    job: Job, files: list[InputFile], units: dict[int, Unit], results: dict[int, UnitResult], options: dict[str, Any]
) -> Manifest:
    ordered = [results[number] for number in units]
    shards = [result.shard for result in ordered if result.shard is not None]
    accounting = sum((result.accounting for result in ordered), Accounting())
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
        inputs=_inputs(files, units, results),
    )


def _inputs(files: list[InputFile], units: dict[int, Unit], results: dict[int, UnitResult]) -> list[Input]:
    """The files that were read, in order; checksums of the pieces of one add up."""
    sizes = {file.name: file.bytes for file in files}
    sums: list[tuple[str, int]] = []
    for number, unit in units.items():
        for piece, checksum in zip(unit, results[number].checksums, strict=True):
            if piece.start and sums and sums[-1][0] == piece.file:
                sums[-1] = (piece.file, (sums[-1][1] + int(checksum, 16)) % 2**64)
            else:
                sums.append((piece.file, int(checksum, 16)))
    return [Input(name, sizes[name], f"{total:016x}") for name, total in sums]


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
    give_name(partial, output, overwrite)
