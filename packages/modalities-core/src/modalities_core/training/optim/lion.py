"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from modalities_core.interfaces import Model
from modalities_core.training.optim.decision import Decision, multiply
from modalities_core.training.optim.groups import NO_DECAY, ParameterGroup, arrange, check_ranges
from modalities_core.training.optim.shards import Rounding, ShardOptimizer, Work


def lion(
    model: Model,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.3,
    no_decay: tuple[str, ...] = NO_DECAY,
    groups: Sequence[ParameterGroup] = (),
    state_dtype: Literal["fp32", "bf16"] = "fp32",
    rounding: Rounding = "stochastic",
) -> torch.optim.Optimizer:
    """Lion (Chen et al., arXiv:2302.06675, algorithm 2): every weight moves by the learning rate, up or down.

    Its authors take a learning rate three to ten times smaller than AdamW's and a weight decay as much larger. It
    remembers one number per weight where AdamW remembers two.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate; the schedule scales it.
        betas: shares of the momentum in the direction of the update, and in the next momentum; each in [0, 1).
        weight_decay: share of the weights, times the learning rate, taken off in each step.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.
        groups: parameters, by globs of their names, with settings of their own; the first that matches holds.
        state_dtype: how the momentum is stored.
        rounding: of what is stored in bfloat16, parameters or momentum.

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, or nothing is trainable.
    """
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    check_ranges(lion, settings)
    return Lion(arrange(lion, model, groups, no_decay, [settings]), state_dtype, rounding)


class Lion(ShardOptimizer):
    """Lion on each rank's shards; see :func:`lion`."""

    state_names = ("exp_avg",)

    def __init__(self, groups: list[dict[str, Any]], state_dtype: Literal["fp32", "bf16"], rounding: Rounding) -> None:
        super().__init__(groups, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}, state_dtype, rounding)

    def update(self, group: dict[str, Any], work: Work, decision: Decision) -> None:
        """One step of Lion."""
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        gradients, momenta, keep = work.gradients, work.states["exp_avg"], decision.keep
        decision.apply(gradients)
        directions = torch._foreach_lerp(gradients, momenta, beta1)
        torch._foreach_sign_(directions)
        multiply(directions, lr * keep)
        if decay:
            multiply(work.parameters, 1 - lr * decay * keep)
        torch._foreach_sub_(work.parameters, directions)
        torch._foreach_sub_(gradients, momenta)
        multiply(gradients, (1 - beta2) * keep)
        torch._foreach_add_(momenta, gradients)
