"""FSDP2 applied to a model: the part that needs torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from modalities_parallel.mesh import sharding_mesh


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Make each block and the rest a unit of FSDP2, in place; gradients become sums over the ranks.

    Args:
        model: the root; its parameters may be on the meta device.
        blocks: modules inside it, in the order of the forward.
        mesh: the world's whole mesh.
        param_dtype: of gathered weights and of activations.
        reduce_dtype: of gradients on their way.
        reshard_after_forward: whether blocks free their gathered weights after the forward.
    """
    along = sharding_mesh(mesh)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
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
