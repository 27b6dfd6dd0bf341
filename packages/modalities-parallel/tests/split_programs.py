"""What the ranks of the tests of tensor and context parallelism run."""

from __future__ import annotations

import functools
import os
import sys
import zlib

import numpy as np
import torch
from parallel_programs import main
from parallel_split_model import SAMPLES, SplitModel, batch, weighted_loss
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modalities_core.errors import ConfigError
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw, lion, muon, sgd
from modalities_core.training.optim.placement import own_part
from modalities_core.training.world import Alone
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.mesh import degrees
from modalities_parallel.world import auto

OPTIMIZERS = {
    "adamw": functools.partial(adamw, lr=1e-2, eps=1e-3),
    "adamw bf16": functools.partial(adamw, lr=1e-2, eps=1e-3, state_dtype="bf16"),
    "adamw int8": functools.partial(adamw, lr=1e-2, eps=1e-3, state_dtype="int8"),
    "sgd": functools.partial(sgd, lr=1e-1, momentum=0.9),
    "lion": functools.partial(lion, lr=1e-3),
    "muon": functools.partial(muon, lr=1e-2, eps=1e-3, by_adamw=("embedding*", "places*", "head*")),
    "muon bf16": functools.partial(muon, lr=1e-2, eps=1e-3, state_dtype="bf16"),
}


def arrange(world, **asked):
    """The same processes in another mesh."""
    if not isinstance(world, Alone):
        world.arrange(degrees(world.size, **asked))
    return world


def weights(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = model.named_parameters()
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().float().numpy() for name, v in named}


def train(world, head, **options):
    """Losses and norms of three steps, and the weights after them."""
    model = fsdp2(functools.partial(SplitModel, head, **options), world, param_dtype="fp32")
    executor, optimizer = Plain(model, weighted_loss, world), OPTIMIZERS["sgd"](model)
    share = SAMPLES // world.data_size
    rows = slice(world.data_rank * share, (world.data_rank + 1) * share)
    history = []
    for step in range(3):
        sums = executor.forward_backward([batch(step, rows)])
        squared = world.norm_share(list(model.parameters()), 2.0)
        values = torch.stack([sums.loss.double(), sums.tokens.double(), squared.double()])
        total, tokens, square = world.sum(values).tolist()
        for parameter in model.parameters():
            parameter.grad /= tokens
        optimizer.step()
        optimizer.zero_grad()
        history.append([total / tokens, square**0.5 / tokens])
    return history, weights(model)


def update(world, name):
    """Weights after three steps with given gradients, so that only the optimizer can tell meshes apart."""
    model = fsdp2(functools.partial(SplitModel, inner=1024, bias=False), world, param_dtype="fp32")
    optimizer = OPTIMIZERS[name](model)
    for step in range(3):
        for place, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{step}/{place}".encode()))
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                own = own_part(gradient, parameter).contiguous()
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = DTensor.from_local(
                    own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
            parameter.grad = gradient
        optimizer.step()
    return weights(model)


def heads(cases, out):
    """Histories of each (mesh, head), and weights in files."""
    world = auto(timeout_seconds=120)
    found = []
    for place, (mesh, head) in enumerate(cases):
        history, after = train(arrange(world, **mesh), head)
        if world.rank == 0:
            np.savez(f"{out}-{place}.npz", **after)
        found.append(history)
    world.close()
    return found


def optimizers(cases, out):
    """Weights of each (mesh, optimizer) in files."""
    world = auto(timeout_seconds=120)
    for place, (mesh, name) in enumerate(cases):
        after = update(arrange(world, **mesh), name)
        if world.rank == 0:
            np.savez(f"{out}-{place}.npz", **after)
    world.close()


def refusals():
    """What is said about lengths that do not divide, and about 8-bit states that would be cut."""
    world = auto(timeout_seconds=60)
    said = []
    odd = batch(0, slice(0, 2), length=7)
    for mesh in ({"tp": 2}, {"cp": 2}):
        model = fsdp2(SplitModel, arrange(world, **mesh), param_dtype="fp32")
        executor = Plain(model, weighted_loss, world)
        with torch.no_grad():
            said.append(list(model(odd.tokens_BT).shape))
            said.append(list(model(batch(0, slice(0, 2)).tokens_BT).shape))
        for attempt in (executor.evaluate, lambda odd, run=executor: run.forward_backward([odd])):
            try:
                said.append(world.sum(attempt(odd).loss).item())
            except ConfigError as error:
                said.append(str(error))
    model = fsdp2(functools.partial(SplitModel, inner=320), arrange(world, tp=2), param_dtype="fp32")
    try:
        OPTIMIZERS["adamw int8"](model)
    except ConfigError as error:
        said.append(str(error))
    del model
    world.close()
    return said


if __name__ == "__main__":
    main(globals())
    sys.stdout.flush()
    os._exit(0)
