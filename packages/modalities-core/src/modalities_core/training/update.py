"""Optimizer steps that the device itself may refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.interfaces import World
from modalities_core.training.optim.placement import local
from modalities_core.training.verdict import Verdict


class Update:
    """Takes optimizer steps that a verdict may turn into nothing, without asking the device what it says.

    Args:
        optimizer: one that can be handed divisor and refusal as tensors, as torch's fused ones, never waits for the
            device. With any other the host waits once a step.
        module: what is trained. Its persistent buffers stay as they were where a step is refused.
        world: the ranks.
        scaler: of the loss, as in Executor; it hears of every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, world: World, scaler: Any = None) -> None:
        self._optimizer = optimizer
        self._scaler = scaler
        self._parameters = list(module.parameters())
        self._finish_step: Callable[[World], None] | None = getattr(module, "finish_step", None)
        self._world = world
        saved = module.state_dict().keys()
        self._buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
        self._before: list[Tensor] = []

    def before_step(self) -> None:
        """Note what the forward may change."""
        self._before = [buffer.detach().clone() for buffer in self._buffers]

    def __call__(self, verdict: Verdict) -> None:
        """Divide the gradients, update the weights, and give the gradients' memory back."""
        optimizer = self._optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scaled: object = optimizer  # attributes that torch's optimizers look for, but do not declare
            scaled.grad_scale, scaled.found_inf = verdict.divisor, verdict.frozen  # pyrefly: ignore
            try:
                optimizer.step()
            finally:
                del scaled.grad_scale, scaled.found_inf  # pyrefly: ignore
        else:
            self._step_as_told(verdict)
        # Not the optimizer's zero_grad, which leaves alone what the optimizer does not hold.
        for parameter in self._parameters:
            parameter.grad = None
        if self._finish_step is not None:
            self._finish_step(self._world)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(verdict.frozen.bool(), before, buffer))
        if self._scaler is not None:
            self._scaler.update(verdict.overflowed)

    def _step_as_told(self, verdict: Verdict) -> None:
        divisor, frozen = torch.stack((verdict.divisor, verdict.frozen)).tolist()
        if frozen:
            return
        gradients = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, divisor)
        self._optimizer.step()
