"""Fully sharded data parallelism with FSDP2, and the same model unsharded in one process."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from modalities_core.config.deferred import Deferred
from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model, ParallelPlan, World
from modalities_core.training.plan import matching
from modalities_parallel.materialize import fill, materialize, meta_buffers
from modalities_parallel.sharding_settings import Sharding

if TYPE_CHECKING:
    from modalities_parallel.mesh import Degrees, Meshes

log = logging.getLogger("modalities")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fsdp2(
    model: Deferred[Model],
    world: World,
    param_dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    reduce_dtype: Literal["fp32", "bf16"] = "fp32",
    reshard_after_forward: bool | Literal["auto"] = "auto",
    blocks_per_unit: int = 1,
    prefetch: int = 0,
    offload: bool = False,
    stages_per_rank: int = 1,
) -> Model:
    """Build a model, share it out over the ranks of ``world``, and give it its initial values.

    The model is built on the meta device, so no rank ever holds all of it. Each block of its parallel plan is one
    unit; what is left (embedding, final norm, head) is one more, which stays whole between forward and backward so
    that the head can be called after the forward, as often as the loss likes. So does the last unit of blocks, with
    which the backward begins. Gradients are *sums* over the data-parallel ranks. In one process nothing is sharded, and
    bf16 and fp16 mean ``torch.autocast`` around the forward and the head; executor.plain computes bf16 with copies of
    the weights instead, as it is on shards. The weights that the optimizer sees are float32 in every case.

    With dp_replicate N and dp_shard 1 in world.auto this is plain data parallelism, as DistributedDataParallel does it:
    each rank holds the whole model, nothing is gathered, and gradients are reduced once per step.

    Method: ZeRO stage 3 (arXiv:1910.02054) as PyTorch FSDP (arXiv:2304.11277), per-parameter sharding.

    Args:
        model: the model to build and shard.
        world: the ranks to share it between, from world.auto.
        param_dtype: dtype of weights and activations in forward and backward; stored weights stay float32. With fp16
            executor.plain scales the loss so that small gradients do not vanish.
        reduce_dtype: dtype in which gradients are summed over ranks.
        reshard_after_forward: free a block's gathered weights between forward and backward; false trades memory for
            one gather less. auto frees them unless in a pipeline, where every micro batch would gather them again.
        blocks_per_unit: neighbouring blocks gathered and reduced at once; more means fewer and larger messages, and
            more memory.
        prefetch: units gathered ahead of their use, in forward and backward; 0 leaves it to FSDP2, which gathers one
            ahead as far as the host is ahead of the device. 1 or more ask for them at once, which helps where the host
            waits, as with experts spread over ranks.
        offload: keep the shards of weights and gradients in the host's memory, where the optimizer then works; saves
            their memory on the GPU and takes much longer.
        stages_per_rank: of a pipeline, for the schedules of executor.pipeline that interleave several.

    Raises:
        ConfigError: the plan names modules that the model does not have, initial values do not fit its parameters,
            a number is too small, or ``world`` has several ranks without a device mesh.
    """
    if isinstance(model, nn.Module):
        raise ConfigError(
            "parallel.fsdp2 was given a model that is already built",
            hint="give it a function without arguments that builds the model",
            about=(fsdp2, "model"),
        )
    for name, number, least in (("blocks_per_unit", blocks_per_unit, 1), ("prefetch", prefetch, 0)):
        if number < least:
            raise ConfigError(f"{name} is {number}, but has to be at least {least}", about=(fsdp2, name))
    with torch.device("meta"):
        built = cast(nn.Module, model())
    # For whoever has to know in what the model multiplies, as its weights do not tell.
    built.computing_dtype = DTYPES[param_dtype]  # pyrefly: ignore[bad-argument-type]
    without_values = meta_buffers(built)
    meshes: Meshes | None = getattr(world, "meshes", None)
    if meshes is None and world.size > 1 and world.device.type != "meta":
        raise ConfigError(
            f"{type(world).__name__} has {world.size} ranks but no device meshes to shard over",
            hint="use the component world.auto",
            about=(fsdp2, "world"),
        )
    degrees: Degrees | None = getattr(world, "degrees", None if meshes is None else meshes.degrees)
    sharding = Sharding(
        DTYPES[param_dtype],
        DTYPES[reduce_dtype],
        (degrees is None or degrees.pp == 1) if reshard_after_forward == "auto" else reshard_after_forward,
        stages_per_rank,
        blocks_per_unit,
        prefetch,
        offload and _can_offload(world),
    )
    built.sharding = sharding  # pyrefly: ignore[bad-argument-type]
    # Also where nothing is sharded: a wrong plan should not wait for the cluster to be found.
    plan = cast(Model, built).parallel_plan()
    blocks = matching(built, plan.blocks, component=fsdp2)
    if meshes is not None:
        _share_out(built, plan, blocks, meshes, sharding)
    if world.device.type == "meta":
        return cast(Model, built)
    materialize(built, world.device, sharding.offload)
    fill(built, cast(Model, built).initial_values(), without_values)
    if meshes is None and param_dtype != "fp32":
        _autocast(built, built, world.device, DTYPES[param_dtype])
        _autocast(cast(Model, built).head, built, world.device, DTYPES[param_dtype])
    return cast(Model, built)


def _share_out(
    model: nn.Module, plan: ParallelPlan, blocks: dict[str, nn.Module], meshes: Meshes, sharding: Sharding
) -> None:
    """Every parallelism that the mesh asks for, in the one order in which they fit into each other, in place.

    First what is left out on this rank, then what it holds a part of, and around that the sharding, which gathers just
    these parts.
    """
    from modalities_parallel.sharding import shard

    degrees = meshes.degrees
    if degrees.pp > 1:
        from modalities_parallel.pipeline.stages import keep_stages

        keep_stages(model, plan, meshes, sharding.stages_per_rank, component=fsdp2)
        blocks = matching(model, plan.blocks, component=fsdp2)
    if degrees.tp > 1 or degrees.cp > 1:
        from modalities_parallel.tensor.split import split

        split(model, plan, meshes, component=fsdp2)
    experts: list[nn.Module] = []
    if degrees.ep > 1:
        from modalities_parallel.experts import spread

        experts = spread(model, plan, meshes, component=fsdp2)
    shard(model, blocks, experts, meshes, sharding)


def _can_offload(world: World) -> bool:
    """Whether there is anything to move to the host's memory, and FSDP2 to do it; says in the log why not."""
    if world.device.type == "cpu":
        reason = "weights, gradients and optimizer are in the host's memory already"
    elif world.device.type != "meta" and getattr(world, "meshes", None) is None:
        reason = "one process by itself is not sharded; modalities launch --nproc 1 starts one that is"
    else:
        return True
    if world.rank == 0:
        log.warning("parallel.fsdp2: offload changes nothing on this %s: %s", world.device.type, reason)
    return False


def _autocast(module: nn.Module, root: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run the forward of ``module`` under autocast; floating-point output comes in ``dtype``, as from FSDP2.

    Not where the weights of ``root`` are of that dtype already, as while an executor's copies stand in for them.
    """
    forward = module.forward

    @functools.wraps(forward)
    def cast_forward(*arguments: Any, **keywords: Any) -> Any:
        weight = next(root.parameters(), None)
        with torch.autocast(device.type, dtype=dtype, enabled=weight is None or weight.dtype != dtype):
            output = forward(*arguments, **keywords)
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    # So that a loss that computes the head itself knows in which precision.
    cast_forward.autocast_dtype = dtype  # pyrefly: ignore[missing-attribute]
    module.forward = cast_forward
