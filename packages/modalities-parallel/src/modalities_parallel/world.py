"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

from typing import Literal

from modalities_core.interfaces import World
from modalities_parallel.environment import launch
from modalities_parallel.mesh import degrees
from modalities_parallel.planning.world import Planned, planned_devices


def auto(dp_replicate: int = 1, dp_shard: int | Literal["auto"] = "auto", timeout_seconds: float = 600.0) -> World:
    """The processes torchrun started, or this one alone where nothing launched it.

    Args:
        dp_replicate: groups of ranks that each hold the whole model; more than 1 is HSDP.
        dp_shard: ranks that share one copy of the model; auto takes all that are left.
        timeout_seconds: how long ranks wait for each other before the run ends with an error.

    Raises:
        ConfigError: the degrees do not multiply to the number of ranks, or the environment is half a launch.
        DistributedError: the ranks do not find each other.
    """
    if (devices := planned_devices()) is not None:
        return Planned(degrees(devices, dp_replicate, dp_shard, component=auto))  # pyrefly: ignore[bad-return]
    place = launch()
    if place is None:
        from modalities_core.training.world import Alone

        degrees(1, dp_replicate, dp_shard, component=auto)
        return Alone()  # pyrefly: ignore[bad-return]  # it takes an attribute of type torch.device for a descriptor
    # Loaded only in a launch: DTensor takes half a second, which checking a configuration should not wait for.
    from modalities_parallel.distributed import Distributed

    along = degrees(place.size, dp_replicate, dp_shard, component=auto)
    return Distributed(place, along, timeout_seconds)  # pyrefly: ignore[bad-return]
