"""Whether a step may change the weights, decided on the device so that the host need not wait for the answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modalities_core.training.gradients import Reduced
from modalities_core.training.norms import sum_dtype

MOST_OVERFLOWS = 50
"""Overflows in a row that lowering the loss scale may take; halved that often it is far below 1."""

CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


class Verdict(NamedTuple):
    """What becomes of a step, on the device.

    divisor: float32 scalar that turns the gradient of the scaled, summed loss into that of the mean, clipped.
    frozen: float32 scalar, 1 where the step must change nothing.
    overflowed: float32 scalar, 1 where the gradient exceeds float16 though every loss is finite.
    record: (10 + ranks,) numbers for the host, as ``totals_from`` reads them.
    """

    divisor: Tensor
    frozen: Tensor
    overflowed: Tensor
    record: Tensor


class Judge:
    """Judges one step after the other, alike on every rank; never waits for the device.

    Args:
        device: where the sums are.
        patience: steps in a row whose loss or gradient may be bad; at one more, that and all later ones are frozen.
        clip_norm: longest norm of the gradient of the mean loss; None for no limit.
        loss_scale: float32 scalar that the losses are multiplied by before backward, None for 1. It may change in
            place. Where there is one, a gradient that is not finite though every loss is, is an overflow.
    """

    def __init__(
        self, device: torch.device, patience: int, clip_norm: float | None, loss_scale: Tensor | None = None
    ) -> None:
        self._patience = patience
        self._clip_norm = clip_norm
        self._loss_scale = loss_scale
        self._dtype = sum_dtype(device)
        # Errors in a row, overflows in a row, and whether all is over.
        self._state = torch.zeros(3, dtype=self._dtype, device=device)

    def __call__(self, reduced: Reduced) -> Verdict:
        """The verdict on a step of which all ranks know the sums."""
        scaled = self._loss_scale is not None
        tokens = reduced.tokens if self._loss_scale is None else reduced.tokens * self._loss_scale
        none = tokens == 0
        norm = reduced.norm / torch.where(none, 1.0, tokens)
        loss_good = torch.isfinite(reduced.loss)
        bad = ~(torch.isfinite(norm) & loss_good)
        overflow = bad & loss_good if scaled else torch.zeros_like(bad)
        errors = bad & ~overflow if scaled else bad
        in_row = torch.stack((errors, overflow)) * (self._state[:2] + 1)
        over = (in_row[0] > self._patience) | (in_row[1] > MOST_OVERFLOWS) | (self._state[2] > 0)
        frozen = bad | over
        self._state = torch.cat((in_row, over[None]))
        # A step in which no target counts has no mean loss and no gradient.
        divisor = torch.where(none, torch.inf, tokens)
        if self._clip_norm is not None:
            divisor = divisor / (self._clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        measures = torch.stack((reduced.loss, reduced.tokens, norm))
        flags = torch.stack((overflow, frozen))
        record = torch.cat((measures, reduced.flags, flags, self._state, reduced.bad_ranks))
        return Verdict(divisor.float(), frozen.float(), overflow.float(), record)

    def restore(self, errors_in_row: int, overflows_in_row: int) -> None:
        """Go on counting from a checkpoint."""
        state = torch.tensor([errors_in_row, overflows_in_row, 0], dtype=self._dtype)
        self._state = state.to(self._state.device)
