"""What happens beside the updates: logging, saving, evaluating."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modalities_core.events import CheckpointSaved, StepLogged, Warned
from modalities_core.interfaces import Batches, Executor, World
from modalities_core.progress import Progress
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.gradients import StepTotals
from modalities_core.training.journal import Journal
from modalities_core.training.lineage import Shelf
from modalities_core.training.manifest import Manifest
from modalities_core.training.peak import peak_flops
from modalities_core.training.throughput import Stopwatch, memory_bytes, mfu


@dataclass(frozen=True, slots=True)
class StepTaken:
    """An update that just happened: progress after it, what the ranks found, and the learning rate it used."""

    progress: Progress
    totals: StepTotals
    learning_rate: float


class StepLog:
    """Adds up the loss and reports it after the first step, after every ``every`` and after the last.

    Sums that are not reported yet are part of a checkpoint, so that a resumed run logs what an unbroken one would.
    """

    def __init__(
        self, journal: Journal, executor: Executor, world: World, batches: Batches, steps: int, every: int
    ) -> None:
        self.stopwatch = Stopwatch()
        self._journal = journal
        self._world = world
        self._steps = steps
        self._every = every
        self._tokens_per_step = batches.samples_per_step * batches.sequence_length
        self._flops_per_token = executor.model.flops_per_token(batches.sequence_length)
        dtype = torch.bfloat16 if getattr(executor, "precision", "bf16") == "bf16" else torch.float32
        self._peak = peak_flops(world.device, dtype) if world.rank == 0 else None
        self._loss = 0.0
        self._tokens = 0.0

    def state(self) -> dict[str, Any]:
        """Sums since the last report, as JSON values."""
        return {"loss": self._loss, "tokens": self._tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the sums of a checkpoint."""
        self._loss, self._tokens = float(state["loss"]), float(state["tokens"])

    def after_step(self, taken: StepTaken) -> None:
        """Add the step to the window; report the window where it ends."""
        self.stopwatch.step_done()
        self._loss += taken.totals.loss
        self._tokens += taken.totals.tokens
        step = taken.progress.step
        self._journal.step = step
        if step in (1, self._steps) or step % self._every == 0:
            self._journal.emit(self._report(taken))
            self._journal.status("running")
            self._loss = self._tokens = 0.0

    def _report(self, taken: StepTaken) -> StepLogged:
        window = self.stopwatch.window()
        speed = window.tokens_per_second(self._tokens_per_step)
        steps = max(1, window.steps)
        return StepLogged(
            step=taken.progress.step,
            steps=self._steps,
            loss=self._loss / self._tokens if self._tokens else math.nan,
            gradient_norm=taken.totals.gradient_norm,
            learning_rate=taken.learning_rate,
            tokens=taken.progress.tokens,
            samples=taken.progress.samples,
            tokens_per_second=speed,
            mfu=mfu(speed, self._flops_per_token, self._peak, self._world.size),
            memory_bytes=memory_bytes(self._world.device),
            seconds={"step": window.seconds / steps, "data": window.data_seconds / steps},
        )


class Saving:
    """Writes a checkpoint after every ``checkpoints.every`` steps, after the last, and when the run has to stop."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        shelf: Shelf,
        journal: Journal,
        world: World,
        steps: int,
        draft: Callable[[Progress, int | None], Manifest],
    ) -> None:
        self._checkpoints = checkpoints
        self._shelf = shelf
        self._journal = journal
        self._world = world
        self._steps = steps
        self._draft = draft
        self.parent: int | None = None

    def after_step(self, progress: Progress, stop: str, executor: Executor, optimizer: torch.optim.Optimizer) -> None:
        """Save if it is time."""
        if self._checkpoints is None or progress.step == (self.parent or 0):
            return
        if not (stop or progress.step == self._steps or progress.step % self._checkpoints.every == 0):
            return
        start = time.perf_counter()
        draft = self._draft(progress, self.parent)
        saved, warnings = self._checkpoints.save(self._shelf, self._world, executor.model, optimizer, draft)
        self.parent = progress.step
        seconds = time.perf_counter() - start
        self._journal.emit(CheckpointSaved(progress.step, saved.folder, saved.manifest.bytes, seconds))
        for warning in warnings:
            self._journal.emit(Warned(warning))


def evaluate_due(
    evaluations: Sequence[Evaluation],
    step: int,
    steps: int,
    executor: Executor,
    world: World,
    journal: Journal,
    stopping: Callable[[], str],
) -> str:
    """Measure every held-out set that is due after ``step``; collective.

    Returns:
        What ``stopping`` answered if the run has to stop, else nothing.
    """
    for evaluation in evaluations:
        if not evaluation.due(step, steps):
            continue
        measured = evaluation.measure(executor, world, step, stopping)
        if measured is None:
            return stopping()
        journal.emit(measured)
    return ""
