"""The orthogonal matrix nearest to another, roughly, and over ranks that each hold some of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from modalities_core.training.optim.placement import Split, rows_of, splits

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial a x + b x^3 + c x^5: steep at 0, so that five steps suffice (Keller Jordan)."""
STEPS = 5
EPS = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the singular value decomposition U S V^T: singular values between about 0.7 and 1.2.

    Method: Newton-Schulz iteration in bfloat16 (Keller Jordan et al., kellerjordan.github.io/posts/muon).

    Args:
        matrix: (rows, columns), or (..., rows, columns) for a stack of them, of any dtype.

    Returns:
        bfloat16, of the same shape; zeros where the matrix is zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    # A tall matrix is turned, so that the products are of the smaller side.
    found = (matrix.mT if tall else matrix).to(torch.bfloat16)
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add_product = torch.addmm if found.ndim == 2 else torch.baddbmm
    for _ in range(STEPS):
        square = found @ found.mT
        found = add_product(found, add_product(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def as_matrices(tensor: Tensor) -> Tensor:
    """A parameter of three dimensions is a stack of matrices (experts); of a convolution, one row per output."""
    return tensor if tensor.ndim < 4 else tensor.flatten(1)


def orthogonalize_shards(parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """:func:`orthogonalize` for shards: each rank gets its part of the result. Collective where there are ranks.

    Matrices that are shared out by rows go whole to one rank each, the largest first, and come back in parts; so
    every rank does its share of the work, and the result is the same for any number of ranks. What tensor parallelism
    has split as well, by rows or columns, is put together by the ranks that share it, which then do the same work.

    Args:
        parameters: say how the directions are sharded.
        directions: this rank's part of each matrix, bfloat16.
    """
    results: list[Tensor | None] = [None] * len(parameters)
    shared: dict[tuple[DeviceMesh, int], list[int]] = {}
    for at, parameter in enumerate(parameters):
        rows, _ = _ways(parameter)
        if rows is None:
            results[at] = _orthogonalized(directions[at], parameter)
        else:
            shared.setdefault((cast("DTensor", parameter).device_mesh, rows.axis), []).append(at)
    for (mesh, axis), members in shared.items():
        largest_first = sorted(members, key=lambda at: -parameters[at].numel())
        ranks = mesh.size(axis)
        for start in range(0, len(members), ranks):
            some = largest_first[start : start + ranks]
            parts = _one_each(mesh, axis, [parameters[at] for at in some], [directions[at] for at in some])
            for at, part in zip(some, parts, strict=True):
                results[at] = part
    return [cast(Tensor, result) for result in results]


def _ways(parameter: Tensor) -> tuple[Split | None, list[Split]]:
    """The outermost split by rows, within a matrix; and the others within one, each into equal parts.

    A stack of matrices that is shared out matrix by matrix has none.
    """
    within = [split for split in splits(parameter) if parameter.ndim != 3 or split.dim > 0]
    if within and within[0].dim == 0:
        return within[0], within[1:]
    return None, within


def _one_each(mesh: DeviceMesh, axis: int, parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Send the parts of matrix i to rank i, let it work on the whole, and send the parts of the result back.

    Args:
        mesh: of the parameters.
        axis: along which their rows are shared out.
        parameters: at most as many as there are ranks.
        parts: this rank's rows of each.
    """
    import torch.distributed as dist

    ranks, rank, group = mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis)
    idle = [0] * (ranks - len(parts))
    outgoing = [part.numel() for part in parts] + idle
    mine = _along_axis(parameters[rank]) if rank < len(parameters) else torch.Size((0, 0))
    incoming = [len(rows_of(mine[0], ranks, other)) * math.prod(mine[1:]) for other in range(ranks)]
    sent = torch.cat([part.flatten() for part in parts])
    whole = sent.new_empty(sum(incoming))
    dist.all_to_all_single(whole, sent, incoming, outgoing, group=group)
    if whole.numel():
        whole = _orthogonalized(whole.view(mine), parameters[rank]).flatten()
    returned = torch.empty_like(sent)
    dist.all_to_all_single(returned, whole.contiguous(), outgoing, incoming, group=group)
    return [piece.view_as(part) for piece, part in zip(returned.split(outgoing), parts, strict=False)]


def _along_axis(parameter: Tensor) -> torch.Size:
    """The shape of what the ranks that share its rows have together."""
    shape = list(parameter.shape)
    for axis, dim in _ways(parameter)[1]:
        shape[dim] //= cast("DTensor", parameter).device_mesh.size(axis)
    return torch.Size(shape)


def _orthogonalized(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of the result, from its part of all rows or columns."""
    import torch.distributed as dist

    if not part.numel():
        return part
    # torch 2.13 has another name for it, and warns of the older one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    whole = part
    for axis, dim in reversed(_ways(parameter)[1]):
        mesh = cast("DTensor", parameter).device_mesh
        parts = whole.new_empty(mesh.size(axis) * whole.shape[0], *whole.shape[1:])
        all_gather(parts, whole.contiguous(), group=mesh.get_group(axis))
        whole = torch.cat(parts.chunk(mesh.size(axis)), dim)
    result = orthogonalize(as_matrices(whole)).view_as(whole)
    for axis, dim in _ways(parameter)[1]:
        mesh = cast("DTensor", parameter).device_mesh
        result = result.chunk(mesh.size(axis), dim)[mesh.get_local_rank(axis)]
    return result
