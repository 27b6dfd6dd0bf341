"""What the ranks of the tests of FSDP2's options run: ``python fsdp_programs.py FUNCTION ARGUMENTS RESULT``."""

from __future__ import annotations

import functools
import logging
from collections import Counter

import torch
import torch.distributed as dist
from parallel_programs import Training, main, weights, write
from parallel_small_model import SmallModel
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from modalities_parallel import fsdp, sharding
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.recomputation import whole_blocks
from modalities_parallel.world import auto

NAMES = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


class Options(Training):
    """The small model under any options of parallel.fsdp2."""

    def __init__(self, world, recomputed=False, layers=3, tie="read", really_offload=False, **options):
        self.world = world
        if really_offload and world.size > 1:
            # As on a GPU, but for the memory that only its driver can pin.
            fsdp._can_offload = lambda world: True
            sharding.CPUOffloadPolicy = functools.partial(CPUOffloadPolicy, pin_memory=False)

        def build():
            model = SmallModel(tie, layers=layers)
            return whole_blocks(model) if recomputed else model

        self.model = fsdp2(build, world, **{"param_dtype": "fp32", **options})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)


def counting() -> Counter[str]:
    """Counts calls of collectives between two ranks or more from now on, by what they do."""
    calls: Counter[str] = Counter()
    for name in NAMES:
        if hasattr(dist, name):
            setattr(dist, name, _counted(getattr(dist, name), "_".join(name.split("_")[:2]), calls))
    return calls


def _counted(function, kind, calls):
    def call(*arguments, group=None, **named):
        if dist.get_world_size(group) > 1:
            calls[kind] += 1
        return function(*arguments, group=group, **named)

    return call


def run(cases, out, steps=3, **degrees):
    """One training per case, options of fsdp2 and the accumulation; what was sent and held, and weights in files."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("modalities").addHandler(handler)
    world = auto(**degrees)
    calls = counting()
    found = []
    for place, case in enumerate(cases):
        options = dict(case)
        accumulation = options.pop("accumulation", 1)
        training = Options(world, **options)
        world.check(training.model)
        history, sent = [], Counter()
        for step in range(steps):
            calls.clear()
            history.append(training.step(step, accumulation))
            sent = Counter(calls)
            training.evaluate(100 + step)
        write(world, f"{out}-{place}.npz", weights(training.model))
        parts = [value.to_local() for value in training.model.parameters() if isinstance(value, DTensor)]
        local, whole = sum(part.numel() for part in parts), sum(value.numel() for value in training.model.parameters())
        result = {"history": history, "sent": dict(sent), "local": local, "whole": whole, "said": list(said)}
        found.append(result)
        said.clear()
        del training
    world.close()
    return found


if __name__ == "__main__":
    main(globals())
