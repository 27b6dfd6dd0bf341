"""Where a rank's shard lies in the whole parameter: what optimizers need to know of DTensor, and no more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; the tensor itself where it is whole."""
    return cast("DTensor", tensor).to_local() if hasattr(tensor, "to_local") else tensor


def row_axis(tensor: Tensor) -> int | None:
    """The axis of the device mesh along which rows are shared out; None where a tensor is not sharded by rows.

    Other axes of the mesh may hold copies. A tensor sharded in any other way is not sharded by rows.
    """
    if not hasattr(tensor, "placements"):
        return None
    placements = cast("DTensor", tensor).placements
    shards = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    return shards[0] if len(shards) == 1 and placements[shards[0]].is_shard(0) else None


def rows_of(rows: int, ranks: int, rank: int) -> range:
    """The rows that a rank holds, as ``torch.chunk`` shares them out; later ranks may have fewer, or none."""
    each = math.ceil(rows / ranks)
    return range(min(rank * each, rows), min((rank + 1) * each, rows))


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor this rank holds where it lies on the ranks as ``like`` does; a view. Nothing is sent.

    What is split along the innermost axis of the mesh is cut first, and the parts then along the others, as FSDP2
    does with what tensor parallelism left to it.
    """
    sharded = cast("DTensor", like)
    mesh, part = sharded.device_mesh, whole
    for axis, placement in reversed(list(enumerate(sharded.placements))):
        if not placement.is_replicate():
            dim = cast(int, getattr(placement, "dim"))  # noqa: B009  # of a class that is not public
            rows = rows_of(part.shape[dim], mesh.size(axis), mesh.get_local_rank(axis))
            part = part.narrow(dim, rows.start, len(rows))
    return part


def first_element(tensor: Tensor) -> int:
    """Place of the shard's first element in the whole tensor; 0 where it is not sharded by rows."""
    axis = row_axis(tensor)
    if axis is None:
        return 0
    mesh = cast("DTensor", tensor).device_mesh
    first = rows_of(tensor.shape[0], mesh.size(axis), mesh.get_local_rank(axis)).start
    return first * math.prod(tensor.shape[1:])


def rows_like(parameter: Tensor, columns: int) -> Tensor:
    """Zeros of shape (rows of ``parameter``, columns), float32, sharded by rows as it is."""
    zeros = torch.zeros(local(parameter).shape[0], columns, dtype=torch.float32, device=local(parameter).device)
    if not hasattr(parameter, "placements"):
        return zeros
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", parameter)
    shape = torch.Size((parameter.shape[0], columns))
    return DTensor.from_local(
        zeros, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=(columns, 1)
    )
