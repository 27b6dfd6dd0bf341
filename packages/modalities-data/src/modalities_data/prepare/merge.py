"""Packed folders joined into one: manifests are concatenated, and files linked, not rewritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from modalities_core.errors import ConfigError, DataError
from modalities_data.disk import user_errors
from modalities_data.manifest import FILE_NAME, Accounting, Input, Manifest, Shard, write_manifest
from modalities_data.packed import PackedFolder
from modalities_data.prepare.folder import STATE_FOLDER, check_replaceable, give_name, partial_folder, working_folder
from modalities_data.prepare.shards import shard_name

REJECTED = ".rejected.jsonl"


class MergeReport(NamedTuple):
    """The joined folder's manifest, and how many files had to be copied because they could not be linked."""

    manifest: Manifest
    copied: int


class _File(NamedTuple):
    """A file of a folder and its name in the joined one."""

    path: Path
    name: str


def merge(folders: Sequence[Path], output: Path, overwrite: bool = False) -> MergeReport:
    """Join ``folders`` in their order into the packed folder ``output``, without rewriting a token.

    Files are hard links where the file system has them, else copies. ``output`` may be one of ``folders``, with
    ``overwrite``: that appends to it, and whoever has it open keeps what it was.

    The parts of one ``pack(part=...)`` job are put in their own order, and their names and manifest become those of a
    single run. Of other folders the shards are numbered anew, and sidecars with source numbers, which mean something
    in one folder only, are left out.

    Args:
        folders: packed folders of the same tokenizer, dtype and vocabulary.
        output: the folder to make.
        overwrite: replace an existing packed folder when the new one is complete.

    Raises:
        ConfigError: there is no folder, or one twice.
        DataError: folders do not fit together or are damaged, parts are missing, or the output exists.
        ResourceError: the disk is full.
    """
    if not folders:
        raise ConfigError("there is no folder to merge")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ConfigError("a folder is given twice")
    output = Path(os.path.abspath(output))
    check_replaceable(output, overwrite)
    opened = [PackedFolder(Path(folder)) for folder in folders]
    for other in opened[1:]:
        _check_same(opened[0], other)
    jobs = {_part(folder).get("job") for folder in opened}
    if jobs == {None}:
        files, manifest = _joined(opened)
    elif len(jobs) == 1:
        files, manifest = _completed(opened)
    else:
        raise DataError(
            "these are parts of different jobs, or parts and whole folders",
            hint="first merge the parts of each job, then what they gave",
        )
    if not manifest.tokens:
        raise DataError("the folders have no documents")
    partial = partial_folder(output)
    identity = {"merge": [[str(folder.folder.resolve()), folder.manifest.fingerprint] for folder in opened]}
    files += [_File(path, path.name) for path in sorted(opened[0].folder.glob("tokenizer.*"))]
    with user_errors(partial), working_folder(partial, identity):
        copied = sum(_link(file, partial) for file in files)
        _finish(partial, output, {file.name for file in files}, manifest, overwrite)
    return MergeReport(manifest, copied)


def _check_same(one: PackedFolder, other: PackedFolder) -> None:
    """Refuse folders whose ids mean different things, or that do not say what theirs mean."""
    for folder in (one, other):
        if not folder.manifest.tokenizer.fingerprint:
            raise DataError(
                f"{folder.folder} does not say which tokenizer made it, so it cannot be merged",
                hint="convert it again with --tokenizer",
            )
    facts = [
        {
            "tokenizer": folder.manifest.tokenizer.fingerprint,
            "dtype": folder.manifest.dtype,
            "vocabulary": folder.manifest.vocab_size,
            "end of document": folder.manifest.end_of_document,
        }
        for folder in (one, other)
    ]
    if different := [name for name in facts[0] if facts[0][name] != facts[1][name]]:
        told = "; ".join(
            f"{folder.folder} has {', '.join(f'{name} {known[name]}' for name in different)}"
            for folder, known in zip((one, other), facts, strict=True)
        )
        raise DataError(f"folders of different tokenizers cannot be merged: {told}")


def _part(folder: PackedFolder) -> dict[str, Any]:
    """Which part of which job the folder is; empty where it is a whole."""
    return folder.manifest.options.get("part", {})


