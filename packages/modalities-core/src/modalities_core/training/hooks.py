"""What happens beside the updates: saving, evaluating, and whatever else a run was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from modalities_core.events import CheckpointSaved, Warned
from modalities_core.interfaces import Executor, Hook, Training, World
from modalities_core.progress import Progress
from modalities_core.training.checkpointing import Checkpoints, Written
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.journal import Journal
from modalities_core.training.lineage import Shelf
from modalities_core.training.manifest import Manifest
from modalities_core.training.signals import StopSignals

GRACE_SECONDS = 5.0
"""For a save in the background after a second interrupt."""


class Saving:
    """Writes a checkpoint after every ``checkpoints.every`` steps, after the last, and when the run has to stop.

    A save in the background that fails asks the run to stop; on its way out it is told why.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        shelf: Shelf,
        journal: Journal,
        world: World,
        steps: int,
        draft: Callable[[Progress, int | None], Manifest],
        signals: StopSignals,
    ) -> None:
        self._checkpoints = checkpoints
        self._shelf = shelf
        self._journal = journal
        self._world = world
        self._steps = steps
        self._draft = draft
        self._signals = signals
        self._reserved = False
        self.parent: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint follows ``step``, however the run goes."""
        return self._checkpoints is not None and (step == self._steps or step % self._checkpoints.every == 0)

    def after_step(self, progress: Progress, stop: str, executor: Executor, optimizer: torch.optim.Optimizer) -> None:
        """Save if it is time, and tell what was saved."""
        if self._checkpoints is None:
            return
        if not self._reserved and not stop:
            self._checkpoints.reserve(self._world, executor.model, optimizer)
            self._reserved = True
        if stop:
            self._checkpoints.settle()
        if progress.step != (self.parent or 0) and (stop or self.due(progress.step)):
            self._save(self._checkpoints, progress, stop, executor, optimizer)
        tell_written(self._checkpoints.written(), self._journal)

    def _save(
        self, to: Checkpoints, progress: Progress, stop: str, executor: Executor, optimizer: torch.optim.Optimizer
    ) -> None:
        last = stop or progress.step == self._steps
        what = (self._shelf, self._world, executor.model, optimizer, self._draft(progress, self.parent))
        if last or not to.begin(*what, failed=self._signals.ask_to_stop):
            written = to.save(*what)
            tell_written([*to.written(), written], self._journal)
        self.parent = progress.step


def tell_written(written: Iterable[Written], journal: Journal) -> None:
    """Report checkpoints that were committed."""
    for checkpoint, warnings, seconds, blocked_seconds in written:
        manifest = checkpoint.manifest
        journal.emit(CheckpointSaved(manifest.step, checkpoint.folder, manifest.bytes, seconds, blocked_seconds))
        for warning in warnings:
            journal.emit(Warned(warning))


@contextmanager
def settled(checkpoints: Checkpoints | None, journal: Journal) -> Iterator[None]:
    """Let a save in the background end before the run does, however that ends; interrupted twice, it has no time."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoints is not None:
            checkpoints.drop(GRACE_SECONDS)
        raise
    except Exception:
        if checkpoints is not None:
            try:
                checkpoints.settle()
            except Exception as failure:
                journal.emit(Warned(f"the checkpoint that was being written is lost: {failure}"))
            tell_written(checkpoints.written(), journal)
        raise


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
