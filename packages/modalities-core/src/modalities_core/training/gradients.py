"""From summed gradients to one update: a single reduction, the finite check, scaling and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from modalities_core.errors import NumericalError
from modalities_core.interfaces import LossSum, World
from modalities_core.training.signals import StopSignals, stop_state
from modalities_core.training.totals import StepTotals


def reduce_step(world: World, sums: LossSum, parameters: Iterable[Tensor], signals: StopSignals) -> StepTotals:
    """Everything a step has to agree on, in one reduction and one copy to the host; collective."""
    squared_norm = world.squared_norm(parameters)
    bad = ~torch.isfinite(sums.loss)
    flags = torch.tensor(signals.flags(), device=world.device)
    measures = torch.stack([value.detach().to(world.device) for value in (sums.loss, sums.tokens, squared_norm, bad)])
    # Apple's GPUs have no float64; everywhere else it keeps token counts exact.
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    totals = world.sum(torch.cat([measures.to(dtype), flags.to(dtype)])).tolist()
    loss, tokens, squared, bad_ranks, *flags = totals
    # A step in which no target counts has no mean loss and no gradient.
    norm = (math.sqrt(squared) if squared >= 0 else math.nan) / (tokens or 1.0)
    return StepTotals(loss, tokens, norm, round(bad_ranks), stop_state(flags))


def check_finite(totals: StepTotals, step: int, samples: range, ranks: int) -> None:
    """Stop all ranks alike if the update would put values that are not finite into the weights.

    Args:
        totals: of the step, the same on every rank.
        step: one-based number of the step.
        samples: global numbers of the samples it used.
        ranks: how many there are.

    Raises:
        NumericalError: loss or gradient are not finite on some rank.
    """
    if totals.bad_ranks or not math.isfinite(totals.loss) or not math.isfinite(totals.gradient_norm):
        raise NumericalError(
            f"step {step} has a loss of {totals.mean_loss} and a gradient norm of {totals.gradient_norm}; the loss is "
            f"not finite on {totals.bad_ranks} of {ranks} ranks; the samples are {samples.start} to "
            f"{samples.stop - 1} of the run",
            hint="the weights were not changed by it; look at these samples, lower the learning rate or clip_norm, "
            "or compute in fp32, then run again to continue from the last checkpoint",
        )


def scale_gradients(parameters: Iterable[Tensor], totals: StepTotals, clip_norm: float | None) -> None:
    """Turn gradients of the summed loss into those of the mean loss, clipped, in one multiplication.

    Args:
        parameters: whose gradients are scaled in place, sharded ones each on its own rank.
        totals: of the step.
        clip_norm: longest 2-norm allowed, as in ``torch.nn.utils.clip_grad_norm_``; None for no limit.
    """
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (totals.gradient_norm + 1e-6))
    scale = factor / totals.tokens if totals.tokens else 0.0
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
