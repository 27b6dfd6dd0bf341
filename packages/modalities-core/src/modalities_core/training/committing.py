"""How written files become a checkpoint.

They go into a hidden neighbour of the final folder. When all ranks have written, rank 0 adds the manifest, makes
everything durable and renames the folder: before that instant there is no checkpoint, after it there is a whole one.
Older ones are deleted only then.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from modalities_core.errors import CheckpointError, ResourceError
from modalities_core.files import sync_folder
from modalities_core.interfaces import World
from modalities_core.training.collective import on_first, together
from modalities_core.training.lineage import Checkpoint, Shelf, step_name
from modalities_core.training.manifest import (
    FileRecord,
    Manifest,
    files_in,
    manifest_from,
    record_files,
    sync_folders,
    write_manifest,
)


class Save:
    """One checkpoint on its way: from an empty hidden folder to a committed one, alike on every rank.

    Args:
        shelf: the folder of checkpoints.
        keep: valid checkpoints that stay.
        draft: the manifest without files and commit number.
        needed: bytes that it will take on disk.
    """

    def __init__(self, shelf: Shelf, keep: int, draft: Manifest, needed: int) -> None:
        self._shelf = shelf
        self._keep = keep
        self._draft = draft
        self._needed = needed
        self._temporary = shelf.folder / f".{step_name(draft.step)}.tmp"

    def __call__(self, world: World, write: Callable[[Path], None]) -> tuple[Checkpoint, list[str]]:
        """Write, commit, then delete what is beyond ``keep``; collective.

        Args:
            world: the ranks.
            write: puts this rank's files into the folder that it is given.

        Returns:
            The checkpoint, and warnings about what could not be deleted.

        Raises:
            ResourceError: the disk is full or the folder cannot be written. What was there before stays whole.
        """
        temporary = self._temporary
        try:
            on_first(world, lambda: self._told(self._prepare))
            together(world, lambda: self._told(lambda: write(temporary)), "saving a checkpoint")
            names = on_first(world, lambda: self._told(lambda: files_in(temporary)))
            files = self._records(world, names)
            manifest = manifest_from(on_first(world, lambda: self._told(lambda: asdict(self._commit(files)))))
        except Exception:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        warnings = on_first(world, lambda: self._retain(manifest))
        return Checkpoint(self._shelf.folder / step_name(manifest.step), manifest), warnings

    def _prepare(self) -> None:
        folder, needed = self._shelf.folder, self._needed
        folder.mkdir(parents=True, exist_ok=True)
        self._shelf.sweep()
        free = free_bytes(folder)
        if free < needed:
            raise ResourceError(
                f"a checkpoint takes {_megabytes(needed)}, but the disk of {folder} has {_megabytes(free)} left",
                hint="make room, or let the run write elsewhere; the earlier checkpoints are whole",
            )
        self._temporary.mkdir()

    def _records(self, world: World, names: list[str]) -> dict[str, FileRecord]:
        """Size and checksum of every file, each read back by one rank."""
        own: dict[str, FileRecord] = {}

        def read_back() -> None:
            own.update(record_files(self._temporary, names[world.rank :: world.size]))

        together(world, lambda: self._told(lambda: _shared(self._temporary, read_back)), "reading a checkpoint back")
        numbers = torch.zeros((len(names), 3), dtype=torch.int64, device=world.device)
        for name, record in own.items():
            digest = int(record.xxh3, 16)
            row = torch.tensor([record.bytes, digest >> 32, digest & 0xFFFFFFFF], dtype=torch.int64)
            numbers[names.index(name)] = row.to(world.device)
        rows = world.sum(numbers).tolist()
        return {
            name: FileRecord(size, f"{(high << 32) | low:016x}")
            for name, (size, high, low) in zip(names, rows, strict=True)
        }

    def _commit(self, files: dict[str, FileRecord]) -> Manifest:
        shelf, temporary = self._shelf, self._temporary
        sync_folders(temporary, files)
        manifest = replace(self._draft, files=files, commit=shelf.next_commit())
        write_manifest(temporary, manifest)
        final = shelf.folder / step_name(manifest.step)
        if final.exists():
            shelf.set_aside(final)
        os.replace(temporary, final)
        sync_folder(shelf.folder)
        shelf.note_verified(manifest)
        return manifest

    def _retain(self, manifest: Manifest) -> list[str]:
        shelf = self._shelf
        if clauses := shelf.problems(manifest):
            return [f"the checkpoint of step {manifest.step} reads back damaged: {', '.join(clauses)}; kept all others"]
        try:
            shelf.retain(manifest, self._keep)
        except OSError as error:
            return [f"could not delete old checkpoints in {shelf.folder}: {error}"]
        return []

    def _told(self, action: Callable[[], Any]) -> Any:
        """Do it; what the operating system refuses becomes an error that says what a user can do."""
        with _disk_errors(self._shelf.folder, self._needed):
            return action()


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written on the disk of ``folder``, which need not exist yet."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _shared(folder: Path, read: Callable[[], None]) -> None:
    try:
        read()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"this rank does not see {error.filename}, which was just written",
            hint=f"{folder.parent} has to be on a file system that all nodes of the run share",
        ) from error


@contextmanager
def _disk_errors(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "the earlier checkpoints are whole; the unfinished one was removed"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = _megabytes(free_bytes(folder))
            message = f"the disk is full: a checkpoint in {folder} takes {_megabytes(needed)}, {left} are left"
            raise ResourceError(message, hint=hint) from error
        raise ResourceError(f"could not write a checkpoint into {folder}: {error}", hint=hint) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
