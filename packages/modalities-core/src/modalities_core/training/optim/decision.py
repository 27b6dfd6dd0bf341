"""What a step's gradients are divided by, and whether it counts: decided on the device, unknown to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Decision:
    """The attributes ``grad_scale`` and ``found_inf`` of torch's fused optimizers.

    scale: scalar that gradients are divided by; None for 1.
    skip: float32 scalar, 1 where the step must change nothing; None where it counts.
    """

    scale: Tensor | None = None
    skip: Tensor | None = None

    @property
    def keep(self) -> Tensor | float:
        """1 where the step counts and 0 where not; multiplied into every change."""
        return 1.0 if self.skip is None else 1.0 - self.skip

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients in place; those of a step that does not count become zero, NaN and infinity included."""
        if self.scale is not None:
            torch._foreach_div_(gradients, self.scale)
        if self.skip is None:
            return
        # A product with zero would keep NaN, one of the bits does not.
        bits = [gradient.view(_BITS[gradient.element_size()]) for gradient in gradients]
        torch._foreach_mul_(bits, self.keep.to(bits[0].dtype))  # pyrefly: ignore[missing-attribute]
