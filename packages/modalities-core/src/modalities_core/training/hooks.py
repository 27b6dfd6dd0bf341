"""What happens beside the updates: saving, evaluating, and whatever else a run was given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from modalities_core.events import CheckpointSaved, Warned
from modalities_core.interfaces import Executor, Hook, Training, World
from modalities_core.progress import Progress
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.journal import Journal
from modalities_core.training.lineage import Shelf
from modalities_core.training.manifest import Manifest


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

    def due(self, step: int) -> bool:
        """Whether a checkpoint follows ``step``, however the run goes."""
        return self._checkpoints is not None and (step == self._steps or step % self._checkpoints.every == 0)

    def after_step(self, progress: Progress, stop: str, executor: Executor, optimizer: torch.optim.Optimizer) -> None:
        """Save if it is time."""
        if self._checkpoints is None or progress.step == (self.parent or 0):
            return
        if not (stop or self.due(progress.step)):
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


@contextmanager
def running(hooks: Sequence[Hook], training: Training) -> Iterator[None]:
    """Start the hooks, and close in the end all that were started, whatever happens."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
            hook.start(training)
        yield
