"""The factor on an fp16 loss that keeps small gradients from vanishing, adjusted on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError

TARGET = 2.0**16
LARGEST = 2.0**24


class GradientScaler:
    """Dynamic loss scaling (arXiv:1710.03740, section 3.2), as ``torch.amp.GradScaler`` does it for a mean loss.

    ``scale`` is halved after a step whose gradient overflowed and doubled after ``interval`` steps without one.
    Nothing waits for the device. A loss here is a sum over tokens, as large a multiple of the mean as there are
    tokens; ``start`` divides by them, so that gradients begin where those of a mean loss times 2^16 would.

    Args:
        device: where the scale lies.
        initial: scale before ``start`` is told otherwise.
        growth: factor after ``interval`` good steps.
        backoff: factor after an overflow.
        interval: good steps in a row before the scale grows.
        smallest: the scale never falls below it.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        device: torch.device,
        initial: float = TARGET,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        smallest: float = 2.0**-24,
    ) -> None:
        if not (growth > 1 > backoff > 0 and interval >= 1 and 0 < smallest <= initial <= LARGEST):
            raise ConfigError(
                f"a gradient scaler needs growth > 1 > backoff > 0, an interval of at least 1 and smallest <= initial "
                f"<= {LARGEST:g}, not growth {growth}, backoff {backoff}, interval {interval}, smallest {smallest} "
                f"and initial {initial}"
            )
        self.growth = growth
        self.backoff = backoff
        self.interval = interval
        self.smallest = smallest
        self.scale = torch.full((), initial, dtype=torch.float32, device=device)
        """What the loss is multiplied by and gradients have to be divided by: a float32 scalar on the device."""
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._started = False

    def start(self, tokens: int) -> None:
        """Set the scale for a loss that is a sum over about ``tokens``; does nothing after the first call or a restore.

        Args:
            tokens: of one micro batch, the same on all ranks.
        """
        if not self._started:
            self._started = True
            power = math.floor(math.log2(TARGET / max(1, tokens)))
            self.scale.fill_(min(LARGEST, max(self.smallest, 2.0**power)))

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> None:
        """Adjust the scale after a step.

        Args:
            overflowed: scalar on the device, not zero where a gradient was not finite; the same on all ranks.
        """
        bad = overflowed.to(self.scale.device) != 0
        good_steps = torch.where(bad, 0, self._good_steps + 1)
        grow = good_steps >= self.interval
        larger = (self.scale * self.growth).clamp(max=LARGEST)
        smaller = (self.scale * self.backoff).clamp(min=self.smallest)
        self.scale.copy_(torch.where(bad, smaller, torch.where(grow, larger, self.scale)))
        self._good_steps.copy_(torch.where(grow, 0, good_steps))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values; waits for the device."""
        return {"scale": self.scale.item(), "good_steps": int(self._good_steps.item()), "started": self._started}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            CheckpointError: it is no state of a scaler.
        """
        try:
            scale, good_steps, started = float(state["scale"]), int(state["good_steps"]), bool(state["started"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's gradient scaler cannot be read: {error!r}") from error
        if not (0 < scale <= LARGEST and good_steps >= 0):
            raise CheckpointError(f"the checkpoint's gradient scaler has a scale of {scale} after {good_steps} steps")
        self.scale.fill_(scale)
        self._good_steps.fill_(good_steps)
        self._started = started
