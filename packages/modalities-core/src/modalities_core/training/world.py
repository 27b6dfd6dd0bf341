"""One process on one device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.norms import norm_share


class Alone:
    """The world of a run with a single process: every reduction is the identity.

    Args:
        device: where the model lives, such as ``cpu``, ``cuda`` or ``cuda:1``; None takes the GPU if there is one.
            Inside ``torch.device("meta")`` it is the meta device, so that a run can be checked without memory.

    Raises:
        ConfigError: the device is unknown or not available on this machine.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank = 0
        self.size = 1
        self.data_rank = 0
        self.data_size = 1
        self.sequence_rank = 0
        self.sequence_size = 1
        self.device = _device(device, self)

    def sum(self, values: Tensor) -> Tensor:
        """``values`` themselves."""
        return values

    def norm_share(self, parameters: Iterable[Tensor], order: float) -> Tensor:
        """Sum of abs(g) ** order over all gradients, for infinity the largest; a scalar, 0 where there are none."""
        gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
        return norm_share(gradients, order, self.device)

    def check(self, model: Model) -> None:
        """Nothing to reduce, nothing to refuse."""

    def broadcast(self, value: Any) -> Any:
        """``value`` itself."""
        return value

    def apart(self) -> Alone:
        """Itself on the CPU, for another thread."""
        return Alone("cpu")

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""


def _device(name: str | None, about: object) -> torch.device:
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        hint = "use cpu, cuda or cuda:N"
        raise ConfigError(f"{name!r} is not a device", hint=hint, about=(about, "device")) from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ConfigError(
                f"device {name!r} is not there: this machine has {found} usable CUDA devices",
                hint="leave device out to take what there is, or set it to cpu",
                about=(about, "device"),
            )
    return device
