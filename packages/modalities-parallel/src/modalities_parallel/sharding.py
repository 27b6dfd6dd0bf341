"""FSDP2 applied to a model: the part that needs torch.distributed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from modalities_parallel.mesh import Meshes, sharding_mesh
from modalities_parallel.sharding_settings import Sharding


def shard(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    experts: Sequence[nn.Module],
    meshes: Meshes,
    sharding: Sharding,
) -> None:
    """Make each unit of blocks and the rest a unit of FSDP2, in place; gradients become sums over the ranks.

    Args:
        model: the root; its parameters may be on the meta device.
        blocks: modules inside it by name, in the order of the forward; those without parameters are of other ranks.
        experts: modules inside of blocks whose own parameters are experts, of which this rank has some.
        meshes: the world's.
        sharding: dtypes, and when weights are gathered and freed.
    """
    along = sharding_mesh(meshes.weights)
    policy = MixedPrecisionPolicy(param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype)
    free = sharding.reshard_after_forward
    common: dict[str, Any] = {"offload_policy": CPUOffloadPolicy() if sharding.offload else OffloadPolicy()}
    for module in experts:
        assert meshes.experts is not None, "experts are spread over a mesh of theirs"
        for child in module.children():
            fully_shard(child, mesh=along, mp_policy=policy, reshard_after_forward=free, **common)
        over = sharding_mesh(meshes.experts)
        fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=free, **common)
    units = units_of(blocks, sharding.blocks_per_unit)
    for place, unit in reversed(list(enumerate(units))):
        # Backward starts with the last unit, so what it would free it would gather again at once.
        frees = free and place < len(units) - 1
        whole: Any = unit if len(unit) > 1 else unit[0]
        fully_shard(whole, mesh=along, mp_policy=policy, reshard_after_forward=frees, **common)
    # The head is called after the root's forward, and a tied head reads the embedding: both have to stay whole.
    root_policy = dataclasses.replace(policy, output_dtype=sharding.param_dtype)
    fully_shard(model, mesh=along, mp_policy=root_policy, reshard_after_forward=False, **common)
    if sharding.prefetch:
        _gather_ahead(model, units, sharding.prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum that is divided once by the global token count, so gradients must not be averaged.
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, and NCCL can skip scaling.
            module.set_force_sum_reduction_for_comms(True)


def units_of(blocks: Mapping[str, nn.Module], size: int) -> list[list[nn.Module]]:
    """Blocks that are gathered together: up to ``size`` that are called one after the other, of the same stack.

    Args:
        blocks: by name, in the order of the forward. Those without parameters are left out, and part their neighbours.
        size: blocks of a unit; the last one of a stack may have fewer.
    """
    units: list[list[nn.Module]] = []
    before: str | None = None
    for name, block in blocks.items():
        stack = name.rpartition(".")[0]
        if next(block.parameters(), None) is None:
            before = None
        elif stack == before and len(units[-1]) < size:
            units[-1].append(block)
        else:
            units.append([block])
            before = stack
    return units


def _gather_ahead(model: nn.Module, units: Sequence[Sequence[nn.Module]], count: int) -> None:
    """Have each unit ask for the weights of the next ``count`` in forward, and of those before it in backward."""
    # Experts are units inside of blocks. Blocks of one unit are one: what is asked for twice is gathered once.
    asked = [[part for block in unit for part in block.modules() if isinstance(part, FSDPModule)] for unit in units]
    for place, unit in enumerate(units):
        first = unit[0]
        assert isinstance(first, FSDPModule), "units are sharded before"
        after = asked[place + 1 : place + 1 + count]
        first.set_modules_to_forward_prefetch([part for parts in after for part in parts])
        ahead = asked[max(0, place - count) : place]
        first.set_modules_to_backward_prefetch([part for parts in reversed(ahead) for part in reversed(parts)])
    assert isinstance(model, FSDPModule), "the root is sharded before"
    model.set_modules_to_forward_prefetch([part for parts in asked[:count] for part in parts])
