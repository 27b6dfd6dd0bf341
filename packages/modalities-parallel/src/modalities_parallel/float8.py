"""Matrix products of a model's blocks in 8 bits, by torchao."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal, cast

import torch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model, World
from modalities_core.training.parameters import is_sharded
from modalities_core.training.plan import matching

MULTIPLE = 16
CAPABILITY = (8, 9)

log = logging.getLogger("modalities")


def float8(
    model: Model,
    world: World,
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
    emulate: bool = False,
) -> Model:
    """Let the linear layers inside of a model's blocks multiply in float8, forward and backward.

    Inputs, weights and gradients are scaled and rounded to float8 for each product (arXiv:2209.05433) and nothing
    else: weights, their names and checkpoints stay as they are. Layers of sizes that are no multiples of 16, and all
    that lies outside of the blocks, such as the head, stay as well. Give it to parallel.fsdp2 as the model to shard,
    and let executor.plain compile the blocks: without that the roundings cost more than the products save.

    Method: torchao.float8, from the extra ``float8``.

    Args:
        model: changed in place; not sharded yet.
        world: gives the device.
        recipe: one scale per tensor, fastest; one per row, more exact; or one per row with the gradients of weights
            in the model's own precision.
        emulate: round to float8 but multiply in the model's precision, slowly, where the device has no float8.

    Raises:
        ConfigError: torchao is not installed, the device has no float8, the model is sharded already, or none of its
            layers can be changed.
    """
    config = _config(recipe, emulate)
    device = world.device
    if not emulate and device.type != "meta" and (lack := _lack(device)):
        raise ConfigError(
            f"float8 needs a GPU of compute capability 8.9 or later (L40S, H100, B200), {lack}",
            hint="leave precision.float8 out, or set emulate to try it without",
            about=(float8, "world"),
        )
    module = cast(nn.Module, model)
    if is_sharded(module):
        raise ConfigError(
            "precision.float8 was given a model that is sharded already",
            hint="put precision.float8 inside of parallel.fsdp2, as the model that it shards",
            about=(float8, "model"),
        )
    blocks = matching(module, model.parallel_plan().blocks, component=float8)
    # Tensor parallelism splits them later, and what is left of them has to fit.
    degrees = getattr(getattr(world, "meshes", world), "degrees", None)
    multiple = MULTIPLE * (1 if degrees is None else degrees.tp)
    chosen = {id(part) for block in blocks.values() for part in block.modules() if _fits(part, multiple)}
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer in its blocks whose sizes are multiples of {multiple}",
            hint="leave precision.float8 out, or choose such sizes",
            about=(float8, "model"),
        )
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(module, module_filter_fn=lambda part, name: id(part) in chosen, config=config)
    left = sum(isinstance(part, nn.Linear) for part in module.modules()) - len(chosen)
    if world.rank == 0:
        log.info("precision.float8: %d linear layers compute in float8 (%s), %d do not", len(chosen), recipe, left)
    return model


def _config(recipe: str, emulate: bool) -> Any:
    try:
        from torchao.float8 import Float8LinearConfig
    except ImportError as error:
        raise ConfigError(
            "precision.float8 needs the package torchao",
            hint='pip install "modalities-parallel[float8]"',
            about=float8,
        ) from error
    known = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    if recipe not in known:
        raise ConfigError(f"recipe is {' or '.join(known)}, not {recipe!r}", about=(float8, "recipe"))
    return dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


def _lack(device: torch.device) -> str:
    """What of float8 a device lacks; empty where it has it."""
    if device.type != "cuda":
        return f"and this run computes on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return ""


def _fits(module: nn.Module, multiple: int) -> bool:
    return type(module) is nn.Linear and module.in_features % multiple == module.out_features % multiple == 0
