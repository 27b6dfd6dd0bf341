"""What the ranks of the loop's tests run: ``python loop_programs.py FUNCTION ARGUMENTS RESULT``, arguments as JSON."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from pathlib import Path

import numpy as np
from parallel_programs import main, whole
from parallel_small_model import LENGTH, SAMPLES, VOCABULARY, SmallModel, batch, weighted_loss

from modalities_core.errors import NumericalError
from modalities_core.events import RunStarted, StepLogged, Warned
from modalities_core.training import ledger
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_parallel.checkpoint.sharded import Sharded
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.world import auto

OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


class SmallBatches:
    """The small model's samples, shared out over the ranks; ``take`` says which step's samples a step gets."""

    samples_per_step, sequence_length, largest_id, fingerprint = SAMPLES, LENGTH, VOCABULARY - 1, "small"

    def __init__(self, world, micro_batch_size, take=lambda step: step):
        self.world, self.size, self.take = world, micro_batch_size, take
        self.now = self.place = None

    def micro_batches(self, step):
        self.now, self.place = step, 0
        share = SAMPLES // self.world.data_size
        first = self.world.data_rank * share
        return [batch(self.take(step), start, self.size) for start in range(first, first + share, self.size)]


class Collector:
    def __init__(self):
        self.events = []

    def consume(self, event):
        self.events.append(event)

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class Poison:
    """The weighted loss; in some steps, on one rank, in its last micro batch, loss or gradient are not finite."""

    def __init__(self, world, batches, steps, what, rank=1):
        self.batches, self.steps, self.what = batches, steps, what
        self.here = world.rank == rank

    def __call__(self, hidden_BTD, head, micro):
        batches = self.batches
        batches.place += 1
        last = batches.place == SAMPLES // batches.world.data_size // batches.size
        bad = self.here and batches.now in self.steps and last
        if bad and self.what == "gradient":
            hidden_BTD.register_hook(lambda grad: grad * math.inf)
        sums = weighted_loss(hidden_BTD, head, micro)
        return sums._replace(loss=sums.loss * math.nan) if bad and self.what == "loss" else sums


def build(world, micro_batch_size, steps, bad=(), what="loss", take=lambda step: step, save=None, **options):
    model = fsdp2(functools.partial(SmallModel, "read"), world, param_dtype="fp32")
    batches, sink = SmallBatches(world, micro_batch_size, take), Collector()
    trainer = Trainer(
        world=world,
        executor=Plain(model, Poison(world, batches, bad, what, rank=world.size - 1), world),
        optimizer=adamw(model, no_decay=(), **OPTIMIZER),
        schedule=Constant(),
        batches=batches,
        steps=steps,
        sinks=[sink],
        checkpoints=None if save is None else Checkpoints(Sharded(), every=save),
        **options,
    )
    return trainer, sink


def weights(trainer):
    return {name: whole(value) for name, value in trainer.executor.model.named_parameters()}


def digest(trainer):
    """Of every bit of weights, persistent buffers and optimizer, whole on each rank."""
    state = trainer.optimizer.state
    tensors = [value for parameter in trainer.executor.model.parameters() for value in state[parameter].values()]
    tensors += [*trainer.executor.model.parameters(), trainer.executor.model.scale]
    return hashlib.sha256(b"".join(whole(value).tobytes() for value in tensors)).hexdigest()


def splits(cases, out, folder, steps=5, **degrees):
    """Losses, norms and final weights of one run per case: micro batch size, order of the norm, longest norm."""
    world = auto(**degrees)
    found = []
    for place, (size, order, clip_norm) in enumerate(cases):
        options = {"norm_order": float(order), "clip_norm": clip_norm, "log_every": 1}
        trainer, sink = build(world, size, steps, **options)
        trainer.run(Path(folder) / f"split-{place}")
        arrays = weights(trainer)
        if world.rank == 0:
            np.savez(f"{out}-{place}.npz", **arrays)
        found.append([(event.loss, event.gradient_norm) for event in sink.of(StepLogged)])
        del trainer
    world.close()
    return found


def outcome(trainer, sink, folder):
    """How one run ends, in JSON values."""
    found = {"error": None, "code": 0}
    try:
        trainer.run(folder)
    except NumericalError as error:
        found = {"error": error.message, "code": error.exit_code}
    found["digest"] = digest(trainer)
    found["starts"] = [event.first_step for event in sink.of(RunStarted)]
    found["warnings"] = [event.message for event in sink.of(Warned) if "left out" in event.message]
    found["back"] = [event.message for event in sink.of(Warned) if "went back" in event.message]
    return found


def refusals(folder, what, lag):
    """What every policy does about the same bad steps, and runs without them to compare with."""
    ledger.lag_of = lambda device: lag
    world = auto(timeout_seconds=60)
    folder = Path(folder)
    size = SAMPLES // world.data_size // 2
    common = {"micro_batch_size": size, "what": what, "save": 2, "log_every": 100}
    found = {}

    def run(name, place, **options):
        trainer, sink = build(world, **(common | options))
        found[name] = outcome(trainer, sink, folder / place)
        del trainer

    run("three steps", "three", steps=3)
    run("stop", "stop", steps=8, bad=[3])
    run("stop again", "stop", steps=8, bad=[3])
    run("then skip", "stop", steps=8, bad=[3], non_finite="skip")
    run("skip", "skip", steps=8, bad=[3], non_finite="skip")
    run("without", "without", steps=7, take=lambda step: step + (step >= 3))
    run("too many", "many", steps=8, bad=[3, 4], non_finite="skip", most_skips=1)
    run("back", "back", steps=8, bad=[5], non_finite="roll_back")
    run("elsewhere", "elsewhere", steps=8, take=lambda step: step + 2 * (step >= 4))
    run("part of back", "part", steps=7, bad=[5], non_finite="roll_back")
    run("rest of back", "part", steps=8, bad=[5], non_finite="roll_back")
    world.close()
    return found


if __name__ == "__main__":
    main(globals())
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
