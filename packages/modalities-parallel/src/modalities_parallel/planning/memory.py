"""Bytes that one rank holds, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_parallel.planning.trace import Trace


class Layout(NamedTuple):
    """How a model's tensors lie on the ranks.

    shards: ranks that share one copy of the model.
    replicas: groups that hold one each.
    wrapped: whether FSDP2 gathers weights and reduces gradients.
    param_dtype: of the weights that forward and backward compute with.
    reduce_dtype: of gradients on their way.
    reshard: whether blocks free their gathered weights after the forward.
    """

    shards: int
    replicas: int
    wrapped: bool
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard: bool


class RankMemory(NamedTuple):
    """Bytes on the rank that has the most.

    weights: that the optimizer sees, and buffers.
    gradients: of them, between backward and update.
    optimizer: what it remembers.
    copies: of the weights in the precision of the computation, where the model is not sharded.
    gathered: weights that FSDP2 has whole: the root, the block in use and the next.
    unreduced: gradients that FSDP2 has whole, and what it sends them from; those of all weights where several micro
        batches add up before they are sent.
    activations: held from forward to backward.
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
    blocks: Iterable[nn.Module],
    states: Mapping[Tensor, int],
    traced: Trace,
    layout: Layout,
    accumulation: int,
    weight_dtype: torch.dtype | None = None,
) -> RankMemory:
    """What rank 0 holds at most.

    Args:
        module: the whole model, on the meta device.
        blocks: its units of sharding.
        states: bytes of the whole optimizer state of each trainable parameter.
        traced: of one micro batch.
        layout: of the tensors.
        accumulation: micro batches of a step.
        weight_dtype: in which weights and gradients are stored; None is as they are.
    """
    parameters, shards = list(module.parameters()), layout.shards
    width = {value: (weight_dtype or value.dtype).itemsize for value in parameters}
    weights = sum(width[value] * shared(value, shards) for value in parameters)
    gradients = sum(width[value] * shared(value, shards) for value in parameters if value.requires_grad)
    optimizer = sum(state * shared(value, shards) // max(1, value.numel()) for value, state in states.items())
    buffers = sum(value.numel() * value.element_size() for value in module.buffers())
    copies = gathered = unreduced = 0
    computing = layout.param_dtype.itemsize
    if layout.wrapped:
        sizes = sorted((_elements(block) for block in blocks), reverse=True)
        root = _elements(module) - sum(sizes)
        largest = sizes[0] if sizes else 0
        held = sum(sizes[:2]) if layout.reshard else sum(sizes)
        gathered = computing * (root + held)
        sending = layout.reduce_dtype.itemsize * max(root, largest)
        adding = layout.reduce_dtype.itemsize * _elements(module) if accumulation > 1 else computing * root
        unreduced = adding + computing * largest + sending
    elif computing < min(width.values(), default=0):
        copies = computing * _elements(module)
    return RankMemory(
        weights + buffers,
        gradients,
        optimizer,
        copies,
        gathered,
        unreduced,
        traced.activations,
        traced.loss,
        traced.backward,
    )


def shared(parameter: Tensor, shards: int) -> int:
    """Elements of a parameter on the rank that has the most: FSDP2 deals out whole rows."""
    if shards == 1 or parameter.ndim == 0:
        return parameter.numel()
    rows = parameter.shape[0]
    return -(-rows // shards) * (parameter.numel() // max(1, rows))


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


def _elements(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
