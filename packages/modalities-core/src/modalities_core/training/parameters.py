"""A model's parameters, under the names that wrappers do not change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model

COMPILED_PREFIX = "_orig_mod."


def as_module(model: Model) -> nn.Module:
    """The model as the ``torch.nn.Module`` that it has to be.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model has to be a torch.nn.Module, this is {type(model).__name__}", about=model)
    return model


def whole(model: Model) -> nn.Module:
    """All of the model, on the meta device, where this rank holds only some of its blocks (a pipeline); else itself.

    Such a model has it as ``whole_model``, in a tuple, where ``nn.Module`` does not look. Its names are those of the
    part that is here.
    """
    return getattr(model, "whole_model", (as_module(model),))[0]


def trainable(model: Model) -> dict[str, nn.Parameter]:
    """Parameters that take gradients, each once, by name without the prefix that torch.compile adds."""
    named = as_module(model).named_parameters()
    return {name.replace(COMPILED_PREFIX, ""): value for name, value in named if value.requires_grad}


def parameter_count(model: Model) -> int:
    """Number of parameters over all ranks, trained or not, shared ones counted once."""
    return sum(value.numel() for value in whole(model).parameters())


def on_meta(model: Model) -> bool:
    """Whether any parameter has a shape only and no values."""
    return any(value.is_meta for value in as_module(model).parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks share any of its parameters between them."""
    return any(hasattr(value, "to_local") for value in module.parameters())


def take_dtypes(model: Model, dtypes: Mapping[str, str]) -> None:
    """Give parameters the floating-point dtypes that a checkpoint has them in, so that it can be loaded into them.

    Args:
        model: not sharded; as its configuration builds it, before an executor may have rounded its weights.
        dtypes: name to dtype as torch names it; other names are left alone.
    """
    for name, value in as_module(model).named_parameters():
        dtype = getattr(torch, dtypes.get(name.replace(COMPILED_PREFIX, ""), ""), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and value.is_floating_point():
            value.data = value.data.to(dtype)


def tensor_layout(model: Model) -> dict[str, tuple[list[int], str]]:
    """Name to global shape and dtype of every parameter and persistent buffer of all ranks; dtypes as torch says."""
    module = whole(model)
    saved = module.state_dict().keys()
    named: dict[str, Tensor] = dict(module.named_parameters())
    named |= {name: buffer for name, buffer in module.named_buffers() if name in saved}
    layout = {}
    for name, value in named.items():
        dtype = str(value.dtype).removeprefix("torch.")
        layout[name.replace(COMPILED_PREFIX, "")] = (list(value.shape), dtype)
    return layout
