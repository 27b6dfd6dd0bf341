"""Where a run starts: at step 0, or where the newest valid checkpoint of its folder ends."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from modalities_core.errors import CheckpointError
from modalities_core.interfaces import Batches, Executor, World
from modalities_core.progress import Progress
from modalities_core.training.checkpointing import Checkpoints, expected_bytes
from modalities_core.training.collective import on_first
from modalities_core.training.committing import free_bytes
from modalities_core.training.consumption import samples_of
from modalities_core.training.journal import STATUS
from modalities_core.training.lineage import Shelf
from modalities_core.training.manifest import Manifest
from modalities_core.training.optim import hyperparameters, restore_hyperparameters

CHECKPOINTS = "checkpoints"
LEFT_BY_A_RUN = (CHECKPOINTS, STATUS, "metrics*.jsonl", "tensorboard", "wandb", "mlflow.json", "profile")


class Resumable(Protocol):
    """What a checkpoint is loaded into and compared with: the parts of a trainer."""

    world: World
    executor: Executor
    optimizer: torch.optim.Optimizer
    batches: Batches
    checkpoints: Checkpoints | None
    seed: int


@dataclass(frozen=True, slots=True)
class Start:
    """Where to start, and what the loop has to take over."""

    progress: Progress = field(default_factory=Progress)
    parent_step: int | None = None
    resumed_from: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def is_done(self, folder: Path, steps: int, world: World) -> bool:
        """Whether nothing is left to do, not even the evaluation after the last step; collective."""
        return on_first(world, lambda: self.progress.step == steps and _status(folder) == ("done", steps))


def find_start(trainer: Resumable, shelf: Shelf, config_hash: str, from_step: int | None) -> Start:
    """Load the checkpoint to go on from, if there is one, into the trainer's model and optimizer; collective.

    What the configuration says about the optimizer stays in force, also where it differs from the checkpoint.

    Raises:
        CheckpointError: no checkpoint is valid, or the one that is belongs to other data or another model.
    """
    checkpoints, world = trainer.checkpoints, trainer.world
    if checkpoints is None:
        if from_step is not None:
            raise CheckpointError(f"cannot go on from step {from_step}: the run has no checkpoints component")
        return Start()
    model, optimizer = trainer.executor.model, trainer.optimizer
    found, warnings = checkpoints.find(shelf, world, from_step)
    if found is None:
        needed, free = on_first(world, lambda: (expected_bytes(model, optimizer), free_bytes(shelf.folder)))
        if free < needed:
            sizes = f"{needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left"
            warnings.append(f"a checkpoint will take about {sizes}")
        return Start(warnings=tuple(warnings))
    manifest = found.manifest
    refuse_other_data(manifest, trainer.batches, found.folder)
    if config_hash and manifest.config_hash and config_hash != manifest.config_hash:
        warnings.append(f"the configuration has changed since {found.folder} was written; the new one holds")
    if manifest.seed != trainer.seed:
        warnings.append(f"seed is {trainer.seed}, but was {manifest.seed} up to step {manifest.step}")
    configured = hyperparameters(optimizer)
    warnings += checkpoints.load(shelf, world, model, optimizer, found)
    restore_hyperparameters(optimizer, configured)
    restore = getattr(trainer.executor, "restore", None)
    if restore is not None and "executor" in manifest.state:
        restore(manifest.state["executor"])
    return Start(
        progress=Progress(manifest.step, manifest.samples, manifest.tokens),
        parent_step=manifest.step,
        resumed_from=str(found.folder),
        state=manifest.state,
        warnings=tuple(warnings),
    )


def refuse_other_data(manifest: Manifest, batches: Batches, folder: Path) -> None:
    """Refuse to go on with other samples than the checkpoint's run had, or with steps that would not join its own.

    The size of steps may change where the ones before end alike, as when a stage is added to a batch-size warm-up.

    Raises:
        CheckpointError: saying what differs.
    """
    if manifest.data_fingerprint != batches.fingerprint:
        raise CheckpointError(
            f"{folder} was trained on the data {manifest.data_fingerprint}, this run has {batches.fingerprint}",
            hint="put back dataset, sequence length and data seed, or start afresh in another folder",
            about=batches,
        )
    left_out = manifest.state.get("non_finite", {}).get("left_out", 0)
    first = samples_of(batches, manifest.step + left_out).start
    # Manifests that do not tell are of runs with steps of one size.
    ended = manifest.state.get("next_sample", (manifest.step + left_out) * manifest.samples_per_step)
    if first != ended:
        raise CheckpointError(
            f"{folder} was trained with {manifest.samples_per_step} samples per step, this run has "
            f"{batches.samples_per_step}, and begins step {manifest.step + 1} with sample {first} where that ended "
            f"before {ended}: it would skip or repeat samples",
            hint=f"set samples_per_step to {manifest.samples_per_step} and its warm-up as it was, or start afresh in "
            "another folder",
            about=(batches, "samples_per_step"),
        )


def set_run_aside(folder: Path, world: World, fresh: bool) -> None:
    """Make the run's folder; if ``fresh``, move what an earlier run left there to ``previous-N``; collective."""

    def move() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        left = sorted(path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)) if fresh else []
        if not left:
            return
        number = 1
        while (folder / f"previous-{number}").exists():
            number += 1
        target = folder / f"previous-{number}"
        target.mkdir()
        for path in left:
            os.replace(path, target / path.name)

    on_first(world, move)


def _status(folder: Path) -> tuple[object, object]:
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return status["state"], status["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
