"""What the ranks of the tests of expert parallelism run: a plugin's experts, which know nothing of ranks."""

from __future__ import annotations

import torch
from parallel_programs import main
from parallel_small_model import LOSSES, SAMPLES, Block, SmallModel, batch
from torch import Tensor, nn

from modalities_core.interfaces import ParallelPlan
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.world import Alone
from modalities_parallel.checkpoint.state import model_tensors
from modalities_parallel.experts import spread
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.materialize import materialize
from modalities_parallel.mesh import degrees
from modalities_parallel.world import auto

EXPERTS = 4


class Experts(nn.Module):
    """Every token is multiplied by the factors of one expert; satisfies ``modalities_core.interfaces.Experts``."""

    expert_parameters: tuple[str, ...] = ("factors",)

    def __init__(self, hidden: int, experts: int = EXPERTS) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.factors = nn.Parameter(torch.empty(experts, hidden))
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_ND = hidden.flatten(0, -2)
        scores, experts_N = self.router(hidden_ND).softmax(-1).max(-1)
        order_N = experts_N.argsort(stable=True)
        ends_E = experts_N.bincount(minlength=self.experts).cumsum(0).int()
        given_ND = self.apply_experts(hidden_ND[order_N], ends_E)[order_N.argsort()]
        return (given_ND * scores[:, None]).view_as(hidden)

    def apply_experts(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        return rows_RD * self.factors.repeat_interleave(ends_E.diff(prepend=ends_E.new_zeros(1)), 0)


class ExpertBlock(Block):
    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__(hidden)
        self.experts = Experts(hidden, experts)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.experts(super().forward(hidden_BTD))


class ExpertModel(SmallModel):
    """fault: ``none``, or what its plan or its experts do wrong."""

    def __init__(self, fault: str = "none", experts: int = EXPERTS) -> None:
        super().__init__()
        width = self.embedding.embedding_dim
        self.blocks = nn.ModuleList(ExpertBlock(width, experts) for _ in range(2))
        self.fault = fault
        if fault == "parameter":
            self.blocks[0].experts.more = nn.Parameter(torch.empty(3))

    def parallel_plan(self) -> ParallelPlan:
        named = {"no experts": (), "module": ("blocks.*.experts.router",), "glob": ("blocks.*.expert",)}
        return ParallelPlan(blocks=("blocks.*",), experts=named.get(self.fault, ("blocks.*.experts",)))


def dispatch(cases):
    """One module, rows as each case's counts of each rank say; how many come back on this rank."""
    world = auto(ep=len(cases[0]), timeout_seconds=60)
    model = nn.Module()
    with torch.device("meta"):
        model.experts = Experts(3)
    modules = spread(model, ParallelPlan(experts=("experts",)), world.meshes)
    assert modules == [model.experts] and model.experts.factors.shape == (EXPERTS // world.size, 3)
    materialize(model, world.device)
    of_all = torch.arange(1.0, 1 + EXPERTS * 3).view(EXPERTS, 3)
    model.experts._parameters["factors"].to_local().data.copy_(of_all.chunk(world.size)[world.rank])
    sizes = [_sent_and_returned(world, model.experts, of_all, counts) for counts in cases]
    world.close()
    return sizes


def _sent_and_returned(world, experts, of_all, counts):
    own = torch.tensor(counts[world.rank])
    rows = [torch.randn(sum(of), 3, generator=torch.Generator().manual_seed(r)) for r, of in enumerate(counts)]
    mine = rows[world.rank].clone().requires_grad_()
    given = experts.apply_experts(mine, own.cumsum(0).int())
    assert torch.equal(given, mine * of_all.repeat_interleave(own, 0))
    experts._parameters["factors"].grad = None
    given.backward(torch.full_like(given, 2.0))
    assert torch.equal(mine.grad, 2 * of_all.repeat_interleave(own, 0))
    whole = torch.zeros(EXPERTS, 3)
    for sent, of in zip(rows, counts, strict=True):
        for expert, part in enumerate(sent.split(of)):
            whole[expert] += 2 * part.sum(0)
    torch.testing.assert_close(experts._parameters["factors"].grad.full_tensor(), whole)
    return given.shape[0]


def arrange(world, mesh):
    """The same processes in another mesh."""
    if not isinstance(world, Alone):
        world.arrange(degrees(world.size, **mesh))
    return world


def trainings(meshes, **options):
    """One after the other, under each mesh."""
    world = auto(timeout_seconds=60)
    found = [train(arrange(world, mesh), **options) for mesh in meshes]
    world.close()
    return found


def train(world, steps=4):
    """Losses and norms of some steps, and what is trained in the end."""
    model = fsdp2(ExpertModel, world, param_dtype="fp32")
    executor, optimizer = Plain(model, LOSSES["weighted"], world), adamw(model, lr=1e-2, eps=1e-4)
    share, history = SAMPLES // world.data_size, []
    for step in range(steps):
        first = world.data_rank * share
        sums = executor.forward_backward([batch(step, first, 2), batch(step, first + 2, share - 2)])
        square = world.norm_share(model.parameters(), 2.0)
        total, tokens, squared = world.sum(torch.stack([sums.loss.double(), sums.tokens.double(), square])).tolist()
        for parameter in model.parameters():
            parameter.grad.div_(tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append([total / tokens, squared**0.5 / tokens])
    tensors = model_tensors(model)
    whole = {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for name, v in tensors.items()}
    local = {name: list(getattr(v, "_local_tensor", v).shape) for name, v in tensors.items()}
    return {"history": history, "whole": whole, "local": local}


if __name__ == "__main__":
    main(globals())
