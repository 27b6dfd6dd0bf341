"""What programs of ranks share: another mesh of the same processes, whole tensors, and how a program is called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from modalities_core.training.world import Alone
from modalities_parallel.mesh import degrees


def arrange(world, mesh):
    """The same processes in another mesh."""
    if not isinstance(world, Alone):
        world.arrange(degrees(world.size, **mesh))
    return world


def whole(tensor):
    """All values of a parameter, as float32 on the host."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy().copy()


def main(programs):
    """Call the function of ``programs`` that the command line names, and write what it returns."""
    function, arguments, result = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    Path(result).write_text(json.dumps(programs[function](**json.loads(arguments))))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
