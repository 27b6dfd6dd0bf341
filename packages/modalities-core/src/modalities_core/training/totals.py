"""What all ranks together found in one step, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modalities_core.training.signals import stop_state


@dataclass(frozen=True, slots=True)
class StepTotals:
    """The totals of one step over all ranks, the same on each of them.

    loss: sum over tokens in nats, as the tokens are weighted.
    tokens: sum of the weights.
    gradient_norm: of the gradient of the mean loss, before clipping.
    stop: ``preempted``, ``interrupted`` or empty.
    overflowed: the gradient is not finite only because the loss was multiplied by too much for float16.
    frozen: the step changed nothing: neither weights nor the optimizer.
    halted: nor will any later one.
    errors_in_row: steps up to this one, one after the other, whose loss or gradient was not finite; 0 if its was.
    overflows_in_row: likewise for ``overflowed``.
    bad_ranks: ranks whose own loss is not finite; a bad gradient reaches all ranks and shows in the norm.
    """

    loss: float
    tokens: float
    gradient_norm: float
    stop: str = ""
    overflowed: bool = False
    frozen: bool = False
    halted: bool = False
    errors_in_row: int = 0
    overflows_in_row: int = 0
    bad_ranks: tuple[int, ...] = ()

    @property
    def mean_loss(self) -> float:
        """Nats per token; NaN where no target counted."""
        return self.loss / self.tokens if self.tokens else math.nan


def totals_from(record: Sequence[float]) -> StepTotals:
    """Read the numbers in the order in which :class:`~modalities_core.training.verdict.Judge` wrote them."""
    loss, tokens, norm, preempted, interrupted, overflowed, frozen, errors, overflows, halted, *bad = record
    return StepTotals(
        loss=loss,
        tokens=tokens,
        gradient_norm=norm,
        stop=stop_state((preempted, interrupted)),
        overflowed=bool(overflowed),
        frozen=bool(frozen),
        halted=bool(halted),
        errors_in_row=round(errors),
        overflows_in_row=round(overflows),
        bad_ranks=tuple(rank for rank, flag in enumerate(bad) if flag),
    )
