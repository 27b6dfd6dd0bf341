"""Collectives that autograd differentiates, on plain tensors that ranks hold parts of.

Which one follows from what the ranks hold. *Parts* follow one another along a dimension. *Summands* are of the same
shape, and their sum is meant. The gradient of what every rank uses whole, each in another product, comes in summands;
where ranks repeat the same computation, it comes in copies.

Shape suffixes: B batch, T tokens, P elements of all heads of a projection; lower case: this rank's part.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from modalities_parallel.pairs import all_gather, reduce_scatter


class Axis(NamedTuple):
    """The ranks along one axis of the mesh, as one of them sees it.

    group: None where it is alone.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(mesh: DeviceMesh, name: str) -> Axis:
        """The axis ``name`` of ``mesh``; one rank where it has none."""
        if name not in (mesh.mesh_dim_names or ()):
            return Axis(1, 0, None)
        return Axis(mesh[name].size(), mesh.get_local_rank(name), mesh.get_group(name))


def gather(part: Tensor, dim: int, axis: Axis) -> Tensor:
    """The whole along ``dim``, from each rank's part; its gradient comes in summands."""
    return part if axis.size == 1 else cast(Tensor, _Gather.apply(part, dim, axis))


def gather_copies(part: Tensor, dim: int, axis: Axis) -> Tensor:
    """The whole along ``dim``, from each rank's part; its gradient comes in copies."""
    return part if axis.size == 1 else cast(Tensor, _GatherCopies.apply(part, dim, axis))


def scatter(summand: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part along ``dim`` of the sum over ranks; the opposite of ``gather``."""
    return summand if axis.size == 1 else cast(Tensor, _Scatter.apply(summand, dim, axis))


def add_up(summand: Tensor, axis: Axis) -> Tensor:
    """The whole sum over ranks, on each of them; its gradient comes in summands."""
    return summand if axis.size == 1 else cast(Tensor, _AddUp.apply(summand, axis))


def tokens_to_heads(projected_BtP: Tensor, axis: Axis) -> Tensor:
    """All features of this rank's tokens to this rank's share of the features for all tokens: (B, t, P) to (B, T, p).

    Args:
        projected_BtP: the feature count is a multiple of the number of ranks.
        axis: ranks that share the tokens of each sample.
    """
    parts = projected_BtP.unflatten(-1, (axis.size, -1)).movedim(-2, 0)
    return cast(Tensor, _Exchange.apply(parts, axis)).movedim(0, 1).flatten(1, 2)


def heads_to_tokens(mixed_BTp: Tensor, axis: Axis) -> Tensor:
    """The opposite of ``tokens_to_heads``: (B, T, p) to (B, t, P)."""
    parts = mixed_BTp.unflatten(1, (axis.size, -1)).movedim(1, 0)
    return cast(Tensor, _Exchange.apply(parts, axis)).movedim(0, -2).flatten(-2)


def _gathered(part: Tensor, dim: int, axis: Axis) -> Tensor:
    part = part.contiguous()
    parts = part.new_empty(axis.size * part.shape[0], *part.shape[1:])
    all_gather(parts, part, group=axis.group)
    return parts if dim % part.dim() == 0 else torch.cat(parts.chunk(axis.size), dim)


def _scattered(summand: Tensor, dim: int, axis: Axis) -> Tensor:
    parts = summand.contiguous() if dim % summand.dim() == 0 else torch.cat(summand.chunk(axis.size, dim))
    total = parts.new_empty(parts.shape[0] // axis.size, *parts.shape[1:])
    reduce_scatter(total, parts, group=axis.group)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _gathered(part, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return _scattered(grad_outputs[0], ctx.dim, ctx.axis), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _scattered(summand, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return _gathered(grad_outputs[0], ctx.dim, ctx.axis), None, None


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _gathered(part, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        (gradient,) = grad_outputs
        return gradient.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank].contiguous(), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _added_up(summand, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return _added_up(grad_outputs[0], ctx.axis), None


class _Exchange(torch.autograd.Function):
    """Part i of every rank goes to rank i, along the first dimension: its own opposite."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _exchanged(parts, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return _exchanged(grad_outputs[0], ctx.axis), None


def _added_up(summand: Tensor, axis: Axis) -> Tensor:
    total = summand.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _exchanged(parts: Tensor, axis: Axis) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=axis.group)
    return received
