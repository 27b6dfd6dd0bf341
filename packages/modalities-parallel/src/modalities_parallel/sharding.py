"""FSDP2 applied to a model: the part that needs torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from modalities_parallel.mesh import Meshes, sharding_mesh
from modalities_parallel.sharding_settings import Sharding


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], experts: Sequence[nn.Module], meshes: Meshes, sharding: Sharding
) -> None:
    """Make each block and the rest a unit of FSDP2, in place; gradients become sums over the ranks.

    Args:
        model: the root; its parameters may be on the meta device.
        blocks: modules inside it, in the order of the forward.
        experts: modules inside of blocks whose own parameters are experts, of which this rank has some.
        meshes: the world's.
        sharding: dtypes, and whether blocks free their gathered weights after the forward.
    """
    param_dtype, reduce_dtype, reshard_after_forward = sharding[:3]
    along = sharding_mesh(meshes.weights)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for module in experts:
        assert meshes.experts is not None, "experts are spread over a mesh of theirs"
        for child in module.children():
            fully_shard(child, mesh=along, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        over = sharding_mesh(meshes.experts)
        fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for block in reversed(blocks):
        fully_shard(block, mesh=along, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The head is called after the root's forward, and a tied head reads the embedding: both have to stay whole.
    root_policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, output_dtype=param_dtype)
    fully_shard(model, mesh=along, mp_policy=root_policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum that is divided once by the global token count, so gradients must not be averaged.
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, and NCCL can skip scaling.
            module.set_force_sum_reduction_for_comms(True)
