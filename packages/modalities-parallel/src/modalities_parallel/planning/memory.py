"""Bytes that one rank holds, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_parallel.planning.layout import Held, Layout, RankPart
from modalities_parallel.planning.split import Share


class RankMemory(NamedTuple):
    """Bytes on the rank that has the most.

    weights: that the optimizer sees, and buffers; offloaded ones are not here.
    gradients: of them, between backward and update.
    optimizer: what it remembers.
    copies: of the weights in the precision of the computation, where the model is not sharded.
    gathered: weights that FSDP2 has whole: the root, the units in use and those gathered ahead.
    unreduced: gradients that FSDP2 has whole, and what it sends them from; those of all weights where several micro
        batches add up before they are sent.
    activations: held from forward to backward, of as many micro batches as a pipeline has under way.
    loss: logits or a chunk of them, and gradients of them.
    backward: what the backward pass holds beyond that.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    gathered: int
    unreduced: int
    activations: int
    loss: int
    backward: int

    @property
    def total(self) -> int:
        """All of it: without the allocator's fragmentation, CUDA's context and the buffers of NCCL."""
        return sum(self)


def rank_memory(
    module: nn.Module,
    part: RankPart,
    states: Mapping[Tensor, int],
    share: Share,
    layout: Layout,
    accumulation: int,
    weight_dtype: torch.dtype | None = None,
) -> RankMemory:
    """What the fullest of the ranks that have ``part`` holds at most.

    Args:
        module: the whole model, on the meta device.
        part: of the model.
        states: bytes of the whole optimizer state of each trainable parameter.
        share: of one micro batch, on such a rank.
        layout: of the tensors.
        accumulation: micro batches of a step.
        weight_dtype: in which weights and gradients are stored; None is as they are.
    """
    stored = stored_bytes(part, states, weight_dtype)
    if layout.offload:
        stored = (0, 0, 0)
    buffers = sum(value.numel() * value.element_size() for value in module.buffers())
    copies = gathered = unreduced = 0
    computing = layout.param_dtype.itemsize
    narrowest = min((_width(one, weight_dtype) for one in part.held), default=0)
    if layout.wrapped:
        sizes = sorted((elements(unit) for unit in part.units), reverse=True)
        root = elements(part.root)
        largest = sizes[0] if sizes else 0
        held = sum(sizes[: 1 + max(1, layout.prefetch)]) if layout.reshard else sum(sizes)
        gathered = computing * (root + held)
        sending = layout.reduce_dtype.itemsize * max(root, largest)
        adding = layout.reduce_dtype.itemsize * elements(part.held) if accumulation > 1 else computing * root
        unreduced = adding + computing * largest + sending
    elif computing < narrowest:
        copies = computing * elements(part.held)
    return RankMemory(
        stored[0] + buffers,
        stored[1],
        stored[2],
        copies,
        gathered,
        unreduced,
        share.activations,
        share.loss,
        share.backward,
    )


def stored_bytes(
    part: RankPart, states: Mapping[Tensor, int], weight_dtype: torch.dtype | None = None
) -> tuple[int, int, int]:
    """Weights, gradients and optimizer states of one rank's shards, wherever they are.

    Args:
        part: of the model.
        states: bytes of the whole optimizer state of each trainable parameter.
        weight_dtype: in which weights and gradients are stored; None is as they are.
    """
    weights = sum(_width(one, weight_dtype) * one.sharded for one in part.held)
    trained = [one for one in part.held if one.parameter.requires_grad]
    gradients = sum(_width(one, weight_dtype) * one.sharded for one in trained)
    optimizer = sum(
        states[one.parameter] * one.sharded // max(1, one.parameter.numel())
        for one in part.held
        if one.parameter in states
    )
    return weights, gradients, optimizer


def elements(unit: Iterable[Held]) -> int:
    """Of a unit of FSDP2 when it is gathered."""
    return sum(one.gathered for one in unit)


def _width(one: Held, weight_dtype: torch.dtype | None) -> int:
    return (weight_dtype or one.parameter.dtype).itemsize


def optimizer_states(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """Bytes that an optimizer remembers of each parameter, found by one step on the meta device.

    Args:
        optimizer: of parameters on the meta device; its state is as before afterwards.

    Raises:
        ConfigError: it cannot make a step there.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    before = {value: value.grad for value in parameters}
    try:
        for value in parameters:
            value.grad = torch.empty_like(value)
        optimizer.step()
        return {value: _state_bytes(optimizer.state[value].values()) for value in parameters}
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot be planned: it makes no step on the meta device ({error})",
            about=optimizer,
        ) from error
    finally:
        optimizer.state.clear()
        for value, gradient in before.items():
            value.grad = gradient


def _state_bytes(values: Iterable[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor) and value.ndim)
