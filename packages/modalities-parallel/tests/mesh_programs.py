"""What the ranks of the tests of meshes run: ``python mesh_programs.py FUNCTION ARGUMENTS RESULT``."""

from __future__ import annotations

import torch.distributed as dist
from parallel_programs import main
from parallel_small_model import SmallModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modalities_core.errors import ConfigError
from modalities_parallel.mesh import degrees, device_meshes, sharding_mesh
from modalities_parallel.world import auto


def groups(mesh):
    """The ranks that share each axis with this one."""
    return {axis: dist.get_process_group_ranks(mesh.get_group(axis)) for axis in mesh.mesh_dim_names}


def meshes(cases):
    """Who shares what with this rank, for each of some degrees, and what a world says about strange models."""
    world = auto(timeout_seconds=60)
    found = []
    for case in cases:
        made = device_meshes("cpu", degrees(world.size, **case))
        arranged = {"whole": made.whole, "weights": made.weights, "experts": made.experts}
        result = {name: None if mesh is None else groups(mesh) for name, mesh in arranged.items()}
        result |= {"data_rank": made.data_rank, "sequence_rank": made.sequence_rank}
        result["sharding"] = list(sharding_mesh(made.weights).mesh_dim_names)
        found.append(result)
    # Only half of the ranks share these weights, and the copies of the two halves would go apart.
    model = fully_shard(SmallModel(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"])
    refusals = []
    for strange in (SmallModel(), model):
        try:
            world.check(strange)
        except ConfigError as error:
            refusals.append(str(error))
    del model, strange
    world.close()
    return {"meshes": found, "refusals": refusals}


if __name__ == "__main__":
    main(globals())
