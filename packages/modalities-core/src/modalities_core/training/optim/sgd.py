"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.optim.decision import Decision, multiply
from modalities_core.training.optim.groups import NO_DECAY, ParameterGroup, arrange, check_ranges
from modalities_core.training.optim.shards import Rounding, ShardOptimizer, Work


def sgd(
    model: Model,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = NO_DECAY,
    groups: Sequence[ParameterGroup] = (),
    state_dtype: Literal["fp32", "bf16"] = "fp32",
    rounding: Rounding = "stochastic",
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` has it.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate; the schedule scales it.
        momentum: decay of the running sum of gradients, in [0, 1); 0 for none, and no memory.
        nesterov: look ahead by the momentum (Sutskever et al., proceedings.mlr.press/v28/sutskever13).
        weight_decay: share of the weights added to the gradient in each step.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.
        groups: parameters, by globs of their names, with settings of their own; the first that matches holds.
        state_dtype: how the momentum is stored.
        rounding: of what is stored in bfloat16, parameters or momentum.

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, or nothing is trainable.
    """
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    check_ranges(sgd, settings)
    if any(group.momentum is not None and (group.momentum > 0) != (momentum > 0) for group in groups):
        message = "momentum is zero in all groups or in none, since it decides what is remembered"
        raise ConfigError(message, about=(sgd, "groups"))
    if nesterov and not momentum:
        raise ConfigError("nesterov looks ahead by the momentum, which is 0", about=(sgd, "nesterov"))
    return SGD(arrange(sgd, model, groups, no_decay, [settings]), nesterov, state_dtype, rounding)


class SGD(ShardOptimizer):
    """Gradient descent on each rank's shards; see :func:`sgd`."""

    def __init__(
        self, groups: list[dict[str, Any]], nesterov: bool, state_dtype: Literal["fp32", "bf16"], rounding: Rounding
    ) -> None:
        self.state_names = ("momentum_buffer",) if any(group["momentum"] for group in groups) else ()
        super().__init__(groups, {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0}, state_dtype, rounding)
        self._nesterov = nesterov

    def update(self, group: dict[str, Any], work: Work, decision: Decision) -> None:
        """One step of gradient descent."""
        gradients, momentum, keep = work.gradients, group["momentum"], decision.keep
        decision.apply(gradients)
        if group["weight_decay"]:
            torch._foreach_add_(gradients, work.parameters, alpha=group["weight_decay"])
        changes = gradients
        if momentum:
            sums = work.states["momentum_buffer"]
            # momentum * sum + gradient, written as a change that can be multiplied by whether the step counts.
            added = torch._foreach_add(gradients, sums, alpha=momentum - 1)
            multiply(added, keep)
            torch._foreach_add_(sums, added)
            changes = torch._foreach_add(gradients, sums, alpha=momentum) if self._nesterov else sums
        moves = torch._foreach_mul(changes, 1.0)
        multiply(moves, group["lr"] * keep)
        torch._foreach_sub_(work.parameters, moves)
