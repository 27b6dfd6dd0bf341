"""The part each parameter of a model plays, read from its name."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from modalities_models.initialization import Kind, Role
from modalities_models.nn.norms import RMSNorm

RESIDUAL = ("attention.output", "feedforward.down", "feedforward.shared.down")
"""How names of projections end whose output is added to the residual stream."""
ROUTER = ("feedforward.router", "feedforward.shared_gate")
"""How names of products end that route or gate."""


def roles(module: nn.Module) -> dict[str, tuple[tuple[int, ...], Role]]:
    """Whole shape and role of every parameter of ``module``, by name; taken before anything shards it."""
    return {name: (tuple(value.shape), _role(module, name)) for name, value in module.named_parameters()}


def matmul_parameters(module: nn.Module) -> int:
    """Weights of ``module`` that multiply activations: those of its linear layers, without biases."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@torch.no_grad()
def fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Copy a whole value into the parameter ``name``."""
    module.get_parameter(name).copy_(value)


def _role(module: nn.Module, name: str) -> Role:
    owner, _, leaf = name.rpartition(".")
    layer, layers = _place(module, owner)
    if leaf == "bias":
        return Role("bias", layer, layers)
    if isinstance(module.get_submodule(owner), RMSNorm | nn.LayerNorm):
        return Role("scale", layer, layers)
    return Role(_kind(owner, leaf, inside=layer > 0), layer, layers)


def _kind(owner: str, leaf: str, inside: bool) -> Kind:
    if leaf == "position_embedding" or owner.endswith("positions"):
        return "position"
    if leaf.endswith("_embedding") or owner.endswith("embedding"):
        return "embedding"
    if owner.endswith("head"):
        return "head"
    # Experts are parameters themselves, other projections are modules with a weight.
    part = owner if leaf == "weight" else f"{owner}.{leaf}"
    if inside and part.endswith(ROUTER):
        return "router"
    return "residual" if inside and part.endswith(RESIDUAL) else "projection"


def _place(module: nn.Module, owner: str) -> tuple[int, int]:
    """The number of the block, from 1, and how many its stack has; 0 outside of blocks."""
    found = re.match(r"(.*blocks)\.(\d+)\.", owner + ".")
    if found is None:
        return 0, 0
    stack = module.get_submodule(found[1])
    assert isinstance(stack, nn.ModuleList)
    return int(found[2]) + 1, len(stack)
