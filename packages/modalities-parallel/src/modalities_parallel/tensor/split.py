"""Tensor and context parallelism applied to a model."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from modalities_core.interfaces import Model, ParallelPlan
from modalities_core.training.parameters import whole
from modalities_parallel.mesh import CONTEXT, TENSOR, Meshes
from modalities_parallel.tensor import regions
from modalities_parallel.tensor.embedding import SplitTable, prepare_table
from modalities_parallel.tensor.exchange import Axis
from modalities_parallel.tensor.head import Shard, SplitHead
from modalities_parallel.tensor.layers import Layers, find_layers
from modalities_parallel.tensor.parameters import distribute, read_parts
from modalities_parallel.tensor.refusals import refuse


def split(model: nn.Module, plan: ParallelPlan, meshes: Meshes, *, component: object = None) -> None:
    """Leave this rank's parts of what ``plan`` names in ``model``, in place.

    Parameters become DTensors of the tensor-parallel ranks, and the modules that own them read plain tensors. Hooks
    gather, sum and exchange tokens between them; see ``regions``. Stages of a pipeline give each rank's own tokens to
    the next one's blocks, and only the last gathers them.

    Args:
        model: on the meta device.
        plan: which layers are split how.
        meshes: the world's.
        component: whose argument ``world`` errors are about.

    Raises:
        ConfigError: the plan does not say what is needed, or sizes do not divide; the message says which.
    """
    everything = whole(cast(Model, model))
    refuse(everything, plan, find_layers(everything, plan, component=component), meshes.degrees, component)
    layers = find_layers(model, plan, absent=everything is not model, component=component)
    tokens = regions.Tokens(Axis.of(meshes.weights, TENSOR), Axis.of(meshes.whole, CONTEXT), component)
    model.register_forward_pre_hook(tokens.begin, with_kwargs=True)
    if layers.first_block is not None:
        layers.first_block.register_forward_pre_hook(regions.enter_blocks(tokens), with_kwargs=True)
    if tokens.tp.size > 1:
        _distribute(model, layers, meshes, tokens)
        _gather_and_sum(model, layers, tokens)
    if tokens.cp.size > 1:
        _exchange_heads(layers, tokens, cast(int, plan.head_size))
    enter, leave = (make(tokens, plan.head_size or 0) for make in (regions.enter_norm, regions.leave_norm))
    for norm in layers.norms.values():
        norm.register_forward_pre_hook(enter)
        norm.register_forward_hook(leave)


def _distribute(model: nn.Module, layers: Layers, meshes: Meshes, tokens: regions.Tokens) -> None:
    """Parameters to parts, and modules to such that read them."""
    mesh = meshes.weights[TENSOR]
    rows = {name: cast(nn.Embedding, table).weight.shape[0] for name, table in layers.embeddings.items()}
    # A parameter under two names stays one.
    parts: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        readings = {}
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            readings[attribute] = reading = layers.readings[prefix + attribute]
            if id(parameter) not in parts:
                parts[id(parameter)] = distribute(parameter, mesh, reading.placement)
            module._parameters[attribute] = parts[id(parameter)]
        if name in layers.embeddings:
            prepare_table(module, tokens.tp, rows[name])
            read_parts(module, readings, tokens.tp.rank, SplitTable)
        elif readings:
            read_parts(module, readings, tokens.tp.rank)
    if layers.head is not None and layers.splits_head:
        head: Any = layers.head
        read_parts(head, {}, tokens.tp.rank, SplitHead)
        head.vocabulary_shard = Shard(tokens.tp, head.weight.shape[0])


def _gather_and_sum(model: nn.Module, layers: Layers, tokens: regions.Tokens) -> None:
    # The same functions for all of them, as blocks that are alike have to have like hooks to be compiled once.
    enter, leave = regions.enter_region(tokens), regions.leave_region(tokens)
    for region in layers.regions.values():
        region.register_forward_pre_hook(enter, with_kwargs=True)
        region.register_forward_hook(leave)
    if layers.head is not None:
        model.register_forward_hook(regions.leave_model(tokens, whole_head=not layers.splits_head))


def _exchange_heads(layers: Layers, tokens: regions.Tokens, head_size: int) -> None:
    to_heads, to_tokens = regions.to_heads(tokens, head_size), regions.to_tokens(tokens)
    for layer in layers.projections.values():
        layer.register_forward_hook(to_heads)
    for layer in layers.outputs.values():
        layer.register_forward_pre_hook(to_tokens)
