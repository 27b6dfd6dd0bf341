"""What the ranks of a test run: ``python parallel_programs.py FUNCTION ARGUMENTS RESULT``, arguments as JSON."""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from parallel_small_model import LOSSES, SAMPLES, SmallModel, batch
from torch.distributed.tensor import DTensor

from modalities_core.errors import ModalitiesError
from modalities_core.training.executor import Plain
from modalities_parallel.checkpoint.sharded import Sharded
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.world import auto


class Training:
    """The small model, its optimizer, and steps as a training loop takes them."""

    def __init__(self, world, tie="none", param_dtype="fp32", reshard_after_forward=True, fused=False):
        self.world = world
        build = functools.partial(SmallModel, tie)
        self.model = fsdp2(build, world, param_dtype=param_dtype, reshard_after_forward=reshard_after_forward)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1, fused=fused)

    def step(self, step: int, accumulation: int = 1, loss: str = "weighted") -> tuple[float, float]:
        share = SAMPLES // self.world.data_size
        size = share // accumulation
        sums = torch.zeros(2)
        for part in range(accumulation):
            if isinstance(self.model, torch.distributed.fsdp.FSDPModule):
                self.model.set_requires_gradient_sync(part == accumulation - 1)
            micro = batch(step, self.world.data_rank * share + part * size, size)
            result = LOSSES[loss](self.model(micro.tokens_BT), self.model.head, micro)
            result.loss.backward()
            sums += torch.stack([result.loss.detach(), result.tokens])
        share_of_norm = self.world.norm_share(self.model.parameters(), 2.0)
        total, tokens, squared = self.world.sum(torch.cat([sums, share_of_norm[None]])).tolist()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / tokens, squared**0.5 / tokens

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        self.model.eval()
        share = SAMPLES // self.world.data_size
        micro = batch(step, self.world.data_rank * share, share)
        result = LOSSES["weighted"](self.model(micro.tokens_BT), self.model.head, micro)
        self.model.train()
        total, tokens = self.world.sum(torch.stack(result)).tolist()
        return total / tokens


