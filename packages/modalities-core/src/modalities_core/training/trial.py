"""A first run that may fail and leaves no trace where it does."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Trial:
    """What one micro batch changes, noted beforehand: gradients, buffers and random numbers.

    Args:
        module: the model, not sharded.
        device: whose random numbers it draws, beside those of the CPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._cpu_state = torch.get_rng_state()
        self._cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._gradients: list[Tensor | None] = [
            None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()
        ]
        self._buffers = [buffer.clone() for buffer in module.buffers()]

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back."""
        torch.set_rng_state(self._cpu_state)
        if self._cuda_state is not None:
            torch.cuda.set_rng_state(self._cuda_state, self._device)
        for parameter, gradient in zip(self._module.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in zip(self._module.buffers(), self._buffers, strict=True):
            buffer.copy_(value)
