"""Optimizers on sharded models: the same weights on any number of ranks, and a resumed run is the unbroken one."""

import functools
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_small_model import SmallModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from modalities_core.training.optim import adamw, lion, muon, sgd
from modalities_parallel.checkpoint.sharded import Sharded
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.world import auto

HERE = Path(__file__).parent
STEPS = 3
OPTIMIZERS = {
    "adamw": functools.partial(adamw, lr=1e-2, eps=1e-4),
    "adamw bf16": functools.partial(adamw, lr=1e-2, eps=1e-4, state_dtype="bf16"),
    "adamw int8": functools.partial(adamw, lr=1e-2, eps=1e-4, state_dtype="int8"),
    "sgd": functools.partial(sgd, lr=1e-1, nesterov=True),
    "lion": functools.partial(lion, lr=1e-3),
    "muon": functools.partial(muon, lr=1e-2, eps=1e-4),
    "muon bf16": functools.partial(muon, lr=1e-2, eps=1e-4, state_dtype="bf16"),
}
pytestmark = pytest.mark.slow


class Run:
    """A small model with given gradients, so that nothing but the optimizer can tell numbers of ranks apart."""

    def __init__(self, world, name):
        self.world = world
        self.model = fsdp2(functools.partial(SmallModel, hidden=72), world, param_dtype="fp32")
        self.optimizer = OPTIMIZERS[name](self.model)

    def step(self, step, skip=False):
        for name, parameter in self.model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{step}/{name}".encode()))
            gradient = 8 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                place = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *place, src_data_rank=None)
            parameter.grad = gradient
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(skip))
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        self.optimizer.zero_grad()

    def arrays(self):
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = whole(parameter)
            found |= {f"{name}/{key}": whole(value) for key, value in self.optimizer.state[parameter].items()}
        return found


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().float().cpu().numpy().copy()


def scenario(folder, names, load_from=None, dp_replicate=1):
    """Train, save and go on; or load what another number of ranks saved, and go on."""
    world = auto(dp_replicate=dp_replicate, timeout_seconds=100)
    for name in names:
        run = Run(world, name)
        if load_from is None:
            for step in range(STEPS):
                run.step(step, skip=step == 1)
            (folder / name).mkdir(exist_ok=True)
            world.barrier()
            Sharded().save(folder / name, run.model, run.optimizer)
        else:
            Sharded().load(load_from / name, run.model, run.optimizer)
        middle = run.arrays()
        run.step(STEPS)
        end = run.arrays()
        if world.rank == 0:
            np.savez(folder / f"{name}-middle.npz", **middle)
            np.savez(folder / f"{name}-end.npz", **end)
        del run
    world.close()


def on_ranks(ranks, folder, **options):
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = json.dumps({"folder": str(folder), **options})
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend=c10d"]
    command = [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", __file__, arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same on one, two and four ranks."""
    folder = tmp_path_factory.mktemp("optimizers")
    return {ranks: on_ranks(ranks, folder / str(ranks), names=list(OPTIMIZERS)) for ranks in (1, 2, 4)}


def assert_same(one, other, name, moment):
    """Matrices bit for bit; shards of vectors are not whole SIMD registers, whose rest is rounded otherwise."""
    vectors = {"rtol": 1e-2, "atol": 1e-4} if "bf16" in name else {"rtol": 1e-5, "atol": 1e-7}
    with np.load(one / f"{name}-{moment}.npz") as mine, np.load(other / f"{name}-{moment}.npz") as theirs:
        assert set(mine) == set(theirs)
        for key in mine:
            tolerance = vectors if mine[key].ndim < 2 else {"rtol": 0, "atol": 0}
            np.testing.assert_allclose(mine[key], theirs[key], err_msg=key, **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_two_and_four_ranks_land_on_the_same_weights(folders, name):
    for ranks in (2, 4):
        assert_same(folders[1], folders[ranks], name, "end")


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1)])
def test_a_run_resumed_on_another_number_of_ranks_is_the_unbroken_one(folders, tmp_path, saved_on, resumed_on):
    resumed = on_ranks(resumed_on, tmp_path / "resumed", names=list(OPTIMIZERS), load_from=str(folders[saved_on]))
    for name in OPTIMIZERS:
        assert_same(folders[saved_on], resumed, name, "middle")
        assert_same(folders[saved_on], resumed, name, "end")


def test_replicas_round_and_orthogonalize_alike(folders, tmp_path):
    names = ["muon bf16", "adamw bf16"]
    replicated = on_ranks(4, tmp_path / "hybrid", names=names, dp_replicate=2)
    for name in names:
        assert_same(folders[1], replicated, name, "end")


def test_skipped_steps_do_not_count(folders):
    with np.load(folders[2] / "muon-middle.npz") as found:
        assert {float(found[key]) for key in found if key.endswith("/step")} == {STEPS - 1.0}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    given = json.loads(sys.argv[1])
    given["folder"] = Path(given["folder"])
    given["load_from"] = Path(given["load_from"]) if given.get("load_from") else None
    scenario(**given)
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