def part(tensor):
    """This rank's values."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone().cpu().numpy()


def weights(model) -> dict[str, np.ndarray]:
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()
    return {name: whole(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}


def moments(training) -> dict[str, np.ndarray]:
    named = list(training.model.named_parameters())
    return {
        f"{name}.{key}": whole(value)
        for name, parameter in named
        for key, value in training.optimizer.state.get(parameter, {}).items()
    }


def write(world, path, arrays) -> None:
    if world.rank == 0:
        np.savez(path, **arrays)


def train(world_options=None, out=None, steps=3, accumulation=1, loss="weighted", evaluate=False, **options):
    """Train some steps; loss and norm of each, and all weights before and after in files."""
    world = auto(**(world_options or {}))
    training = Training(world, **options)
    world.check(training.model)
    if out:
        write(world, f"{out}-before.npz", weights(training.model))
    history = []
    for step in range(steps):
        history.append(training.step(step, accumulation, loss))
        if evaluate:
            history.append((training.evaluate(100 + step), 0.0))
    if out:
        write(world, f"{out}-after.npz", weights(training.model))
    result = {
        "history": history,
        "sharded": all(isinstance(p, DTensor) for p in training.model.parameters()),
        "dtypes": sorted({str(p.dtype) for p in training.model.parameters()}),
        "local": sum(getattr(p, "_local_tensor", p).numel() for p in training.model.parameters()),
        "data": [world.data_rank, world.data_size],
    }
    del training
    world.close()
    return result


def save(folder, out, steps=2, evaluate=False, **options):
    """Train, save, write the state in the clear, and say how two more steps go."""
    world = auto()
    training = Training(world, **options)
    for step in range(steps):
        training.step(step)
    if evaluate:
        training.evaluate(50)
    Sharded().save(Path(folder), training.model, training.optimizer)
    write(world, out, weights(training.model) | moments(training))
    more = [training.step(steps + step) for step in range(2)]
    write(world, f"{out}-more", weights(training.model) | moments(training))
    del training
    world.close()
    return more


def load(folder, out, steps=2, before=0, evaluate=False, **options):
    """Load into a fresh optimizer, or one that has stepped ``before`` times, and go on."""
    world = auto()
    training = Training(world, **options)
    for step in range(before):
        training.step(1000 + step)
    if evaluate:
        training.evaluate(50)
    Sharded().load(Path(folder), training.model, training.optimizer)
    write(world, out, weights(training.model) | moments(training))
    more = [training.step(steps + step) for step in range(2)]
    write(world, f"{out}-more", weights(training.model) | moments(training))
    del training
    world.close()
    return more


def load_refused(folder, tie="none"):
    """The refusal as every rank sees it; then a reduction, to show that no rank is left behind."""
    world = auto(timeout_seconds=60)
    training = Training(world, tie)
    try:
        Sharded().load(Path(folder), training.model, training.optimizer)
        refusal = None
    except ModalitiesError as error:
        refusal = [type(error).__name__, str(error)]
    state = len(training.optimizer.state)
    together = world.sum(torch.ones(())).item()
    del training
    world.close()
    return {"refusal": refusal, "together": together, "state": state}


def save_refused(folder):
    world = auto(timeout_seconds=60)
    training = Training(world)
    try:
        Sharded().save(Path(folder), training.model, training.optimizer)
        refusal = None
    except ModalitiesError as error:
        refusal = [type(error).__name__, str(error)]
    del training
    world.close()
    return refusal


def eight_bits(world):
    from modalities_parallel.float8 import float8

    return float8(SmallModel(hidden=16), world, emulate=True)


def recomputing(kind, tie):
    from modalities_parallel import recomputation, recomputation_budget

    if kind == "budget":
        return recomputation_budget.budget(SmallModel(tie), 0.5)
    return getattr(recomputation, kind)(SmallModel(tie))


def execute(
    precision="fp32",
    param_dtype="bf16",
    compile="none",
    steps=3,
    accumulation=2,
    tie="none",
    in_float8=False,
    recomputed="none",
):
    """Losses, squared norms and the state of the executor on a sharded small model; gradients of the first step."""
    world = auto(timeout_seconds=60)
    build = functools.partial(SmallModel, tie)
    if in_float8:
        build = functools.partial(eight_bits, world)
    if recomputed != "none":
        build = functools.partial(recomputing, recomputed, tie)
    model = fsdp2(build, world, param_dtype=param_dtype)
    executor = Plain(model, LOSSES["weighted"], world, precision=precision, compile=compile)
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    losses, norms, first, scales, overflows = [], [], None, [], 0
    share = SAMPLES // world.data_size
    size = share // accumulation
    for step in range(steps):
        starts = range(world.data_rank * share, (world.data_rank + 1) * share, size)
        sums = executor.forward_backward([batch(step, start, size) for start in starts])
        scaling = torch.ones(()) if executor.scaler is None else executor.scaler.scale.clone()
        squares = torch.stack([part(value.grad / scaling).square().sum() for value in model.parameters()]).sum()
        total, tokens, squared = world.sum(torch.stack([sums.loss, sums.tokens, squares])).tolist()
        if first is None:
            first = [whole(value.grad.float() / scaling).tolist() for value in model.parameters()]
        overflow = not np.isfinite(squared)
        for value in model.parameters():
            value.grad /= scaling * tokens
        if not overflow:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if executor.scaler is not None:
            executor.scaler.update(torch.tensor(overflow))
        losses.append(total / tokens)
        norms.append(squared)
        scales.append(scaling.item())
        overflows += overflow
    evaluated = world.sum(torch.stack(executor.evaluate(batch(9, world.data_rank * share, share)))).tolist()
    same_names = list(model.state_dict()) == names
    dtypes = sorted({str(value.dtype) for value in model.parameters()})
    result = {"losses": losses, "norms": norms, "scales": scales, "overflows": overflows, "evaluated": evaluated[0]}
    result |= {"gradients": first, "names": same_names, "dtypes": dtypes, "precision": executor.precision}
    del model, executor, optimizer, value
    world.close()
    return result


def talk():
    """Everything a world says and hears."""
    world = auto(dp_replicate=2)
    said = {"rank": world.rank, "mesh": list(world.mesh.shape), "axes": list(world.mesh.mesh_dim_names)}
    heard = world.broadcast({"rank": world.rank, "text": "größer", "numbers": [1, 2.5, None]})
    total = world.sum(torch.tensor([1.0, float(world.rank)])).tolist()
    local = torch.nn.Parameter(torch.zeros(2))
    local.grad = torch.tensor([3.0, 4.0])
    norms = {order: world.norm_share([local, torch.nn.Parameter(torch.zeros(1))], order) for order in (1, 2, math.inf)}
    norm = [world.sum(norms[1]).item(), world.sum(norms[2]).item(), norms[math.inf].item()]
    nothing = world.norm_share([], 2.0).item()
    try:
        world.check(SmallModel())
        refusal = None
    except ModalitiesError as error:
        refusal = str(error)
    world.barrier()
    world.close()
    world.close()
    return said | {"heard": heard, "total": total, "norm": norm, "nothing": nothing, "refusal": refusal}


def late(seconds):
    """Rank 1 does not come to the barrier."""
    world = auto(timeout_seconds=seconds)
    if world.rank == 1:
        time.sleep(seconds + 5)
    else:
        world.barrier()


def late_along(axis, seconds):
    """Rank 1 does not come to a collective along one axis of the mesh; seconds until that is noticed."""
    world = auto(**{axis: 2}, timeout_seconds=seconds)
    if world.rank == 1:
        time.sleep(seconds + 5)
        return None
    before = time.monotonic()
    try:
        torch.distributed.all_reduce(torch.ones(1), group=world.mesh.get_group(axis))
    except RuntimeError:
        return time.monotonic() - before
    return None


def dies(seconds):
    """Rank 1 leaves in the middle of a run."""
    world = auto(timeout_seconds=seconds)
    if world.rank == 1:
        return
    world.sum(torch.ones(2))


def meet(seconds=2.0):
    auto(timeout_seconds=seconds).close()


def forget_to_close():
    """A process that ends as it is, without dropping or closing anything."""
    training = Training(auto())
    training.step(0)
    globals()["kept"] = training


def main(programs) -> None:
    """Call the function of ``programs`` that the command line names, and write what it returns."""
    function, arguments, result = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    try:
        value = programs[function](**json.loads(arguments))
    except ModalitiesError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    main(globals())
