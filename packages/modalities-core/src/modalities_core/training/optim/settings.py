"""What can be set on an optimizer's groups during a run, and put back after a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")


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
