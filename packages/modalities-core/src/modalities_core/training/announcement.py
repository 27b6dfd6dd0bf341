"""What a run says before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from modalities_core.events import RunStarted, Warned
from modalities_core.interfaces import Batches, Executor, Schedule, World
from modalities_core.training.journal import Journal
from modalities_core.training.parameters import parameter_count
from modalities_core.training.resume import Start


class Announced(Protocol):
    """The parts of a trainer that are told about."""

    world: World
    executor: Executor
    schedule: Schedule
    batches: Batches
    steps: int


def announce(trainer: Announced, folder: Path, journal: Journal, start: Start) -> None:
    """Tell where the run starts, and what the user should know about that."""
    journal.emit(
        RunStarted(
            folder=folder,
            first_step=start.progress.step,
            steps=trainer.steps,
            tokens_per_step=trainer.batches.samples_per_step * trainer.batches.sequence_length,
            parameters=parameter_count(trainer.executor.model),
            ranks=trainer.world.size,
            device=device_name(trainer.world.device),
            resumed_from=start.resumed_from,
        )
    )
    for warning in start.warnings:
        journal.emit(Warned(warning))
    planned = getattr(trainer.schedule, "steps", trainer.steps)
    if planned != trainer.steps:
        journal.emit(Warned(f"the schedule is made for {planned} steps, the run has {trainer.steps}"))
    journal.status("running")


def device_name(device: torch.device) -> str:
    """What to call the device in logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