def _completed(folders: list[PackedFolder]) -> tuple[list[_File], Manifest]:
    """Parts of one job: everything keeps its name, and the manifest is the one of a single run."""
    folders = sorted(folders, key=lambda folder: _part(folder)["number"])
    count = _part(folders[0])["of"]
    numbers = [_part(folder)["number"] for folder in folders]
    if {_part(folder)["of"] for folder in folders} != {count} or len(set(numbers)) < len(numbers):
        told = [f"{folder.folder} is {_part(folder)['number']}/{_part(folder)['of']}" for folder in folders]
        raise DataError(f"the parts overlap: {', '.join(told)}")
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        raise DataError(
            f"of {count} parts, {', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing",
            hint="run `modalities-data pack` with --shard for the missing ones, then merge all of them",
        )
    files = [_File(folder.folder / name, name) for folder in folders for name in _names(folder)]
    manifest = _sum(folders, [shard for folder in folders for shard in folder.manifest.shards])
    options = {name: value for name, value in folders[0].manifest.options.items() if name != "part"}
    return files, msgspec.structs.replace(manifest, options=options)


def _joined(folders: list[PackedFolder]) -> tuple[list[_File], Manifest]:
    """Whole folders: shards are numbered on from the first folder to the last."""
    files, shards = [], []
    for position, folder in enumerate(folders):
        for shard in folder.manifest.shards:
            renamed = msgspec.structs.replace(shard, name=shard_name(len(shards)), origins=None)
            # Both list their files in the same order; the one with source numbers comes last.
            names = zip(shard.files(), renamed.files(), strict=False)
            files += [_File(folder.folder / old, new) for old, new in names]
            shards.append(renamed)
        files += [_File(path, f"{position:05d}-{path.name}") for path in _rejected(folder)]
    told = [{"folder": str(folder.folder), "fingerprint": folder.manifest.fingerprint} for folder in folders]
    return files, msgspec.structs.replace(_sum(folders, shards), options={"merged": told})


def _names(folder: PackedFolder) -> Iterator[str]:
    for shard in folder.manifest.shards:
        yield from shard.files()
    yield from (path.name for path in _rejected(folder))


def _rejected(folder: PackedFolder) -> list[Path]:
    return sorted(folder.folder.glob(f"*{REJECTED}"))


def _sum(folders: list[PackedFolder], shards: list[Shard]) -> Manifest:
    """The first folder's manifest with the counts of all."""
    manifests = [folder.manifest for folder in folders]
    records = [manifest.tokenizer for manifest in manifests]
    engines = {(record.engine, record.engine_version): None for record in records}
    return msgspec.structs.replace(
        manifests[0],
        largest_id=max(manifest.largest_id for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        documents=sum(manifest.documents for manifest in manifests),
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        tokenizer=msgspec.structs.replace(
            records[0],
            engine=", ".join(engine for engine, _ in engines),
            engine_version=", ".join(number for _, number in engines),
            parity_digest=records[0].parity_digest if len({record.parity_digest for record in records}) == 1 else "",
        ),
        accounting=sum((manifest.accounting for manifest in manifests), Accounting()),
        shards=shards,
        producer=f"modalities-data {version('modalities-data')}",
        inputs=_inputs(manifests),
    )


def _inputs(manifests: list[Manifest]) -> list[Input]:
    """All inputs in order; a file that one part of a job ended in and the next went on with is one."""
    inputs: list[Input] = []
    for manifest in manifests:
        for place, entry in enumerate(manifest.inputs):
            if inputs and place == 0 and manifest.options.get("part", {}).get("continues"):
                total = (int(inputs[-1].checksum, 16) + int(entry.checksum, 16)) % 2**64
                inputs[-1] = msgspec.structs.replace(entry, checksum=f"{total:016x}")
            else:
                inputs.append(entry)
    return inputs


def _link(file: _File, folder: Path) -> bool:
    """Link ``file`` into ``folder``, or copy it; whether it was copied."""
    target = folder / file.name
    target.unlink(missing_ok=True)
    try:
        os.link(file.path, target)
        return False
    except OSError:  # another file system, or one without links
        with file.path.open("rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        return True


def _finish(partial: Path, output: Path, names: set[str], manifest: Manifest, overwrite: bool) -> None:
    """Write the manifest last, drop what a killed run may have left, and give the folder its name."""
    write_manifest(partial, manifest)
    shutil.rmtree(partial / STATE_FOLDER)
    for entry in partial.iterdir():
        if entry.name not in names | {FILE_NAME}:
            entry.unlink()
    give_name(partial, output, overwrite)
