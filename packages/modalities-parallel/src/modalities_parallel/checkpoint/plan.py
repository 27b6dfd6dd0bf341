"""Which tensors a rank writes."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor


class Plan(DefaultSavePlanner):
    """What this rank writes, settled before anything is written, so that the tensors may change afterwards.

    Of the ranks that hold the same values each writes some tensors, about as many bytes as the others.

    Args:
        tensors: by name, sharded or not. Tensors that are not sharded, the ranks share out when they write.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        own = _own(tensors)
        super().set_up_planner(own)
        self._local_plan = super().create_local_plan()
        self.parts = {name: _local(value) for name, value in own.items()}

    def set_up_planner(
        self, state_dict: object, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: it is set up."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """As it was settled."""
        self.plan = self._local_plan
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """This rank's values of a tensor."""
        return self.parts[write_item.index.fqn]


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those that another rank with the same values writes."""
    shares: dict[tuple[str, ...], list[int]] = {}
    own = {}
    for name, value in tensors.items():
        axes, place, count = _copies(value)
        # The same on all ranks that differ in their place along these axes only: they have the same tensors.
        share = shares.setdefault(axes, [0] * count)
        least = share.index(min(share))
        share[least] += value.numel() * value.element_size()
        if least == place:
            own[name] = value
    return own


def _copies(value: Tensor) -> tuple[tuple[str, ...], int, int]:
    """Axes of the mesh along which ranks hold the same part, this one's place among them, and how many there are."""
    if not isinstance(value, DTensor):
        return (), 0, 1
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank has no part of a tensor of its model"
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    axes, place, count = [], 0, 1
    for axis, placement in enumerate(value.placements):
        if placement.is_replicate():
            axes.append(names[axis])
            place, count = place * mesh.size(axis) + coordinate[axis], count * mesh.size(axis)
    return tuple(axes), place, count


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach()
