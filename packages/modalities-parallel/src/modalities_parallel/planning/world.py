"""A world that stands for as many ranks as somebody plans for, without any process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from modalities_core.errors import ConfigError
from modalities_parallel.sharing import unshared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modalities_core.interfaces import Model
    from modalities_parallel.mesh import Degrees

FEWEST = 0
"""Devices: as few as the degrees of the mesh allow."""
_devices: ContextVar[int | None] = ContextVar("planned_devices", default=None)


def planned_devices() -> int | None:
    """How many ranks the run that is being built is planned for, or FEWEST; None where a run is built to be run."""
    return _devices.get()


@contextmanager
def planning(devices: int) -> Iterator[None]:
    """Inside, ``world.auto`` is a ``Planned`` world of this many ranks; models are built on the meta device.

    Args:
        devices: ranks, at least 1, or FEWEST.

    Raises:
        ConfigError: there are none.
    """
    if devices < 1 and devices != FEWEST:
        raise ConfigError(f"a run needs at least 1 device, not {devices}")
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


class Planned:
    """A ``World`` in which nothing is sent: rank 0 of many, on the meta device.

    Args:
        degrees: ranks along each axis of the mesh.
    """

    def __init__(self, degrees: Degrees) -> None:
        import torch

        self.degrees = degrees
        self.rank = 0
        self.data_rank = 0
        self.size = degrees.ranks
        self.data_size = degrees.dp_replicate * degrees.dp_shard
        self.sequence_rank = 0
        self.sequence_size = degrees.cp
        self.device: torch.device = torch.device("meta")

    def sum(self, values: Tensor) -> Tensor:
        """``values``, which have no values."""
        return values

    def norm_share(self, parameters: Iterable[Tensor], order: float) -> Tensor:
        """A scalar without a value."""
        import torch

        return torch.empty((), device=self.device)

    def check(self, model: Model) -> None:
        """Raise ConfigError if gradients of ``model`` would not be reduced over the ranks."""
        if self.size > 1 and not hasattr(model, "sharding"):
            raise unshared(self.degrees, "the model", model)

    def broadcast(self, value: Any) -> Any:
        """``value`` itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""
