"""What a step's gradients are divided by, and whether it counts: decided on the device, unknown to the host."""

from __future__ import annotations

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

    def on(self, device: torch.device) -> Decision:
        """The same on the device of the parameters, which may be offloaded to the CPU."""
        scalars = (self.scale, self.skip)
        if all(value is None or value.device == device for value in scalars):
            return self
        return Decision(*(None if value is None else value.to(device) for value in scalars))

    def count(self, steps: list[Tensor]) -> None:
        """Add a step that counts to scalar tensors, in place."""
        if self.skip is None:
            torch._foreach_add_(steps, 1.0)
        else:
            torch.ops.aten._foreach_add_.Tensor(steps, 1 - self.skip)

    def apply(self, gradients: list[Tensor]) -> None:
        """Divide gradients in place; those of a step that does not count become zero, NaN and infinity included."""
        if self.scale is not None:
            torch.ops.aten._foreach_div_.Tensor(gradients, self.scale)
        if self.skip is None:
            return
        # A product with zero would keep NaN, one of the bits does not.
        bits = [gradient.view(_BITS[gradient.element_size()]) for gradient in gradients]
        multiply(bits, (1 - self.skip).to(bits[0].dtype))


def multiply(tensors: list[Tensor] | tuple[Tensor, ...], factor: Tensor | float) -> None:
    """Multiply in place by a number, or by a scalar tensor without asking for its value."""
    if isinstance(factor, Tensor):
        # torch._foreach_mul_ would take a scalar tensor for a number, and wait for it.
        torch.ops.aten._foreach_mul_.Tensor(tensors, factor)
    else:
        torch._foreach_mul_(tensors, factor)
