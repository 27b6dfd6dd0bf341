"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.optim import quantized, storage
from modalities_core.training.optim.decision import Decision, multiply
from modalities_core.training.optim.groups import NO_DECAY, ParameterGroup, arrange, check_ranges
from modalities_core.training.optim.placement import ranges, splits
from modalities_core.training.optim.shards import Rounding, ShardOptimizer, StateDtype, Work

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(
    model: Model,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
    groups: Sequence[ParameterGroup] = (),
    state_dtype: StateDtype = "fp32",
    rounding: Rounding = "stochastic",
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), fused where the device has it.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate; the schedule scales it.
        betas: decay of the running mean of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: share of the weights, times the learning rate, taken off in each step.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.
        groups: parameters, by globs of their names, with settings of their own; the first that matches holds.
        state_dtype: how both running means are stored; int8 is block-wise with a dynamic code (arXiv:2110.02861) for
            parameters of two or more dimensions and 4,096 or more elements.
        rounding: of what is stored in bfloat16, parameters or running means; stochastic keeps updates that are smaller
            than half a bfloat16 step on average (arXiv:2010.06192).

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, or nothing is trainable.
    """
    return _adam(adamw, True, model, lr, betas, eps, weight_decay, no_decay, groups, state_dtype, rounding)


def adam(
    model: Model,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = NO_DECAY,
    groups: Sequence[ParameterGroup] = (),
    state_dtype: StateDtype = "fp32",
    rounding: Rounding = "stochastic",
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba, arXiv:1412.6980); weight decay, if any, is added to the gradient as an L2 penalty.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate; the schedule scales it.
        betas: decay of the running mean of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: share of the weights added to the gradient in each step.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.
        groups: parameters, by globs of their names, with settings of their own; the first that matches holds.
        state_dtype: how both running means are stored; int8 is block-wise with a dynamic code (arXiv:2110.02861) for
            parameters of two or more dimensions and 4,096 or more elements.
        rounding: of what is stored in bfloat16, parameters or running means.

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, or nothing is trainable.
    """
    return _adam(adam, False, model, lr, betas, eps, weight_decay, no_decay, groups, state_dtype, rounding)


class Adam(ShardOptimizer):
    """Adam on each rank's shards; see :func:`adam` and :func:`adamw`."""

    state_names = MOMENTS
    unsigned = frozenset({"exp_avg_sq"})

    def __init__(self, groups: list[dict[str, Any]], decoupled: bool, state_dtype: StateDtype, rounding: Rounding):
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(groups, defaults, state_dtype, rounding)
        self._decoupled = decoupled

    def update(self, group: dict[str, Any], work: Work, decision: Decision) -> None:
        """One step of Adam."""
        update_adam(group, work, decision, self._decoupled)


def update_adam(group: dict[str, Any], work: Work, decision: Decision, decoupled: bool) -> None:
    """One step of Adam in place, by torch's fused kernel where the device has one.

    Args:
        group: has lr, betas, eps and weight_decay.
        work: with the states ``exp_avg`` and ``exp_avg_sq``.
        decision: what gradients are divided by and whether the step counts.
        decoupled: weight decay is taken off the weights instead of added to the gradient.
    """
    if work.parameters[0].device.type not in _get_fused_kernels_supported_devices():
        _update_by_foreach(group, work, decision, decoupled)
        return
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        work.parameters,
        work.gradients,
        work.states["exp_avg"],
        work.states["exp_avg_sq"],
        [],
        work.steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=decision.scale,
        found_inf=decision.skip,
    )


def _update_by_foreach(group: dict[str, Any], work: Work, decision: Decision, decoupled: bool) -> None:
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    parameters, gradients, keep = work.parameters, work.gradients, decision.keep
    means, squares = (work.states[name] for name in MOMENTS)
    decision.apply(gradients)
    if decay and decoupled:
        multiply(parameters, 1 - lr * decay * keep)
    elif decay:
        torch._foreach_add_(gradients, parameters, alpha=decay)
    changes = torch._foreach_sub(gradients, means)
    multiply(changes, (1 - beta1) * keep)
    torch._foreach_add_(means, changes)
    torch._foreach_mul_(gradients, gradients)
    torch._foreach_sub_(gradients, squares)
    multiply(gradients, (1 - beta2) * keep)
    torch._foreach_add_(squares, gradients)
    roots = torch._foreach_sqrt(torch._foreach_div(squares, _corrections(work.steps, beta2)))
    torch._foreach_add_(roots, group["eps"])
    updates = torch._foreach_div(torch._foreach_div(means, _corrections(work.steps, beta1)), roots)
    multiply(updates, lr * keep)
    torch._foreach_sub_(parameters, updates)


def _corrections(steps: Sequence[Tensor], beta: float) -> list[Tensor]:
    """1 - beta^step, without the cancellation that the power in float32 has; of the first step before it."""
    logarithm = math.log(beta) if beta else -math.inf
    return [-torch.expm1(step.clamp(min=1) * logarithm) for step in steps]


def refuse_int8_of_columns(component: Callable[..., object], groups: Sequence[dict[str, Any]]) -> None:
    """Blocks of 8-bit states lie within rows, so where these are cut they have to be cut between blocks.

    Raises:
        ConfigError: some are not.
    """
    for group in groups:
        for name, parameter in group["params"]:
            if not storage.is_quantized(parameter):
                continue
            width = math.prod(map(len, ranges(parameter)[1:]))
            dims = {split.dim for split in splits(parameter)} - {0}
            if dims and (dims != {1} or width % quantized.BLOCK):
                raise ConfigError(
                    f"state_dtype int8 keeps blocks of {quantized.BLOCK} values of a row together, but the rows of "
                    f"{name} are cut into parts of {width} values",
                    hint="take bf16, or less tensor parallelism (tp of world.auto)",
                    about=(component, "state_dtype"),
                )


def _adam(
    component: Callable[..., object],
    decoupled: bool,
    model: Model,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    no_decay: Sequence[str],
    groups: Sequence[ParameterGroup],
    state_dtype: StateDtype,
    rounding: Rounding,
) -> torch.optim.Optimizer:
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_ranges(component, settings)
    arranged = arrange(component, model, groups, no_decay, [settings])
    if state_dtype == "int8":
        refuse_int8_of_columns(component, arranged)
    return Adam(arranged, decoupled, state_dtype, rounding)
