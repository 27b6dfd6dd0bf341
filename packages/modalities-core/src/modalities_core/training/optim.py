"""Optimizers, their parameter groups and what can be set on them during a run."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.parameters import trainable

NO_DECAY = ("*norm*", "*ln_*", "*bias", "*embed*", "*wte*", "*wpe*", "*log_scale")
"""Names of norms, biases, embeddings and single factors, which weight decay would only shrink."""

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")


def adamw(
    model: Model,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), fused where the device has it.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate; the schedule scales it.
        betas: decay of the running mean of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: share of the weights, times the learning rate, taken off in each step.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, or nothing is trainable.
    """
    _in_range("lr", lr, lr > 0, "positive")
    _in_range("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    _in_range("eps", eps, eps > 0, "positive")
    _in_range("weight_decay", weight_decay, weight_decay >= 0, "zero or more")
    parameters = trainable(model)
    if not parameters:
        raise ConfigError("the model has no parameter that takes gradients", about=model)
    if tuple(no_decay) != NO_DECAY:
        _refuse_unmatched(no_decay, list(parameters))
    exempt = [value for name, value in parameters.items() if matches(name, no_decay)]
    decayed = [value for name, value in parameters.items() if not matches(name, no_decay)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return _AdamW(groups, lr=lr, betas=betas, eps=eps, fused=can_fuse(list(parameters.values())))


class _AdamW(torch.optim.AdamW):
    """AdamW that can be built without loading torch's compiler, which takes most of a second.

    ``add_param_group`` is wrapped in torch so that a compiler in use leaves it alone; building does not need that.
    """

    add_param_group = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.AdamW.add_param_group)


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether any of the globs, case-sensitive, matches the whole name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def can_fuse(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch has a fused update for these devices and dtypes."""
    return all(value.device.type in FUSED_DEVICES and value.is_floating_point() for value in parameters)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each parameter group's learning rate as configured, that is the peak that a schedule scales."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], factor: float) -> float:
    """Set each group's learning rate to its peak times ``factor``; gives that of the first group."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(peak * factor)
        else:
            group["lr"] = peak * factor
    return peaks[0] * factor


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the configuration decided about each group, to be put back after a checkpoint brought older values."""
    return [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]


def restore_hyperparameters(optimizer: torch.optim.Optimizer, configured: Sequence[dict[str, Any]]) -> None:
    """Give every group the values that :func:`hyperparameters` took."""
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)


def _in_range(argument: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise ConfigError(f"{argument} has to be {wanted}, not {value}", about=(adamw, argument))


def _refuse_unmatched(globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            some = ", ".join(names[:5])
            raise ConfigError(
                f"no_decay has {glob!r}, which matches no parameter",
                hint=f"the model's {len(names)} parameters are {some}{', ...' if len(names) > 5 else ''}",
                about=(adamw, "no_decay"),
            )
