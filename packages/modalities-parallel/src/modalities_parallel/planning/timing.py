"""How long a step takes at best: a roofline over every operation, and the collectives of every axis beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from modalities_parallel.planning.devices import (
    Device,
    exchange_seconds,
    gather_seconds,
    replicas_seconds,
    send_seconds,
)
from modalities_parallel.planning.layout import Layout, RankPart
from modalities_parallel.planning.memory import RankMemory, elements
from modalities_parallel.planning.split import StepShape
from modalities_parallel.planning.trace import Operation
from modalities_parallel.planning.traffic import Traffic


class StepTime(NamedTuple):
    """Seconds of one optimizer step, on the ranks that take longest.

    compute: of all micro batches' forward and backward.
    communication: of all collectives, hidden or not.
    exposed: of them, what nothing can be computed beside.
    bubble: in which ranks of a pipeline wait for others.
    optimizer: reading and writing weights, gradients and states.
    """

    compute: float
    communication: float
    exposed: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        """From step to step, reading of data and logging left out."""
        return self.compute + self.exposed + self.bubble + self.optimizer


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
    part: RankPart,
    whole: float,
    blocks: int,
    traffic: Traffic,
    steps: StepShape,
    held: RankMemory,
    stored: tuple[int, int, int],
    layout: Layout,
    device: Device,
) -> StepTime:
    """A step of the ranks that have ``part``, whose FSDP2 collectives run beside the computation.

    Those of tensor, context and expert parallelism stand between products, so nothing runs beside them. A pipeline of p
    ranks with v stages each waits for (p - 1) / v of its micro batches (arXiv:2104.04473, section 2.2), and with
    zero_bubble for about a third of that (arXiv:2401.10241, section 2.3).

    Args:
        part: of the model.
        whole: seconds of one micro batch's forward and backward in one process.
        blocks: of the whole model.
        traffic: of a micro batch.
        steps: micro batches of a step; gradients are sent after the last.
        held: by the rank.
        stored: bytes of its weights, gradients and optimizer states, wherever they are.
        layout: of the tensors.
        device: with its links.
    """
    d, count = layout.degrees, steps.micro_batches
    micro_batch = whole * sum(part.costs) / (d.tp * d.cp)
    inner = part.blocks / max(1, blocks) * _inner_seconds(traffic, steps, layout, device)
    if part.last:
        # Hidden states are gathered for the head, and their gradient is summed up; in front of the first block too.
        inner += 4 * gather_seconds(traffic.block / d.cp, d.tp, device)
    update = _update_seconds(held, stored, layout, device)
    compute = count * micro_batch
    if not layout.wrapped:
        return StepTime(compute, 0.0, 0.0, 0.0, update)
    sending, edges, beyond = _sharding_seconds(part, micro_batch + inner, count, layout, device)
    message = 2 * layout.stages_per_rank * send_seconds(traffic.block / (d.tp * d.cp), d.ranks // d.pp, device)
    passed = message * (d.pp > 1)
    bubble = (d.pp - 1) / layout.stages_per_rank * (micro_batch + inner + passed)
    bubble *= 1 / 3 if layout.schedule == "zero_bubble" else 1
    communication = sending + count * (inner + passed)
    return StepTime(compute, communication, beyond + edges + count * inner, bubble, update)


def _inner_seconds(traffic: Traffic, steps: StepShape, layout: Layout, device: Device) -> float:
    """What all blocks send between products in one micro batch, forward and backward."""
    d = layout.degrees
    # Gathered and summed up in forward, the other way round in backward; what runs again gathers again.
    times = 6 if steps.recomputed else 4
    seconds = sum(times * gather_seconds(size / d.cp, d.tp, device) for size in traffic.regions)
    ways = d.tp * d.cp
    # All of these once in forward and once in backward.
    times = 3 if steps.recomputed else 2
    seconds += sum(times * exchange_seconds(size / ways, d.cp, device, d.tp) for size in traffic.exchanged)
    return seconds + sum(2 * times * exchange_seconds(size / d.cp, d.ep, device, d.tp) for size in traffic.rows)


def _sharding_seconds(
    part: RankPart, micro_batch: float, count: int, layout: Layout, device: Device
) -> tuple[float, float, float]:
    """Of FSDP2's collectives: all, those at the edges of a step, and what takes longer than is computed beside it."""
    d = layout.degrees
    apart = d.tp
    units = [elements(unit) for unit in (part.root, *part.units)]
    gathers = [gather_seconds(layout.param_dtype.itemsize * unit, d.shards, device, apart) for unit in units]
    reductions = [
        gather_seconds(layout.reduce_dtype.itemsize * unit, d.shards, device, apart)
        + replicas_seconds(layout.reduce_dtype.itemsize * unit / d.shards, d.dp_replicate, d.shards * apart, device)
        for unit in units
    ]
    if layout.offload:
        # Shards come from the host before they are gathered, and gradients go there.
        moved = [part_of * 4 / layout.degrees.shards / device.host_link for part_of in units]
        gathers = [seconds + more for seconds, more in zip(gathers, moved, strict=True)]
        reductions = [seconds + more for seconds, more in zip(reductions, moved, strict=True)]
    # The last unit stays gathered for the backward, with which it begins.
    again = sum(gathers[1:-1]) if layout.reshard else 0.0
    gathering = sum(gathers) + again
    # Without freeing, a pipeline gathers once for all micro batches of a step.
    rounds = 1 if d.pp > 1 and not layout.reshard else count
    edges = gathers[0] + reductions[0]
    last = gathering + sum(reductions)
    window = micro_batch * (count if rounds < count else 1)
    beyond = (rounds - 1) * max(0.0, gathering - micro_batch) + max(0.0, last - edges - window)
    return (rounds - 1) * gathering + last, edges, beyond


def _update_seconds(held: RankMemory, stored: tuple[int, int, int], layout: Layout, device: Device) -> float:
    weights, gradients, states = stored
    bandwidth = device.host_bandwidth if layout.offload else device.bandwidth
    buffers = 0 if layout.offload else held.weights - weights
    return (2 * (weights + buffers) + gradients + 2 * states + held.copies) / bandwidth
