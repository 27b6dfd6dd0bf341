"""What the ranks of the tests of expert parallelism run."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from rank_programs import arrange, main, whole
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modalities_core.errors import ModalitiesError
from modalities_core.events import StepLogged
from modalities_core.interfaces import Batch
from modalities_core.training import optim
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_models.decoder import decoder
from modalities_models.losses import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_parallel import recomputation
from modalities_parallel.checkpoint.sharded import Sharded
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.pipeline.executor import Pipeline
from modalities_parallel.world import auto

VOCABULARY, LENGTH, SAMPLES = 61, 8, 8
OPTIMIZERS = {
    "adamw": functools.partial(optim.adamw, lr=1e-2, eps=1e-4),
    "muon": functools.partial(optim.muon, lr=1e-2, eps=1e-4),
    "lion": functools.partial(optim.lion, lr=1e-3),
}


def build(recompute="none", tied=False, **mixture):
    experts = {"experts": 4, "experts_per_token": 2, "intermediate_size": 12, "balance_rate": 0.01} | mixture
    model = decoder(
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        hidden_size=16,
        layers=2,
        heads=4,
        norm_eps=1e-3,
        tied_embeddings=tied,
        feedforward=MixtureOfExperts(**experts),
        seed=3,
    )
    return {"none": lambda it: it, "blocks": recomputation.whole_blocks, "selective": recomputation.selective}[
        recompute
    ](model)


class Samples:
    """Random samples whose weights are anything but even, shared out over the ranks."""

    samples_per_step, sequence_length, largest_id, fingerprint = SAMPLES, LENGTH, VOCABULARY - 1, "random"

    def __init__(self, world, accumulation):
        self.world, self.accumulation = world, accumulation

    def micro_batches(self, step):
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=draw)
        weights = torch.rand((SAMPLES, LENGTH), generator=draw)
        weights[1] = 0
        share = SAMPLES // self.world.data_size
        size, first = share // self.accumulation, self.world.data_rank * share
        rows = [slice(first + n * size, first + (n + 1) * size) for n in range(self.accumulation)]
        return [Batch(tokens[part, :-1], tokens[part, 1:], weights[part]) for part in rows]


class Steps:
    def __init__(self):
        self.logged = []

    def consume(self, event):
        if isinstance(event, StepLogged):
            self.logged.append([event.loss, event.gradient_norm])

    def close(self):
        pass


def weights(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: whole(value) for name, value in (model.state_dict(keep_vars=True)).items()}


def train(
    world,
    folder,
    steps=5,
    accumulation=1,
    optimizer="adamw",
    param_dtype="fp32",
    save=None,
    model=None,
    compile="none",
    pipeline=False,
    **more,
):
    """Losses and norms, what held-out data gives, and weights before and after."""
    net = fsdp2(functools.partial(build, **(model or {})), world, param_dtype=param_dtype)
    loss, sink, batches = CrossEntropy(), Steps(), Samples(world, accumulation)
    executor = Pipeline(net, loss, world) if pipeline else Plain(net, loss, world, compile=compile)
    trainer = Trainer(
        world=world,
        executor=executor,
        optimizer=OPTIMIZERS[optimizer](net),
        schedule=Constant(),
        batches=batches,
        steps=steps,
        sinks=[sink],
        checkpoints=None if save is None else Checkpoints(Sharded(), every=save),
        log_every=1,
        **more,
    )
    before = weights(net)
    trainer.run(folder)
    (held,) = Samples(world, 1).micro_batches(1000)
    held_loss, tokens = world.sum(torch.stack(executor.evaluate(held))).tolist()
    after = weights(net)
    names = [name for name, value in net.named_parameters() if isinstance(value, DTensor)]
    local = sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in net.parameters())
    return {"history": sink.logged, "held": held_loss / tokens, "sharded": names, "local": local}, before, after


def cases(plan, out, folder):
    """One run per case: its mesh, its folder if it has a certain one, and arguments of ``train``."""
    world = auto(timeout_seconds=120)
    found = []
    for place, (mesh, options) in enumerate(plan):
        at = Path(folder) / options.pop("folder", f"{world.size}-{place}")
        try:
            result, before, after = train(arrange(world, mesh), at, **options)
        except ModalitiesError as error:
            found.append({"refusal": [type(error).__name__, str(error)]})
            continue
        if world.rank == 0:
            np.savez(f"{out}-{place}.npz", **{f"before.{n}": v for n, v in before.items()}, **after)
        found.append(result)
    world.close()
    return found


if __name__ == "__main__":
    main(globals())
