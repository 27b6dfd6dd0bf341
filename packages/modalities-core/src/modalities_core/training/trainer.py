"""The training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from modalities_core.errors import ConfigError, Interrupted, ModalitiesError, Preempted
from modalities_core.events import RunStarted, Warned
from modalities_core.interfaces import Batches, Executor, Schedule, Sink, World
from modalities_core.progress import Progress
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.checks import check_positive, check_run
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.gradients import check_finite, reduce_step, scale_gradients
from modalities_core.training.hooks import Saving, evaluate_due
from modalities_core.training.journal import Journal
from modalities_core.training.lineage import Shelf
from modalities_core.training.manifest import Manifest
from modalities_core.training.optim import learning_rates, set_learning_rates
from modalities_core.training.parameters import as_module, on_meta, parameter_count
from modalities_core.training.resume import CHECKPOINTS, Start, find_start, set_run_aside
from modalities_core.training.signals import StopSignals, agree_to_stop
from modalities_core.training.steplog import StepLog, StepTaken


class Trainer:
    """Trains a model for a number of steps and writes all that is worth keeping into one folder.

    The same call starts a run, continues one that was stopped or killed, and extends one that is done. A continued run
    sees the same samples and the same dropout, and lands on the same weights, as one that was never stopped.

    Args:
        world: the ranks.
        executor: holds the model and the loss and computes gradients.
        optimizer: its learning rates are the peaks that ``schedule`` scales.
        schedule: factor on the peak learning rate by step.
        batches: training data.
        steps: optimizer updates of the whole run.
        clip_norm: longest 2-norm of the gradient of the mean loss; None for no limit.
        evaluations: held-out sets.
        checkpoints: when to save; None saves nothing, and then nothing can be continued.
        sinks: consumers of the run's events.
        log_every: steps between two reports.
        seed: of dropout and whatever else draws random numbers in the model.

    Raises:
        ConfigError: a number is out of range, or model, data and ranks do not fit each other.
    """

    def __init__(
        self,
        world: World,
        executor: Executor,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batches: Batches,
        steps: int,
        clip_norm: float | None = 1.0,
        evaluations: Sequence[Evaluation] = (),
        checkpoints: Checkpoints | None = None,
        sinks: Sequence[Sink] = (),
        log_every: int = 10,
        seed: int = 0,
    ) -> None:
        check_positive(self, steps=steps, clip_norm=clip_norm, log_every=log_every)
        check_run(executor.model, world, batches, evaluations)
        self.world = world
        self.executor = executor
        self.optimizer = optimizer
        self.schedule = schedule
        self.batches = batches
        self.steps = steps
        self.clip_norm = clip_norm
        self.evaluations = tuple(evaluations)
        self.checkpoints = checkpoints
        self.sinks = tuple(sinks)
        self.log_every = log_every
        self.seed = seed
        self.peaks = learning_rates(optimizer)

    def run(self, folder: Path, fresh: bool = False, config_hash: str = "", from_step: int | None = None) -> Progress:
        """Train until the last step, from the newest valid checkpoint in ``folder`` if there is one; collective.

        Args:
            folder: of the run; made if it is not there.
            fresh: start at step 0; what an earlier run left moves to ``previous-1``, ``previous-2``, ...
            config_hash: identifies the configuration, for the checkpoints' manifests.
            from_step: continue from the checkpoint of this step; newer ones move to ``checkpoints/abandoned``.

        Returns:
            How far the run has come.

        Raises:
            CheckpointError: no checkpoint is valid, or it belongs to other data or another model.
            NumericalError: loss or gradient are not finite; the weights were not changed by it.
            Preempted: asked to stop by SIGTERM or SIGUSR1, and saved.
            Interrupted: likewise by SIGINT.
            ResourceError: no room for a checkpoint.
        """
        if on_meta(self.executor.model):
            raise ConfigError("the model has shapes but no values: it is on the meta device", about=self.executor.model)
        folder = Path(folder)
        journal = Journal(folder, self.world, self.sinks, self.steps)
        try:
            with StopSignals() as signals:
                set_run_aside(folder, self.world, fresh)
                shelf = Shelf(folder / CHECKPOINTS)
                start = find_start(self, shelf, config_hash, None if fresh else from_step)
                journal.step = start.progress.step
                if start.progress.step > self.steps or start.is_done(folder, self.steps, self.world):
                    journal.emit(Warned(f"the run has already done its {self.steps} steps; raise steps to go on"))
                    progress = start.progress
                else:
                    self._announce(folder, journal, start)
                    progress = self._train(journal, shelf, signals, start, config_hash)
        except BaseException as error:
            journal.end(error)
            raise
        journal.end()
        return progress

    def _train(self, journal: Journal, shelf: Shelf, signals: StopSignals, start: Start, config_hash: str) -> Progress:
        world, executor, optimizer, batches = self.world, self.executor, self.optimizer, self.batches
        parameters = list(as_module(executor.model).parameters())
        finish_step = getattr(executor.model, "finish_step", None)
        progress = start.progress
        log = StepLog(journal, executor, world, batches, self.steps, self.log_every)
        log.restore(start.state)
        draft = partial(self._draft, config_hash, log)
        saving = Saving(self.checkpoints, shelf, journal, world, self.steps, draft)
        saving.parent = start.parent_step
        stopping = partial(agree_to_stop, world, signals)
        evaluate = partial(evaluate_due, executor=executor, world=world, journal=journal, stopping=stopping)
        optimizer.zero_grad(set_to_none=True)
        stop = evaluate(self.evaluations, progress.step, self.steps)
        log.stopwatch.window()
        for step in range(progress.step, self.steps):
            if stop:
                break
            torch.manual_seed(step_seed(self.seed, step, world.data_rank))
            with log.stopwatch.waiting_for_data():
                micro_batches = batches.micro_batches(step)
            sums = executor.forward_backward(micro_batches)
            totals = reduce_step(world, sums, parameters, signals)
            check_finite(totals, step + 1, self._samples(step), world.size)
            scale_gradients(parameters, totals, self.clip_norm)
            learning_rate = set_learning_rates(optimizer, self.peaks, self.schedule(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if finish_step is not None:
                finish_step(world)
            progress = progress.advanced(batches.samples_per_step, batches.samples_per_step * batches.sequence_length)
            log.after_step(StepTaken(progress, totals, learning_rate))
            with log.stopwatch.excluded():
                saving.after_step(progress, totals.stop, executor, optimizer)
                stop = totals.stop or evaluate(self.evaluations, progress.step, self.steps)
        if stop:
            saving.after_step(progress, stop, executor, optimizer)
            raise self._stopped(stop, progress)
        return progress

    def _announce(self, folder: Path, journal: Journal, start: Start) -> None:
        journal.emit(
            RunStarted(
                folder=folder,
                first_step=start.progress.step,
                steps=self.steps,
                tokens_per_step=self.batches.samples_per_step * self.batches.sequence_length,
                parameters=parameter_count(self.executor.model),
                ranks=self.world.size,
                device=device_name(self.world.device),
                resumed_from=start.resumed_from,
            )
        )
        for warning in start.warnings:
            journal.emit(Warned(warning))
        planned = getattr(self.schedule, "steps", self.steps)
        if planned != self.steps:
            journal.emit(Warned(f"the schedule is made for {planned} steps, the run has {self.steps}"))
        journal.status("running")

    def _draft(self, config_hash: str, log: StepLog, progress: Progress, parent_step: int | None) -> Manifest:
        return Manifest(
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            samples_per_step=self.batches.samples_per_step,
            parent_step=parent_step,
            commit=0,
            world_size=self.world.size,
            seed=self.seed,
            data_fingerprint=self.batches.fingerprint,
            config_hash=config_hash,
            state={"log": log.state()},
        )

    def _samples(self, step: int) -> range:
        return range(step * self.batches.samples_per_step, (step + 1) * self.batches.samples_per_step)

    def _stopped(self, stop: str, progress: Progress) -> ModalitiesError:
        saved = "saved" if self.checkpoints is not None else "not saved, for the run has no checkpoints"
        if stop == "interrupted":
            return Interrupted(f"interrupted after step {progress.step} of {self.steps}, {saved}")
        return Preempted(f"asked to stop after step {progress.step} of {self.steps}, {saved}")


def step_seed(seed: int, step: int, data_rank: int) -> int:
    """A 63-bit seed for the random numbers of one step on one rank, so that none has to be stored to resume.

    Ranks that see the same data (tensor parallel) get the same one.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{data_rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def device_name(device: torch.device) -> str:
    """What to call the device in logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
