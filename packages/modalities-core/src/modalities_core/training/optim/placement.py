"""Where a rank's shard lies in the whole parameter: what optimizers need to know of DTensor, and no more.

Whatever shares a parameter out, a rank's part is a block of it: a range along each dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Split(NamedTuple):
    """An axis of the device mesh along which a dimension of a tensor is shared out."""

    axis: int
    dim: int


class Elements(NamedTuple):
    """Places of a part's elements in the whole, in their order: stretches of ``width``, ``step`` apart.

    row: elements of the whole from one row, an index of the first dimension, to the next.
    """

    first: int
    width: int
    step: int
    row: int

    def from_row(self, row: int) -> Elements:
        """The same from a later row of the part on."""
        return self._replace(first=self.first + row * self.row)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; the tensor itself where it is whole."""
    return cast("DTensor", tensor).to_local() if hasattr(tensor, "to_local") else tensor


def splits(tensor: Tensor) -> list[Split]:
    """How a tensor is shared out, outermost axis first; other axes of its mesh hold copies. Empty where it is whole."""
    if not hasattr(tensor, "placements"):
        return []
    placements = cast("DTensor", tensor).placements
    # Of a class that is not public where FSDP2 shards what tensor parallelism has split along the same dimension.
    dims = [(axis, getattr(placement, "dim", 0)) for axis, placement in enumerate(placements)]
    return [Split(axis, dim) for axis, dim in dims if not placements[axis].is_replicate()]


def rows_of(rows: int, ranks: int, rank: int) -> range:
    """The rows that a rank holds, as ``torch.chunk`` shares them out; later ranks may have fewer, or none."""
    each = math.ceil(rows / ranks)
    return range(min(rank * each, rows), min((rank + 1) * each, rows))


def ranges(tensor: Tensor) -> list[range]:
    """This rank's part of a tensor along each dimension.

    What is split along the innermost axis of the mesh is cut first, and the parts then along the others, as FSDP2
    does with what tensor parallelism left to it.
    """
    found = [range(size) for size in tensor.shape]
    for axis, dim in reversed(splits(tensor)):
        mesh = cast("DTensor", tensor).device_mesh
        own = rows_of(len(found[dim]), mesh.size(axis), mesh.get_local_rank(axis))
        found[dim] = found[dim][own.start : own.stop]
    return found


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor this rank holds where it lies on the ranks as ``like`` does; a view. Nothing is sent."""
    return whole[tuple(slice(part.start, part.stop) for part in ranges(like))]


def elements(tensor: Tensor) -> Elements:
    """Where the elements of this rank's part are in the whole.

    Only the first dimension and one more may be shared out.
    """
    part, shape = ranges(tensor), tensor.shape
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inner = max((split.dim for split in splits(tensor)), default=0)
    first = sum(own.start * stride for own, stride in zip(part, strides, strict=True))
    width = math.prod(len(own) for own in part[inner:])
    return Elements(first, width, math.prod(shape[inner:]), strides[0] if strides else 1)


def rows_like(parameter: Tensor, columns: int) -> Tensor:
    """Zeros of shape (rows of ``parameter``, columns), float32, on the ranks as its first two dimensions are."""
    zeros = torch.zeros(local(parameter).shape[0], columns, dtype=torch.float32, device=local(parameter).device)
    if not hasattr(parameter, "placements"):
        return zeros
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", parameter)
    whole = columns * math.prod(sharded.device_mesh.size(axis) for axis, dim in splits(parameter) if dim == 1)
    shape = torch.Size((parameter.shape[0], whole))
    return DTensor.from_local(
        zeros, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=(whole, 1)
    )
