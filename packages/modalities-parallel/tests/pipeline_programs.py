"""What the ranks of the pipeline's tests run: ``python pipeline_programs.py FUNCTION ARGUMENTS RESULT``."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from loop_programs import OPTIMIZER, Collector, Poison, SmallBatches
from parallel_programs import whole
from parallel_small_model import SmallModel, batch, weighted_loss
from torch.distributed.fsdp import FSDPModule

from modalities_core.errors import DataError, ModalitiesError
from modalities_core.events import StepLogged
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.optim.groups import ParameterGroup
from modalities_core.training.parameters import parameter_count, tensor_layout
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
    sink, batches = Collector(), SmallBatches(world, size)
    batches.micro_batch_size = size
    trainer = Trainer(
        world=world,
        executor=Pipeline(model, loss, world, schedule),
        optimizer=adamw(model, no_decay=(), **OPTIMIZER),
        schedule=Constant(),
        batches=batches,
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


def initial(out, **degrees):
    """The weights that every rank begins with, and what it knows of the whole model."""
    world = auto(timeout_seconds=60, **degrees)
    model = fsdp2(functools.partial(SmallModel, "none", layers=LAYERS), world, param_dtype="fp32")
    world.check(model)
    save(world, out, weights(model))
    known = {"count": parameter_count(model), "layout": tensor_layout(model), "local": len(list(model.parameters()))}
    groups = [ParameterGroup(parameters=("head.*",), lr=0.5), ParameterGroup(parameters=("embedding.*",), lr=0.25)]
    optimizer = adamw(model, lr=1.0, no_decay=("norm.*",), groups=groups)
    known["rates"] = sorted({group["lr"] for group in optimizer.param_groups})
    known["refusals"] = []
    for attempt in (
        lambda: adamw(model, lr=1.0, groups=[ParameterGroup(parameters=("tail.*",), lr=0.5)]),
        lambda: model(batch(0, 0, 1).tokens_BT),
        lambda: Plain(model, weighted_loss, world),
        lambda: Pipeline(model, weighted_loss, world, "interleaved_1f1b"),
        lambda: build(world, 12 // world.data_size, 1),
        lambda: build(world, 3, 1, noise_scale=True),
        lambda: Pipeline(model, weighted_loss, world).forward_backward([batch(0, 0, 1), batch(0, 0, 2)]),
    ):
        try:
            attempt()
            known["refusals"].append("")
        except ModalitiesError as error:
            known["refusals"].append(f"{type(error).__name__}: {error}")
    world.close()
    return known


@contextmanager
def counting(collective):
    """What torch.distributed is asked for inside; the names of its functions are not those of every version."""
    calls = []
    names = [f"{collective}_tensor", f"{collective}_into_tensor", f"{collective}_single"]
    own = {name: getattr(torch.distributed, name) for name in names if hasattr(torch.distributed, name)}

    def counted(name, *arguments, **keywords):
        calls.append(name)
        return own[name](*arguments, **keywords)

    try:
        for name in own:
            setattr(torch.distributed, name, functools.partial(counted, name))
        yield calls
    finally:
        for name, function in own.items():
            setattr(torch.distributed, name, function)


def reductions(cases, **degrees):
    """Reductions of gradients and gathers of weights in a step, and the units that this rank has."""
    world = auto(timeout_seconds=60, **degrees)
    found = []
    for case in cases:
        trainer, _ = build(world, steps=1, **case)
        model = trainer.executor.model
        units = sum(
            any(True for _ in module.parameters()) for module in model.modules() if isinstance(module, FSDPModule)
        )
        with counting("reduce_scatter") as reduced, counting("all_gather") as gathered:
            trainer.executor.forward_backward(trainer.batches.micro_batches(0))
        found.append([len(reduced), len(gathered), units])
        del trainer, model
    world.close()
    return found


def not_finite(folder, what, **degrees):
    """A bad loss or gradient on the last stage in the third step: what every rank says, and that no weight changed."""
    world = auto(timeout_seconds=60, **degrees)
    found = []
    for place, (steps, bad) in enumerate([(2, ()), (5, (2,))]):
        trainer, _ = build(world, 3, steps)
        trainer.executor.loss = Poison(world, trainer.batches, bad, what, rank=world.size - 1)
        try:
            trainer.run(Path(folder) / f"{what}-{place}")
            said = ""
        except ModalitiesError as error:
            said = f"{type(error).__name__}: {error}"
        found.append([said, {name: value.tolist() for name, value in weights(trainer.executor.model).items()}])
        del trainer
    world.close()
    (_, before), (said, after) = found
    return {"said": said, "same": before == after}


def fails(seconds, rank, **degrees):
    """One rank cannot go on in the middle of a step; the others must not wait for ever."""
    world = auto(timeout_seconds=seconds, **degrees)
    trainer, _ = build(world, 3, 2)
    executor = trainer.executor
    executor.forward_backward(trainer.batches.micro_batches(0))
    if world.rank == rank:
        run = executor._forward
        calls = []

        def once(*arguments):
            calls.append(None)
            if len(calls) == 3:
                raise DataError("something is wrong with this micro batch")
            return run(*arguments)

        executor._forward = once
    executor.forward_backward(trainer.batches.micro_batches(1))


def hangs(seconds, rank, **degrees):
    """One rank does not come back from a step."""
    world = auto(timeout_seconds=seconds, **degrees)
    trainer, _ = build(world, 3, 2)
    executor = trainer.executor
    executor.forward_backward(trainer.batches.micro_batches(0))
    if world.rank == rank:
        time.sleep(seconds + 20)
    else:
        executor.forward_backward(trainer.batches.micro_batches(1))


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
