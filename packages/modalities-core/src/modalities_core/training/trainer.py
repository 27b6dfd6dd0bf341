"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from modalities_core.errors import ConfigError, NumericalError
from modalities_core.events import Warned
from modalities_core.freed_memory import all_freed_kept
from modalities_core.interfaces import Batches, Executor, Hook, Schedule, Sink, Training, World
from modalities_core.progress import Progress
from modalities_core.training.announcement import announce
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.checks import check_micro_batches, check_positive, check_run
from modalities_core.training.consumption import samples_of
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.garbage import GarbageCollection
from modalities_core.training.gradients import reduce_step
from modalities_core.training.hooks import Saving, evaluate_due, running, settled
from modalities_core.training.journal import Journal
from modalities_core.training.ledger import Ledger
from modalities_core.training.lineage import Shelf
from modalities_core.training.lock import locked
from modalities_core.training.manifest import Manifest
from modalities_core.training.noise_scale import NoiseScale, check_noise_scale
from modalities_core.training.non_finite import NonFinite, Policy, RollBack, check_policy
from modalities_core.training.optim import learning_rates, set_learning_rates
from modalities_core.training.parameters import as_module, on_meta
from modalities_core.training.polling import StopPoll
from modalities_core.training.resume import CHECKPOINTS, Start, find_start, set_run_aside
from modalities_core.training.seeds import seed_generators, step_seed
from modalities_core.training.signals import StopSignals, stop_error
from modalities_core.training.steplog import StepLog, StepTaken
from modalities_core.training.totals import totals_from
from modalities_core.training.update import Update
from modalities_core.training.verdict import Judge


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same throughout one call of :meth:`Trainer.run`, also where it goes back to a checkpoint."""

    folder: Path
    config_hash: str
    journal: Journal
    shelf: Shelf
    signals: StopSignals
    policy: Policy
    garbage: GarbageCollection


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
        clip_norm: longest norm of the gradient of the mean loss; None for no limit.
        norm_order: of that norm: 1, 2 or infinity (``.inf`` in YAML), the largest element.
        non_finite: what happens when a loss or gradient is not finite. The weights never change by it. ``stop`` ends
            the run with exit code 7, ``skip`` leaves the step out, ``roll_back`` goes back to the newest checkpoint
            and on with the batch after the bad one, as in PaLM (arXiv:2204.02311, section 5.1).
        most_skips: steps in a row that ``skip`` leaves out; at one more the run ends.
        most_roll_backs: times that ``roll_back`` goes back; at one more the run ends.
        evaluations: held-out sets.
        checkpoints: when to save; None saves nothing, and then nothing can be continued.
        sinks: consumers of the run's events.
        hooks: what else happens beside the updates.
        log_every: steps between two reports. In between the host never waits for the device.
        seed: of dropout and whatever else draws random numbers in the model.
        collect_garbage_every: steps between two runs of Python's cycle collector, on all ranks at the same time.
        noise_scale: report the gradient noise scale (arXiv:1812.06162), in tokens: about the batch size from which on
            larger ones save few steps. Needs two micro batches a step; costs two passes over the gradients and, where
            they are sharded, one more reduction.

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
        norm_order: float = 2.0,
        non_finite: NonFinite = "stop",
        most_skips: int = 10,
        most_roll_backs: int = 3,
        evaluations: Sequence[Evaluation] = (),
        checkpoints: Checkpoints | None = None,
        sinks: Sequence[Sink] = (),
        hooks: Sequence[Hook] = (),
        log_every: int = 10,
        seed: int = 0,
        collect_garbage_every: int = 1000,
        noise_scale: bool = False,
    ) -> None:
        check_positive(self, steps=steps, clip_norm=clip_norm, log_every=log_every, most_skips=most_skips)
        check_positive(self, most_roll_backs=most_roll_backs, collect_garbage_every=collect_garbage_every)
        if norm_order not in (1, 2, math.inf):
            raise ConfigError(f"norm_order is 1, 2 or infinity, not {norm_order}", about=(self, "norm_order"))
        check_policy(self, non_finite, checkpoints)
        check_run(executor.model, world, batches, evaluations)
        check_micro_batches(executor, batches, world)
        if noise_scale:
            check_noise_scale(executor, batches, world, self)
        self.world = world
        self.executor = executor
        self.optimizer = optimizer
        self.schedule = schedule
        self.batches = batches
        self.steps = steps
        self.clip_norm = clip_norm
        self.norm_order = norm_order
        self.non_finite: NonFinite = non_finite
        self.most_skips = most_skips
        self.most_roll_backs = most_roll_backs
        self.evaluations = tuple(evaluations)
        self.checkpoints = checkpoints
        self.sinks = tuple(sinks)
        self.hooks = tuple(hooks)
        self.log_every = log_every
        self.seed = seed
        self.collect_garbage_every = collect_garbage_every
        self.noise_scale = noise_scale
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
            NumericalError: loss or gradient are not finite, and ``non_finite`` allows no more of it.
            Preempted: asked to stop by SIGTERM or SIGUSR1, and saved.
            Interrupted: likewise by SIGINT.
            ResourceError: no room for a checkpoint.
            ConfigError: another job is running in ``folder``.
        """
        if on_meta(self.executor.model):
            raise ConfigError("the model has shapes but no values: it is on the meta device", about=self.executor.model)
        folder = Path(folder)
        # A step takes the same memory as the one before; on a GPU, torch's own allocator sees to that.
        kept = all_freed_kept() if self.world.device.type == "cpu" else nullcontext()
        with locked(folder, self.world), kept:
            journal = Journal(folder, self.world, self.sinks, self.steps)
            try:
                with StopSignals() as signals, GarbageCollection(self.collect_garbage_every) as garbage:
                    set_run_aside(folder, self.world, fresh)
                    policy = Policy(self.non_finite, self.most_skips, self.most_roll_backs)
                    run = Run(folder, config_hash, journal, Shelf(folder / CHECKPOINTS), signals, policy, garbage)
                    start = find_start(self, run.shelf, config_hash, None if fresh else from_step)
                    journal.step = start.progress.step
                    if start.progress.step > self.steps or start.is_done(folder, self.steps, self.world):
                        journal.emit(Warned(f"the run has already done its {self.steps} steps; raise steps to go on"))
                        progress = start.progress
                    else:
                        progress = self._train_on(run, start)
            except BaseException as error:
                journal.end(error)
                raise
            journal.end()
            return progress

    def _train_on(self, run: Run, start: Start) -> Progress:
        """Train from ``start``, and again from each checkpoint that the policy goes back to."""
        run.policy.restore(start.state.get("non_finite", {}))
        announce(self, run.folder, run.journal, start)
        prepare = getattr(self.executor, "prepare", None)
        if prepare is not None:
            prepare(self.steps, self.batches.samples_per_step * self.batches.sequence_length)
        emit = run.journal.emit
        training = Training(run.folder, self.executor, self.world, start.progress.step, self.steps, emit)
        with running(self.hooks, training), settled(self.checkpoints, run.journal):
            while True:
                try:
                    return self._train(run, start)
                except RollBack as bad:
                    start = self._gone_back(run, bad)

    def _train(self, run: Run, start: Start) -> Progress:
        world, executor, optimizer, batches = self.world, self.executor, self.optimizer, self.batches
        module, scaler, policy = as_module(executor.model), getattr(executor, "scaler", None), run.policy
        parameters = list(module.parameters())
        noise = NoiseScale(executor, world, parameters) if self.noise_scale else None
        forward_backward = executor.forward_backward if noise is None else noise.forward_backward
        log = StepLog(run.journal, executor, world, batches, self.steps, self.log_every, noise)
        log.restore(start.state.get("log", {}))
        draft = partial(self._draft, run, log)
        saving = Saving(self.checkpoints, run.shelf, run.journal, world, self.steps, draft, run.signals)
        saving.parent = start.parent_step
        judge = Judge(world.device, policy.patience, self.clip_norm, None if scaler is None else scaler.scale)
        judge.restore(policy.errors_in_row, policy.overflows_in_row)
        update = Update(optimizer, module, world, scaler)
        ledger: Ledger[partial[StepTaken]] = Ledger(world.device)
        stopping = StopPoll(world, run.signals)
        evaluate = partial(evaluate_due, executor=executor, world=world, journal=run.journal, stopping=stopping)
        progress = start.progress
        optimizer.zero_grad(set_to_none=True)
        stop = evaluate(self.evaluations, progress.step, self.steps)
        log.stopwatch.window()
        for step in range(progress.step, self.steps):
            if stop:
                break
            batch = step + policy.left_out
            seed_generators(step_seed(self.seed, batch, world.rank), world.device)
            with log.phases.timed("data"):
                micro_batches = batches.micro_batches(batch)
            update.before_step()
            sums = forward_backward(micro_batches)
            del micro_batches  # now: in the next step it would wait for the thread that reads ahead
            with log.phases.timed("optimizer"):
                verdict = judge(reduce_step(world, sums, parameters, self.norm_order, run.signals))
                learning_rate = set_learning_rates(optimizer, self.peaks, self.schedule(step))
                update(verdict)
            samples = samples_of(batches, batch)
            progress = progress.advanced(len(samples), len(samples) * batches.sequence_length)
            taken = partial(StepTaken, progress=progress, learning_rate=learning_rate, batch=batch, samples=samples)
            ledger.add(taken, verdict.record)
            stop = self._hear(run, log, ledger, everything=self._observed(progress.step, log, saving))
            with log.stopwatch.excluded():
                run.garbage.after_step(progress.step)
                for hook in self.hooks:
                    hook.after_step(progress.step)
                saving.after_step(progress, stop, executor, optimizer)
                stop = stop or evaluate(self.evaluations, progress.step, self.steps)
        if stop:
            saving.after_step(progress, stop, executor, optimizer)
            raise stop_error(stop, progress.step, self.steps, saved=self.checkpoints is not None)
        return progress

    def _observed(self, step: int, log: StepLog, saving: Saving) -> bool:
        """Whether something after ``step`` needs to know all steps up to it; the same on every rank."""
        evaluated = any(evaluation.due(step, self.steps) for evaluation in self.evaluations)
        return evaluated or log.due(step) or saving.due(step)

    def _hear(self, run: Run, log: StepLog, ledger: Ledger[partial[StepTaken]], everything: bool) -> str:
        """Act on what the device has found in the steps so far, all ranks alike; gives why to stop, if any does."""
        stop = ""
        for taken, record in ledger.read(everything):
            told = taken(totals=totals_from(record))
            run.policy.heard(told, self.world, run.journal)
            log.after_step(told)
            stop = told.totals.stop or stop
        return stop and (self._hear(run, log, ledger, everything=True) or stop)

    def _gone_back(self, run: Run, bad: RollBack) -> Start:
        """Load the newest checkpoint and leave out the batches up to the bad one; collective."""
        start = find_start(self, run.shelf, run.config_hash, None)
        step = start.progress.step
        if start.parent_step is None:
            raise NumericalError(f"{bad.message}; there is no checkpoint yet to go back to", hint=bad.hint) from bad
        run.policy.restore(start.state.get("non_finite", {}))
        run.policy.gone_back(step, bad.batch)
        run.journal.step = step
        announce(self, run.folder, run.journal, start)
        run.journal.emit(Warned(f"{bad.message}; went back to step {step}, leaving out the batches since then"))
        return start

    def _draft(self, run: Run, log: StepLog, progress: Progress, parent_step: int | None) -> Manifest:
        following = samples_of(self.batches, progress.step + run.policy.left_out)
        state = {"log": log.state(), "non_finite": run.policy.state(), "next_sample": following.start}
        own_state = getattr(self.executor, "state", None)
        if own_state is not None:
            state["executor"] = own_state()
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
            config_hash=run.config_hash,
            state=state,
        )
