"""How many ranks each kind of parallelism gets, and the device mesh that follows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modalities_core.errors import ConfigError

REPLICATE = "dp_replicate"
SHARD = "dp_shard"


class Degrees(NamedTuple):
    """Ranks along each axis of the mesh; their product is the number of ranks.

    dp_replicate: groups that each hold the whole model.
    dp_shard: ranks that share one copy of the model.
    """

    dp_replicate: int
    dp_shard: int


def degrees(
    ranks: int, dp_replicate: int = 1, dp_shard: int | Literal["auto"] = "auto", *, component: object = None
) -> Degrees:
    """Resolve ``auto`` and make sure that the degrees multiply to the number of ranks.

    Args:
        ranks: processes of the run.
        dp_replicate: groups that each hold the whole model.
        dp_shard: ranks that share one copy of the model; ``auto`` takes all that are left.
        component: the component whose arguments these are, for error positions.

    Raises:
        ConfigError: the arithmetic does not work out.
    """
    if dp_replicate < 1:
        raise ConfigError(
            f"dp_replicate is {dp_replicate}, but a degree is at least 1", about=(component, "dp_replicate")
        )
    if dp_shard == "auto":
        if ranks % dp_replicate:
            raise ConfigError(
                f"{ranks} ranks cannot be split into dp_replicate = {dp_replicate} equal groups",
                hint=f"dp_replicate must divide {ranks}: {_divisors(ranks)}",
                about=(component, "dp_replicate"),
            )
        return Degrees(dp_replicate, ranks // dp_replicate)
    if dp_shard < 1:
        raise ConfigError(
            f"dp_shard is {dp_shard}, but a degree is at least 1",
            hint='"auto" takes all ranks that are left',
            about=(component, "dp_shard"),
        )
    if dp_replicate * dp_shard != ranks:
        raise ConfigError(
            f"dp_replicate {dp_replicate} x dp_shard {dp_shard} = {dp_replicate * dp_shard}, "
            f"but this run has {_ranks(ranks)}",
            hint=f'set dp_shard to "auto", or start {_ranks(dp_replicate * dp_shard)} '
            f"(torchrun --nproc-per-node {dp_replicate * dp_shard} on one node)",
            about=(component, "dp_shard"),
        )
    return Degrees(dp_replicate, dp_shard)


def device_mesh(device_type: str, degrees: Degrees) -> DeviceMesh:
    """The mesh of all ranks with the axes of ``Degrees``; collective.

    Neighbouring ranks share one copy of the model, so that gathering parameters stays inside a node.
    """
    return init_device_mesh(device_type, tuple(degrees), mesh_dim_names=Degrees._fields)


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP2 shards over: one axis, or two where copies of the model are replicated (HSDP)."""
    return mesh if mesh[REPLICATE].size() > 1 else mesh[SHARD]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
