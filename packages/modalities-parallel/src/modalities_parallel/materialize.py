"""From a model on the meta device to one with memory and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.optim.placement import own_part
from modalities_core.training.parameters import whole


def materialize(model: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Give every tensor of ``model`` memory on ``device``; buffers that have values keep them.

    Names that shared one parameter still share one.

    Args:
        model: changed in place.
        device: of the run.
        offload: whether parameters are on the CPU nevertheless.
    """
    first: dict[int, str] = {}
    tied = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }
    values = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device="cpu" if offload else device)
    for name, other in tied.items():
        owner, _, attribute = name.rpartition(".")
        # Not by attribute: where ranks hold parts, that gives the part.
        model.get_submodule(owner)._parameters[attribute] = dict(model.named_parameters())[other]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    for name, value in values.items():
        model.get_buffer(name).copy_(value)


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]], without_values: Iterable[str] = ()) -> None:
    """Copy each whole value into the parameter or buffer of its name, this rank's slice where it is sharded.

    No rank sends anything: all have the same values, so weights do not depend on the number of ranks.

    Args:
        model: has memory already.
        values: names and whole values, of the shapes that the model declares.
        without_values: names of buffers that have no value yet.

    Raises:
        ConfigError: a value is missing, of another shape, or for a name the model does not have. Values of what other
            ranks of a pipeline hold are passed over.
    """
    everything = whole(cast(Model, model))
    elsewhere = {name for name, _ in everything.named_parameters(remove_duplicate=False)}
    elsewhere |= {name for name, _ in everything.named_buffers()}
    targets = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    unfilled = {id(parameter): name for name, parameter in model.named_parameters()}
    unfilled |= {id(targets[name]): name for name in without_values if name in targets}
    kind = type(model).__name__
    for name, value in values:
        target = targets.get(name)
        if target is None and name in elsewhere:
            continue
        if target is None:
            raise ConfigError(f"{kind}.initial_values gives {name!r}, which {kind} does not have")
        if target.shape != value.shape:
            raise ConfigError(
                f"{kind}.initial_values gives {name!r} the shape {tuple(value.shape)}, but it has {tuple(target.shape)}"
            )
        if hasattr(target, "placements"):
            _fill_sharded(target, value)
        else:
            target.copy_(value)
        unfilled.pop(id(target), None)
    if unfilled:
        raise ConfigError(
            f"{kind}.initial_values gives no value for {', '.join(unfilled.values())}",
            hint="it has to yield every parameter, and every buffer that cannot be computed on the meta device",
        )


def _fill_sharded(target: Any, value: Tensor) -> None:
    """Copy this rank's slice of ``value`` into a DTensor."""
    target.to_local().copy_(own_part(value, target))


def meta_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that have no values because they were computed on the meta device."""
    return [name for name, buffer in model.named_buffers() if buffer.is_meta]
