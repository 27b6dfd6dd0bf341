"""The tensors of a model and its optimizer under names that do not depend on wrappers, groups or ranks.

``model.<parameter or buffer>`` and ``optimizer.<parameter>.<state>``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from modalities_core.errors import CheckpointError
from modalities_core.interfaces import Model
from modalities_core.training.parameters import whole
from modalities_parallel.checkpoint.layout import Layout

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Name parts that torch.compile and activation checkpointing add."""

MODEL = "model."
OPTIMIZER = "optimizer."


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, sharded where the model is; they share memory with the model.

    Raises:
        CheckpointError: the model keeps state that is not a tensor.
    """
    tensors = {}
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model keeps {name!r} as a {type(value).__name__}; only tensors can be saved")
        tensors[MODEL + name] = value
    return tensors


def elsewhere(model: nn.Module, saved: Layout) -> Layout:
    """What other ranks of a pipeline load, as far as this one can tell: they have the parts of the model that it lacks.

    What the optimizers there remember only they know, so that is taken as it was saved.

    Args:
        model: this rank's.
        saved: all tensors of the checkpoint.
    """
    twin = whole(cast(Model, model))
    if twin is model:
        return {}
    names = {_plain(name): value for name, value in twin.state_dict().items() if isinstance(value, Tensor)}
    lacking = names.keys() - {_plain(name) for name in model.state_dict()}
    found: Layout = {
        MODEL + name: (tuple(names[name].shape), str(names[name].dtype).removeprefix("torch.")) for name in lacking
    }
    remembered = (name for name in saved if name.startswith(OPTIMIZER))
    return found | {name: saved[name] for name in remembered if _parameter_of(name) in lacking}


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Each parameter's name without the parts that wrappers add."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the gathered weights are still registered
    return {parameter: _plain(name) for name, parameter in model.named_parameters()}


def optimizer_tensors(names: dict[Tensor, str], optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter; tensors share memory with it, numbers become scalars.

    Raises:
        CheckpointError: it holds parameters that the model does not have, or state that is no tensor or number.
    """
    tensors = {}
    for parameter in _parameters(optimizer):
        if parameter not in names:
            raise CheckpointError(
                "the optimizer holds a parameter that the model does not have",
                hint="build the optimizer from the model that is trained, after it was sharded",
            )
        for key, value in optimizer.state.get(parameter, {}).items():
            assert "." not in key, "a state's name ends the name of its tensor"
            if not isinstance(value, Tensor | bool | int | float):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key!r} of {names[parameter]} as a {type(value).__name__}; "
                    f"only tensors and numbers can be saved"
                )
            tensors[f"{OPTIMIZER}{names[parameter]}.{key}"] = value if isinstance(value, Tensor) else _scalar(value)
    return tensors


def take_numbers(names: dict[Tensor, str], optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put loaded scalars back where the optimizer keeps plain numbers."""
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = tensors[f"{OPTIMIZER}{names[parameter]}.{key}"].item()


@contextmanager
def state_for(names: dict[Tensor, str], optimizer: Optimizer, saved: Iterable[str]) -> Generator[None, None, None]:
    """Make the optimizer remember exactly those parameters that a checkpoint has state for; undone on failure.

    Args:
        names: of the model's parameters.
        optimizer: fresh, or stepped any number of times.
        saved: names of the tensors in the checkpoint.
    """
    before = dict(optimizer.state)
    remembered = {_parameter_of(name) for name in saved if name.startswith(OPTIMIZER)}
    wanted = [parameter for parameter in _parameters(optimizer) if names.get(parameter) in remembered]
    try:
        _initialise(optimizer, [parameter for parameter in wanted if not optimizer.state.get(parameter)])
        for parameter in set(optimizer.state) - set(wanted):
            del optimizer.state[parameter]
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(before)
        raise


def _initialise(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Let the optimizer make its state for ``parameters``, of whatever kind and sharding it chooses.

    Only a step can do that for every optimizer: one without gradients and learning rate, whose every effect the
    checkpoint then overwrites.
    """
    if not parameters:
        return
    gradients = {parameter: parameter.grad for parameter in _parameters(optimizer)}
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        for parameter in gradients:
            parameter.grad = None
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        optimizer.step()
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)


def _plain(name: str) -> str:
    """Without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _parameter_of(name: str) -> str:
    """That a tensor of the optimizer belongs to."""
    return name.removeprefix(OPTIMIZER).rpartition(".")[0]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _scalar(value: bool | int | float) -> Tensor:
    # 64 bits, so that a Python number comes back as it was.
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
