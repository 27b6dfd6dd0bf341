"""How long a step takes at best: a roofline over every operation, and the collectives of FSDP2 beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from modalities_parallel.planning.devices import Device, gather_seconds, replicas_seconds
from modalities_parallel.planning.memory import Layout, RankMemory
from modalities_parallel.planning.trace import Operation


class StepTime(NamedTuple):
    """Seconds of one optimizer step.

    compute: of all micro batches' forward and backward.
    communication: of all collectives, hidden or not.
    exposed: of them, what nothing can be computed beside.
    optimizer: reading and writing weights, gradients and states.
    """

    compute: float
    communication: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        """From step to step, reading of data and logging left out."""
        return self.compute + self.exposed + self.optimizer


def compute_seconds(operations: Iterable[Operation], device: Device, dtype: torch.dtype, compiled: bool) -> float:
    """The sum over kernels of the longer of two: multiplying, and reading and writing.

    Method: the roofline of Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.

    Args:
        operations: of one micro batch.
        device: which multiplies at the speed of its best products.
        dtype: of the factors.
        compiled: whether kernels without products are fused; then only what they write counts, since what they read
            comes from the one before.
    """
    peak = device.fp32_flops if dtype == torch.float32 else device.peak
    seconds = 0.0
    for operation in operations:
        fused = compiled and not operation.flops
        moved = operation.written + (0.0 if fused else operation.read)
        seconds += max(operation.flops / (device.matmul_share * peak), moved / device.bandwidth)
    return seconds


def step_time(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    micro_batch: float,
    accumulation: int,
    held: RankMemory,
    layout: Layout,
    device: Device,
) -> StepTime:
    """A step whose collectives run beside the computation, as FSDP2 prefetches the next block's weights.

    Args:
        module: the whole model.
        blocks: its units of sharding.
        micro_batch: seconds of one micro batch's forward and backward.
        accumulation: micro batches of a step; gradients are sent after the last.
        held: by the rank.
        layout: of the tensors.
        device: with its links.
    """
    update = (2 * held.weights + held.gradients + 2 * held.optimizer + held.copies) / device.bandwidth
    compute = accumulation * micro_batch
    if not layout.wrapped:
        return StepTime(compute, 0.0, 0.0, update)
    units = [sum(value.numel() for value in block.parameters()) for block in blocks]
    root = sum(value.numel() for value in module.parameters()) - sum(units)
    gathers = [gather_seconds(layout.param_dtype.itemsize * unit, layout.shards, device) for unit in (root, *units)]
    reductions = [
        gather_seconds(layout.reduce_dtype.itemsize * unit, layout.shards, device)
        + replicas_seconds(layout.reduce_dtype.itemsize * unit / layout.shards, layout.replicas, layout.shards, device)
        for unit in (root, *units)
    ]
    gathering = gathers[0] + (2 if layout.reshard else 1) * sum(gathers[1:])
    last = gathering + sum(reductions)
    # Nothing is computed before the first weights are there, and the last gradients have to arrive.
    edges = gathers[0] + reductions[0]
    beyond = (accumulation - 1) * max(0.0, gathering - micro_batch) + max(0.0, last - edges - micro_batch)
    return StepTime(compute, (accumulation - 1) * gathering + last, beyond + edges, update)
