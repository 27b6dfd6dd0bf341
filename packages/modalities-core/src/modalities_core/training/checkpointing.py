"""When a checkpoint is written, and which are kept; in the background where that can be."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import CheckpointFormat, Model, World
from modalities_core.training.background import Background
from modalities_core.training.collective import on_first, together
from modalities_core.training.committing import Save
from modalities_core.training.lineage import ABANDONED, Checkpoint, Shelf, step_name
from modalities_core.training.manifest import Manifest, TensorRecord, damage, manifest_from, read_manifest
from modalities_core.training.parameters import as_module, tensor_layout

SLACK_BYTES = 1 << 20
Writer = Callable[[Path, World], None]
"""Writes a copy of the state into a folder, in another thread, with ranks to talk to from there."""


class Written(NamedTuple):
    """A checkpoint that was committed.

    checkpoint: where it lies, and its manifest.
    warnings: about what could not be deleted.
    seconds: from the call to the commit and the deletion of older ones.
    blocked_seconds: of these, those in which training stood still.
    """

    checkpoint: Checkpoint
    warnings: list[str]
    seconds: float
    blocked_seconds: float


class Checkpoints:
    """Saves every so many steps and at the end, keeps the newest few.

    Args:
        format: how tensors lie in a checkpoint's folder.
        every: steps between two checkpoints.
        keep: valid checkpoints that stay, at least 1.
        asynchronous: train on while a checkpoint is written: training stands still only while each rank copies its
            part of the state into the memory of its host, which has to have room for that; where it has not, or the
            format cannot, training waits as with ``false``. The last checkpoint of a run is always waited for.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, format: CheckpointFormat, every: int, keep: int = 3, asynchronous: bool = True) -> None:
        if every < 1:
            raise ConfigError(f"every has to be at least 1 step, not {every}", about=(self, "every"))
        if keep < 1:
            raise ConfigError(f"keep has to be at least 1 checkpoint, not {keep}", about=(self, "keep"))
        self.format = format
        self.every = every
        self.keep = keep
        self.asynchronous = asynchronous
        self._apart: tuple[World, World] | None = None
        self._in_flight: Background[Written] | None = None
        self._crowded = False
        self._written: list[Written] = []

    def save(
        self, shelf: Shelf, world: World, model: Model, optimizer: torch.optim.Optimizer, draft: Manifest
    ) -> Written:
        """Write, commit, then delete what is beyond ``keep``; waits for an earlier save; collective.

        Args:
            shelf: the folder of checkpoints.
            world: the ranks.
            model: whose tensors are written.
            optimizer: whose state is written.
            draft: the manifest without files, tensors, versions and commit number.

        Raises:
            ResourceError: the disk is full or the folder cannot be written. What was there before stays whole.
        """
        start = time.perf_counter()
        self.settle()
        save = Save(shelf, self.keep, _filled(draft, model, world), state_bytes(model, optimizer) + SLACK_BYTES)
        checkpoint, warnings = save(world, lambda folder: self.format.save(folder, model, optimizer))
        seconds = time.perf_counter() - start
        return Written(checkpoint, warnings, seconds, seconds)

    def begin(
        self,
        shelf: Shelf,
        world: World,
        model: Model,
        optimizer: torch.optim.Optimizer,
        draft: Manifest,
        failed: Callable[[], None],
    ) -> bool:
        """Copy the state and write it in the background, once an earlier save has ended; collective.

        Args:
            shelf: as in :meth:`save`, as all but the last.
            world: likewise.
            model: likewise.
            optimizer: likewise.
            draft: likewise.
            failed: called from another thread when the save has failed; :meth:`settle` then raises why.

        Returns:
            Whether it was begun; if not, all is as before, and :meth:`save` remains.
        """
        start = time.perf_counter()
        self.settle()
        apart = self.get_ready(world)
        stage = getattr(self.format, "stage", None)
        if apart is None or stage is None:
            return False
        save = Save(shelf, self.keep, _filled(draft, model, world), state_bytes(model, optimizer) + SLACK_BYTES)
        staged = _staged(world, lambda: stage(model, optimizer))
        if staged is None:
            if not self._crowded and world.rank == 0:
                message = (
                    "the host has no room for a copy of the state, so training waits for checkpoints to be written"
                )
                logging.getLogger("modalities").warning(message)
            self._crowded = True
            return False
        write: Writer = staged
        blocked = time.perf_counter() - start

        def finish() -> Written:
            checkpoint, warnings = save(apart, lambda folder: write(folder, apart))
            return Written(checkpoint, warnings, time.perf_counter() - start, blocked)

        self._in_flight = Background(finish, failed)
        return True

    def reserve(self, world: World, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Let the format make room for :meth:`begin`, now that the optimizer has its state; does not wait."""
        reserve = getattr(self.format, "reserve", None)
        if reserve is not None and self.get_ready(world) is not None:
            reserve(model, optimizer)

    def settle(self) -> None:
        """Wait for the save that goes on in the background, if one does; collective.

        Raises:
            Exception: what it failed of, as :meth:`save` would raise it.
        """
        if self._in_flight is not None:
            self._in_flight.wait()
            in_flight, self._in_flight = self._in_flight, None
            self._written.append(in_flight.result())

    def written(self) -> list[Written]:
        """What was written in the background since the last call, without waiting for anything."""
        if self._in_flight is not None and self._in_flight.done and not self._in_flight.failed:
            self.settle()
        written, self._written = self._written, []
        return written

    def drop(self, seconds: float) -> None:
        """Wait for a save in the background no longer than this; then it ends with the process."""
        if self._in_flight is not None:
            self._in_flight.wait(seconds)
            self._in_flight = None

    def get_ready(self, world: World) -> World | None:
        """The ranks for another thread, made at the first call; None where saves are not asynchronous; collective."""
        apart = getattr(world, "apart", None)
        if not self.asynchronous or apart is None or not hasattr(self.format, "stage"):
            return None
        if self._apart is None or self._apart[0] is not world:
            self._apart = world, apart()
        return self._apart[1]

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
        """:meth:`Shelf.newest_valid` as rank 0 sees it, on all ranks, after a save in the background; collective."""
        self.get_ready(world)
        self.settle()

        def search() -> tuple[dict[str, Any] | None, list[str]]:
            found, warnings = shelf.newest_valid(at_step)
            return (None if found is None else asdict(found.manifest)), warnings

        payload, warnings = on_first(world, search)
        if payload is None:
            return None, list(warnings)
        manifest = manifest_from(payload)
        return Checkpoint(shelf.folder / step_name(manifest.step), manifest), list(warnings)


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


def _filled(draft: Manifest, model: Model, world: World) -> Manifest:
    return replace(draft, tensors=_tensors(model), world_size=world.size, versions=_versions())


def _staged(world: World, stage: Callable[[], Writer]) -> Writer | None:
    """What ``stage`` gives; None on all ranks where the host of one has no room for it; collective."""
    write: Writer | None = None

    def attempt() -> None:
        nonlocal write
        try:
            write = stage()
        except MemoryError:
            write = None

    together(world, attempt, "copying the state for a checkpoint")
    lacking = world.sum(torch.tensor([float(write is None)], device=world.device)).item()
    return None if lacking else write


def _tensors(model: Model) -> dict[str, TensorRecord]:
    return {name: TensorRecord(*layout) for name, layout in tensor_layout(model).items()}


def _versions() -> dict[str, str]:
    try:
        own = version("modalities-core")
    except PackageNotFoundError:
        own = "unknown"
    return {"modalities-core": own, "torch": str(torch.__version__), "python": platform.python_version()}
