"""When a checkpoint is written, how it becomes one, and which are kept.

The format's files go into a hidden neighbour of the final folder. When all ranks have written, rank 0 adds the
manifest, makes everything durable and renames the folder: before that instant there is no checkpoint, after it there
is a whole one. Older ones are deleted only then.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError, ResourceError
from modalities_core.files import sync_folder
from modalities_core.interfaces import CheckpointFormat, Model, World
from modalities_core.training.collective import on_first, together
from modalities_core.training.lineage import ABANDONED, Checkpoint, Shelf, step_name
from modalities_core.training.manifest import (
    Manifest,
    TensorRecord,
    damage,
    manifest_from,
    read_manifest,
    record_files,
    write_manifest,
)
from modalities_core.training.parameters import as_module, tensor_layout

SLACK_BYTES = 1 << 20


class Checkpoints:
    """Saves every so many steps and at the end, keeps the newest few.

    Args:
        format: how tensors lie in a checkpoint's folder.
        every: steps between two checkpoints.
        keep: valid checkpoints that stay, at least 1.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, format: CheckpointFormat, every: int, keep: int = 3) -> None:
        if every < 1:
            raise ConfigError(f"every has to be at least 1 step, not {every}", about=(self, "every"))
        if keep < 1:
            raise ConfigError(f"keep has to be at least 1 checkpoint, not {keep}", about=(self, "keep"))
        self.format = format
        self.every = every
        self.keep = keep

    def save(
        self, shelf: Shelf, world: World, model: Model, optimizer: torch.optim.Optimizer, draft: Manifest
    ) -> tuple[Checkpoint, list[str]]:
        """Write, commit, then delete what is beyond ``keep``; collective.

        Args:
            shelf: the folder of checkpoints.
            world: the ranks.
            model: whose tensors are written.
            optimizer: whose state is written.
            draft: the manifest without files, tensors, versions and commit number.

        Returns:
            The checkpoint, and warnings about what could not be deleted.

        Raises:
            ResourceError: the disk is full or the folder cannot be written. What was there before stays whole.
        """
        temporary = shelf.folder / f".{step_name(draft.step)}.tmp"
        needed = state_bytes(model, optimizer) + SLACK_BYTES
        filled = replace(draft, tensors=_tensors(model), world_size=world.size, versions=_versions())

        def write() -> None:
            with _disk_errors(shelf.folder, needed):
                self.format.save(temporary, model, optimizer)

        def commit() -> dict[str, Any]:
            with _disk_errors(shelf.folder, needed):
                return asdict(_commit(shelf, temporary, filled))

        try:
            on_first(world, lambda: _prepare(shelf, temporary, needed))
            together(world, write, "saving a checkpoint")
            manifest = manifest_from(on_first(world, commit))
        except Exception:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        warnings = on_first(world, lambda: self._retain(shelf, manifest))
        return Checkpoint(shelf.folder / step_name(draft.step), manifest), warnings

    def load(
        self,
        shelf: Shelf,
        world: World,
        model: Model,
        optimizer: torch.optim.Optimizer | None,
        checkpoint: Checkpoint,
    ) -> list[str]:
        """Read a verified checkpoint, then move aside what does not lead to it; collective.

        Returns:
            Warnings about what was moved.

        Raises:
            CheckpointError: its tensors do not fit the model or the optimizer.
        """
        together(world, lambda: self.format.load(checkpoint.folder, model, optimizer), "loading a checkpoint")
        moved = on_first(world, lambda: shelf.abandon(checkpoint.manifest))
        step = checkpoint.manifest.step
        return [f"moved {name} to {ABANDONED}/, since the run goes on from step {step}" for name in moved]

    def find(self, shelf: Shelf, world: World, at_step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """:meth:`Shelf.newest_valid` as rank 0 sees it, on all ranks; collective."""

        def search() -> tuple[dict[str, Any] | None, list[str]]:
            found, warnings = shelf.newest_valid(at_step)
            return (None if found is None else asdict(found.manifest)), warnings

        payload, warnings = on_first(world, search)
        if payload is None:
            return None, list(warnings)
        manifest = manifest_from(payload)
        return Checkpoint(shelf.folder / step_name(manifest.step), manifest), list(warnings)

    def _retain(self, shelf: Shelf, manifest: Manifest) -> list[str]:
        if clauses := shelf.problems(manifest):
            return [f"the checkpoint of step {manifest.step} reads back damaged: {', '.join(clauses)}; kept all others"]
        try:
            shelf.retain(manifest, self.keep)
        except OSError as error:
            return [f"could not delete old checkpoints in {shelf.folder}: {error}"]
        return []


def load_checkpoint(
    folder: Path, format: CheckpointFormat, model: Model, optimizer: torch.optim.Optimizer | None = None
) -> Manifest:
    """Verify every byte of the checkpoint in ``folder``, then load it; for export and generation.

    Raises:
        CheckpointError: it is damaged or does not fit.
    """
    manifest = read_manifest(folder)
    if clauses := damage(folder, manifest):
        raise CheckpointError(f"{folder} is damaged: {', '.join(clauses)}")
    format.load(folder, model, optimizer)
    return manifest


def state_bytes(model: Model, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state over all ranks, what a checkpoint takes on disk."""
    module = as_module(model)
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    tensors = [*module.parameters(), *module.buffers(), *states]
    return sum(value.numel() * value.element_size() for value in tensors)


def expected_bytes(model: Model, optimizer: torch.optim.Optimizer) -> int:
    """:func:`state_bytes`, reckoning with two moments per trained parameter while the optimizer has no state."""
    moments = 0 if optimizer.state else 2 * sum(p.numel() * p.element_size() for p in as_module(model).parameters())
    return state_bytes(model, optimizer) + moments


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written on the disk of ``folder``, which need not exist yet."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _prepare(shelf: Shelf, temporary: Path, needed: int) -> None:
    with _disk_errors(shelf.folder, needed):
        shelf.folder.mkdir(parents=True, exist_ok=True)
        shelf.sweep()
        free = free_bytes(shelf.folder)
        if free < needed:
            raise ResourceError(
                f"a checkpoint takes {_megabytes(needed)}, but the disk of {shelf.folder} has {_megabytes(free)} left",
                hint="make room, or let the run write elsewhere; the earlier checkpoints are whole",
            )
        temporary.mkdir()


def _commit(shelf: Shelf, temporary: Path, draft: Manifest) -> Manifest:
    manifest = replace(draft, files=record_files(temporary), commit=shelf.next_commit())
    write_manifest(temporary, manifest)
    final = shelf.folder / step_name(draft.step)
    if final.exists():
        shelf.set_aside(final)
    os.replace(temporary, final)
    sync_folder(shelf.folder)
    return manifest


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


def _tensors(model: Model) -> dict[str, TensorRecord]:
    return {name: TensorRecord(*layout) for name, layout in tensor_layout(model).items()}


def _versions() -> dict[str, str]:
    try:
        own = version("modalities-core")
    except PackageNotFoundError:
        own = "unknown"
    return {"modalities-core": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
