"""What the ranks of the pipeline's tests run: ``python pipeline_programs.py FUNCTION ARGUMENTS RESULT``."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from loop_programs import OPTIMIZER, Collector, SmallBatches
from parallel_programs import whole
from parallel_small_model import SmallModel, batch, weighted_loss

from modalities_core.errors import ModalitiesError
from modalities_core.events import StepLogged
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.pipeline.executor import Pipeline
from modalities_parallel.world import auto

LAYERS = 5


def build(world, size, steps, schedule="1f1b", stages_per_rank=1, loss=weighted_loss, sharding=None, **options):
    build_model = functools.partial(SmallModel, "none", layers=LAYERS)
    given = {"param_dtype": "fp32"} | (sharding or {})
    model = fsdp2(build_model, world, stages_per_rank=stages_per_rank, **given)
    sink = Collector()
    trainer = Trainer(
        world=world,
        executor=Pipeline(model, loss, world, schedule),
        optimizer=adamw(model, no_decay=(), **OPTIMIZER),
        schedule=Constant(),
        batches=SmallBatches(world, size),
        steps=steps,
        sinks=[sink],
        checkpoints=None,
        log_every=1,
        **options,
    )
    return trainer, sink


def weights(model) -> dict[str, np.ndarray]:
    return {name: whole(value) for name, value in model.named_parameters()}


def save(world, path, arrays) -> None:
    """Every rank its own; ranks of the same stage write the same."""
    np.savez(f"{path}-{world.rank}.npz", **arrays)


def train(cases, out, folder, steps=5, **degrees):
    """Losses, norms and final weights of one run per case."""
    world = auto(timeout_seconds=60, **degrees)
    found = []
    for place, case in enumerate(cases):
        trainer, sink = build(world, steps=steps, **case)
        trainer.run(Path(folder) / f"run-{place}")
        save(world, f"{out}-{place}", weights(trainer.executor.model))
        found.append([(event.loss, event.gradient_norm) for event in sink.of(StepLogged)])
        evaluated = []
        for rows in (3, 4, 1):
            share = batch(90, world.data_rank * rows, rows)
            evaluated.append(world.sum(torch.stack(trainer.executor.evaluate(share))).tolist())
        found[-1] = [found[-1], evaluated]
        del trainer
    world.close()
    return found


if __name__ == "__main__":
    function, arguments, result = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    try:
        value = globals()[function](**json.loads(arguments))
    except ModalitiesError as error:
        print(error, file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)
    Path(result).write_text(json.dumps(value))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
