"""The manifest that makes a folder a checkpoint: what the run had reached, and every file with size and checksum.

It is written last. Its own checksum covers all of its bytes, so that damage to it is found like damage to a tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError

from modalities_core.errors import CheckpointError
from modalities_core.files import checksum, sync_folder, write_text

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
CHECKSUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size and its xxh3-64 in hexadecimal digits."""

    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor's shape over all ranks and its dtype as torch names it."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint knows about itself.

    step, samples, tokens: what the run had completed.
    samples_per_step: the global batch.
    parent_step: step of the checkpoint before it on the same line of training; None for the first.
    commit: counts the checkpoints of a folder in the order in which they were committed, over all lines.
    world_size: ranks that wrote it.
    state: JSON values of the loop, such as the sums of a log window that is still open.
    tensors: every parameter and buffer of the model.
    files: by path relative to the folder, with slashes.
    """

    step: int
    samples: int
    tokens: int
    samples_per_step: int
    parent_step: int | None
    commit: int
    world_size: int
    seed: int
    data_fingerprint: str
    config_hash: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def bytes(self) -> int:
        """Of all files together, without the manifest."""
        return sum(record.bytes for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it into ``folder``, whole and durable or not at all."""
    write_text(folder / MANIFEST, _text(asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``, itself checked, its files not.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a later schema.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        payload = json.loads(text)
        stored = payload.pop("checksum")
        if _text(payload) != text:
            raise CheckpointError(f"{path} is damaged: its checksum is {stored}, its content gives another")
        if payload["schema_version"] > SCHEMA_VERSION:
            message = f"{path} has schema {payload['schema_version']}, this version knows up to {SCHEMA_VERSION}"
            raise CheckpointError(message, hint="load it with the version of Modalities that wrote it, or a later one")
        manifest = manifest_from(payload)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not completed") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    for name in manifest.files:
        if not _is_plain(name):
            raise CheckpointError(f"{path} is damaged: {name!r} is not a path inside of the checkpoint")
    return manifest


def manifest_from(payload: dict[str, Any]) -> Manifest:
    """The inverse of ``dataclasses.asdict``.

    Raises:
        ValidationError: a field is missing, unknown or of another type.
    """
    return _adapter().validate_json(json.dumps(payload), strict=True)


def files_in(folder: Path) -> list[str]:
    """Every file in ``folder`` by path relative to it, with slashes, the largest first."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def record_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Size and checksum of the named files in ``folder`` as read back from it; their bytes are on disk afterwards."""
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        records = pool.map(lambda name: _record(folder / name), names)
        return dict(zip(names, records, strict=True))


def sync_folders(folder: Path, names: Iterable[str]) -> None:
    """Make the names of the files in ``folder`` durable."""
    for directory in sorted({(folder / name).parent for name in names} | {folder}):
        sync_folder(directory)


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """One clause for each file that is missing or has another size or content; empty where all is well."""
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        found = pool.map(lambda item: _damage(folder / item[0], item[0], item[1]), manifest.files.items())
    return [clause for clause in found if clause]


def signature(folder: Path, manifest: Manifest) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and modification times: as long as they stay, a verified checkpoint need not be read again.

    Raises:
        OSError: a file is missing.
    """
    stats: Sequence[tuple[str, os.stat_result]] = [
        (name, (folder / name).stat()) for name in sorted([*manifest.files, MANIFEST])
    ]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _text(payload: dict[str, Any]) -> str:
    content = json.dumps(payload, sort_keys=True, ensure_ascii=False)
    checked = payload | {"checksum": xxhash.xxh3_64(content.encode()).hexdigest()}
    return json.dumps(checked, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _record(path: Path) -> FileRecord:
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(path.stat().st_size, checksum(path))


def _damage(path: Path, name: str, record: FileRecord) -> str:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes instead of {record.bytes}"
        return "" if checksum(path) == record.xxh3 else f"{name} has another checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
