"""The orthogonal matrix nearest to another, roughly, and over ranks that each hold some of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from modalities_core.training.optim.placement import local, row_axis, rows_of

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
    every rank does its share of the work, and the result is the same for any number of ranks.

    Args:
        parameters: say how the directions are sharded.
        directions: this rank's part of each matrix, bfloat16.
    """
    results: list[Tensor | None] = [None] * len(parameters)
    shared: dict[tuple[DeviceMesh, int], list[int]] = {}
    for at, parameter in enumerate(parameters):
        axis = row_axis(parameter)
        if axis is not None:
            shared.setdefault((cast("DTensor", parameter).device_mesh, axis), []).append(at)
        elif hasattr(parameter, "placements"):
            results[at] = _gathered_by_all(cast("DTensor", parameter), directions[at])
        else:
            results[at] = orthogonalize(as_matrices(directions[at])).view_as(directions[at])
    for (mesh, axis), members in shared.items():
        largest_first = sorted(members, key=lambda at: -parameters[at].numel())
        ranks = mesh.size(axis)
        for start in range(0, len(members), ranks):
            some = largest_first[start : start + ranks]
            parts = _one_each(mesh, axis, [parameters[at].shape for at in some], [directions[at] for at in some])
            for at, part in zip(some, parts, strict=True):
                results[at] = part
    return [cast(Tensor, result) for result in results]


def _one_each(mesh: DeviceMesh, axis: int, shapes: Sequence[torch.Size], parts: Sequence[Tensor]) -> list[Tensor]:
    """Send the parts of matrix i to rank i, let it work on the whole, and send the parts of the result back.

    Args:
        mesh: of the parameters.
        axis: along which their rows are shared out.
        shapes: of at most as many matrices as there are ranks.
        parts: this rank's rows of each.
    """
    import torch.distributed as dist

    ranks, rank, group = mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis)
    idle = [0] * (ranks - len(parts))
    outgoing = [part.numel() for part in parts] + idle
    mine = shapes[rank] if rank < len(shapes) else torch.Size((0, 0))
    incoming = [len(rows_of(mine[0], ranks, other)) * math.prod(mine[1:]) for other in range(ranks)]
    sent = torch.cat([part.flatten() for part in parts])
    whole = sent.new_empty(sum(incoming))
    dist.all_to_all_single(whole, sent, incoming, outgoing, group=group)
    if whole.numel():
        whole = orthogonalize(as_matrices(whole.view(mine))).flatten()
    returned = torch.empty_like(sent)
    dist.all_to_all_single(returned, whole.contiguous(), outgoing, incoming, group=group)
    return [piece.view_as(part) for piece, part in zip(returned.split(outgoing), parts, strict=False)]


def _gathered_by_all(parameter: DTensor, part: Tensor) -> Tensor:
    """Every rank gathers the matrix and does the same work: for sharding by columns or along several axes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    direction = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = direction.full_tensor()
    result = orthogonalize(as_matrices(whole)).view_as(whole)
    # Where parameters are offloaded the mesh is of another device than they are.
    return local(distribute_tensor(result, mesh, placements, src_data_rank=None)).to(part.device)
