"""Parameters that ranks hold parts of: DTensors to those who train and save them, plain tensors to those who compute.

The class of a module with such parameters becomes a subclass of its own, in which each of them is a property that
reads this rank's part. So whoever reads one, a tied head, a fused operator or a loss, gets the part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class Reading(NamedTuple):
    """How a parameter lies on the ranks, and what becomes of its gradient.

    placement: of the parameter.
    gradient: of the gradient that autograd finds on each rank.
    once: read as zeros on all ranks but the first, as it is added to what is summed up later.
    """

    placement: Placement
    gradient: Placement
    once: bool = False


def along(dim: int) -> Reading:
    """Split along ``dim``; each rank finds the whole gradient of its part."""
    return Reading(Shard(dim), Shard(dim))


SUMMANDS = Reading(Replicate(), Partial())
"""Whole on every rank, used on other tokens or other heads on each."""
ONCE = Reading(Replicate(), Partial(), once=True)
COPIES = Reading(Replicate(), Replicate())
"""Whole on every rank, used alike on each."""


def distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part of a parameter on the meta device, as a parameter of the same shape.

    Args:
        parameter: without values.
        mesh: the ranks, of one axis.
        placement: how it lies on them; what is split divides.
    """
    assert parameter.is_meta, "values are given after sharding"
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        shape[placement.dim] //= mesh.size()
    part = torch.empty(shape, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(
        part, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def read_parts(module: nn.Module, readings: Mapping[str, Reading], rank: int, *more: type) -> None:
    """Let attributes of ``module`` be this rank's parts.

    Args:
        module: its class is changed.
        readings: by the parameter's attribute.
        rank: of those that share them.
        more: classes put in front of the module's own.
    """
    module.__class__ = _kind(type(module), tuple(sorted(readings.items())), rank, more)


@functools.cache
def _kind(kind: type, readings: tuple[tuple[str, Reading], ...], rank: int, more: tuple[type, ...]) -> type:
    # Kept, as modules that are alike have to be of one class to be compiled once.
    body: dict[str, Any] = {name: property(_reader(name, reading, rank)) for name, reading in readings}
    return type(f"Split{kind.__name__}", (*more, kind), body)


def _reader(name: str, reading: Reading, rank: int) -> Callable[[nn.Module], Tensor | None]:
    gradient = (reading.gradient,)
    vanishes = reading.once and rank > 0

    def read(self: nn.Module) -> Tensor | None:
        parameter = self._parameters[name]
        # Between steps, and while it is sharded over data-parallel ranks too, it is what FSDP2 alone would show.
        if parameter is None or len(cast(DTensor, parameter).placements) > 1:
            return parameter
        part = cast(DTensor, parameter).to_local(grad_placements=gradient)
        return part * 0 if vanishes else part

    return read
