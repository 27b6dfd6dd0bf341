"""What all ranks together found in one step, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What all ranks together found in one step.

    loss: sum over tokens in nats, as the tokens are weighted.
    tokens: sum of the weights.
    gradient_norm: 2-norm of the gradient of the mean loss, before clipping.
    bad_ranks: ranks whose own loss is not finite; a bad gradient reaches all ranks and shows in the norm.
    stop: ``preempted``, ``interrupted`` or empty.
    """

    loss: float
    tokens: float
    gradient_norm: float
    bad_ranks: int
    stop: str

    @property
    def mean_loss(self) -> float:
        """Nats per token; NaN where no target counted."""
        return self.loss / self.tokens if self.tokens else math.nan
