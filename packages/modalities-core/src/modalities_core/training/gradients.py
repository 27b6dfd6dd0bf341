"""What all ranks have to know about the gradients of a step, in a single reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modalities_core.interfaces import LossSum, World
from modalities_core.training.norms import sum_dtype
from modalities_core.training.signals import StopSignals


class Reduced(NamedTuple):
    """Sums over all ranks, on the device.

    loss, tokens: scalars, as in LossSum.
    norm: scalar, of the gradient of the summed loss as it lies in the parameters.
    flags: (2,), ranks that were asked to stop: preempted, interrupted.
    bad_ranks: (ranks,), 1 where the rank's own loss is not finite.
    """

    loss: Tensor
    tokens: Tensor
    norm: Tensor
    flags: Tensor
    bad_ranks: Tensor


def reduce_step(
    world: World, sums: LossSum, parameters: Sequence[Tensor], order: float, signals: StopSignals
) -> Reduced:
    """Everything a step has to agree on, in one reduction; collective, and the host does not wait for it.

    Args:
        world: the ranks.
        sums: this rank's.
        parameters: whose gradients are measured.
        order: of the norm: 1, 2 or infinity.
        signals: that this rank was given.
    """
    largest = math.isinf(order)
    ranks = world.size
    values = torch.zeros(5 + ranks * (2 if largest else 1), dtype=sum_dtype(world.device), device=world.device)
    values[0].copy_(sums.loss)
    values[1].copy_(sums.tokens)
    # The largest of all cannot be had from a sum, but one place for each rank can.
    values[5 + ranks + world.rank if largest else 2].copy_(world.norm_share(parameters, order))
    for place, flag in enumerate(signals.flags(), start=3):
        if flag:
            values[place].fill_(flag)
    values[5 + world.rank].copy_(~torch.isfinite(sums.loss))
    values = world.sum(values)
    norm = values[5 + ranks :].amax() if largest else values[2].pow(1 / order)
    return Reduced(values[0], values[1], norm, values[3:5], values[5 : 5 + ranks])
