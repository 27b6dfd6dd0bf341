"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from modalities_core.interfaces import World
from modalities_parallel.environment import launch
from modalities_parallel.mesh import degrees, fewest_ranks
from modalities_parallel.planning.world import FEWEST, Planned, planned_devices

_alone: ContextVar[bool] = ContextVar("one_process", default=False)


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, ``world.auto`` is this process alone, whatever mesh it is asked for: to read what many ranks trained."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def auto(
    dp_replicate: int | Literal["auto"] = 1,
    dp_shard: int | Literal["auto"] = "auto",
    cp: int | Literal["auto"] = 1,
    tp: int | Literal["auto"] = 1,
    pp: int | Literal["auto"] = 1,
    ep: int = 1,
    timeout_seconds: float = 600.0,
) -> World:
    """The processes torchrun started, or this one alone where nothing launched it.

    The mesh is pp x dp_replicate x dp_shard x cp x tp; one of these may be auto, and takes all ranks that are left.

    Args:
        dp_replicate: groups of ranks that each hold the whole model; more than 1 is HSDP, or with dp_shard 1 plain
            data parallelism.
        dp_shard: ranks that share one copy of the model and see different data.
        cp: context parallelism, ranks that share the tokens of each sample; they share the weights as well.
        tp: tensor parallelism, ranks that share each matrix product, and the tokens in between.
        pp: pipeline parallelism, stages that the blocks are shared out to; needs executor.pipeline.
        ep: expert parallelism, ranks that share the experts of a mixture, taken from those of dp_shard and cp.
        timeout_seconds: how long ranks wait for each other before the run ends with an error.

    Raises:
        ConfigError: the degrees do not multiply to the number of ranks, or the environment is half a launch.
        DistributedError: the ranks do not find each other.
    """
    asked = (dp_replicate, dp_shard, cp, tp, pp, ep)
    if (devices := planned_devices()) is not None:
        ranks = fewest_ranks(*asked) if devices == FEWEST else devices
        return Planned(degrees(ranks, *asked, component=auto))  # pyrefly: ignore[bad-return]
    place = None if _alone.get() else launch()
    if place is None:
        from modalities_core.training.world import Alone

        if not _alone.get():
            degrees(1, *asked, component=auto)
        return Alone()  # pyrefly: ignore[bad-return]  # it takes an attribute of type torch.device for a descriptor
    # Loaded only in a launch: DTensor takes half a second, which checking a configuration should not wait for.
    from modalities_parallel.distributed import Distributed

    along = degrees(place.size, *asked, component=auto)
    return Distributed(place, along, timeout_seconds)  # pyrefly: ignore[bad-return]
