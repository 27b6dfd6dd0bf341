"""The measures of training: added up step by step, reported now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from modalities_core.events import StepLogged
from modalities_core.interfaces import Batches, Executor, World
from modalities_core.progress import Progress
from modalities_core.training.efficiency import Efficiency, time_split
from modalities_core.training.journal import Journal
from modalities_core.training.noise_scale import NoiseScale
from modalities_core.training.throughput import Phases, Stopwatch
from modalities_core.training.totals import StepTotals


@dataclass(frozen=True, slots=True)
class StepTaken:
    """An update that just happened.

    progress: after it.
    totals: what the ranks found.
    learning_rate: the one it used.
    batch: zero-based number of the batch it took, which differs from the step's where batches were left out.
    samples: their numbers in the order of the run.
    """

    progress: Progress
    totals: StepTotals
    learning_rate: float
    batch: int
    samples: range


class StepLog:
    """Adds up the loss and reports it after the first step, after every ``every`` and after the last.

    Sums that are not reported yet are part of a checkpoint, so that a resumed run logs what an unbroken one would.
    """

    def __init__(
        self,
        journal: Journal,
        executor: Executor,
        world: World,
        batches: Batches,
        steps: int,
        every: int,
        noise: NoiseScale | None = None,
    ) -> None:
        self.stopwatch = Stopwatch()
        self._journal = journal
        self._world = world
        self._steps = steps
        self._every = every
        self._sequence_length = batches.sequence_length
        self._noise = noise
        self._efficiency = Efficiency(executor, world, batches.sequence_length)
        # An executor that tells forward from backward does it here, where the loop times the rest.
        self.phases: Phases = getattr(executor, "phases", None) or Phases(world.device)
        self._consumed = 0
        self._loss = 0.0
        self._tokens = 0.0
        self._skipped = 0

    def state(self) -> dict[str, Any]:
        """Sums and left out steps since the last report, and the gradient noise so far, as JSON values."""
        state = {"loss": self._loss, "tokens": self._tokens, "skipped": self._skipped}
        return state if self._noise is None else state | {"noise": self._noise.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the sums of a checkpoint, or start with none."""
        self._loss, self._tokens = float(state.get("loss", 0.0)), float(state.get("tokens", 0.0))
        self._skipped = int(state.get("skipped", 0))
        if self._noise is not None and "noise" in state:
            self._noise.restore(state["noise"])

    def due(self, step: int) -> bool:
        """Whether a report follows ``step``; then the totals of all steps up to it have to be given before."""
        return step in (1, self._steps) or step % self._every == 0

    def after_step(self, taken: StepTaken) -> None:
        """Add a step to the window, report the window where it ends.

        Steps come in their order, but between reports up to some steps after they were taken: the host reads what
        the device found only then.
        """
        self.stopwatch.step_done()
        self._consumed += len(taken.samples) * self._sequence_length
        # A loss that is not finite belongs to a step that was left out.
        if math.isfinite(taken.totals.loss):
            self._loss += taken.totals.loss
            self._tokens += taken.totals.tokens
        self._skipped += taken.totals.frozen
        self._journal.step = taken.progress.step
        if self.due(taken.progress.step):
            self._journal.emit(self._report(taken))
            self._journal.status("running")
            self._loss = self._tokens = 0.0
            self._consumed = self._skipped = 0

    def _report(self, taken: StepTaken) -> StepLogged:
        # First the parts, which waits for the device, so that the window ends when its steps have.
        parts = self.phases.seconds()
        window = self.stopwatch.window()
        with self.stopwatch.excluded():
            measures = self._efficiency.measures(self._consumed, window.seconds)
        return StepLogged(
            step=taken.progress.step,
            steps=self._steps,
            loss=self._loss / self._tokens if self._tokens else math.nan,
            gradient_norm=taken.totals.gradient_norm,
            learning_rate=taken.learning_rate,
            tokens=taken.progress.tokens,
            samples=taken.progress.samples,
            skipped_steps=self._skipped,
            noise_scale=None if self._noise is None else self._noise.value(),
            seconds=time_split(parts, window.seconds, max(1, window.steps)),
            **measures,
        )
