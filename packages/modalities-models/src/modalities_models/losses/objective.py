"""What is minimised over one token's logits, and its gradient.

With logits x_1 .. x_V of a token, target y, lse = log(sum_v exp(x_v)), label smoothing e and z-loss factor c:

    loss = (1 - e) * (lse - x_y) + e * (lse - mean_v x_v) + c * lse^2

The first two terms are cross entropy with label smoothing (arXiv:1512.00567, section 7; as in
``torch.nn.functional.cross_entropy``), the third is the z-loss of PaLM (arXiv:2204.02311, section 5).

Shape suffixes: N tokens, V vocabulary size, or this rank's columns of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modalities_models.losses.vocabulary import Columns

NO_IGNORED_ID = -(2**62)
"""F.cross_entropy skips targets of -100 by default; masks are weights here, and a wrong id has to be seen."""


@dataclass(frozen=True)
class Objective:
    """The loss of one token, in nats; the module's docstring has the formula.

    Args:
        label_smoothing: share of the target's probability that is spread evenly over the vocabulary, e.
        z_loss: factor on the squared logarithm of the softmax's normaliser, c.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def summed(self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
        """Weighted sum over tokens: a scalar, float32 unless the logits are float64.

        Args:
            logits_NV: any floating dtype; taken in float32, float64 stays.
            targets_N: int64 in [0, V).
            weights_N: float32, or None where every target counts 1.
        """
        logits_NV = at_least_float32(logits_NV)
        reduction = "none" if weights_N is not None or self.z_loss else "sum"
        losses = F.cross_entropy(
            logits_NV,
            targets_N,
            reduction=reduction,
            ignore_index=NO_IGNORED_ID,
            label_smoothing=self.label_smoothing,
        )
        if self.z_loss:
            losses = losses + self.z_loss * torch.logsumexp(logits_NV, dim=1).square()
        if weights_N is not None:
            return torch.dot(losses, weights_N.to(losses.dtype))
        return losses.sum() if self.z_loss else losses

    def differentiate_(self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, columns: Columns) -> Tensor:
        """The same sum, its gradient written over the logits.

        Args:
            logits_NV: float32 or float64, overwritten with the gradient of the sum.
            targets_N: int64 in [0, vocabulary size).
            weights_N: of the same dtype as the logits.
            columns: the ids that the logits are of. Where ranks have a part each, the sum is the whole one on all of
                them, and they reduce twice.
        """
        targets_N1, weights_N1 = targets_N[:, None], weights_N[:, None]
        share = self.label_smoothing
        # Everything is taken relative to the largest logit: the small differences then keep all their digits.
        largest_N1 = columns.largest(logits_NV)
        shifted_NV = logits_NV.sub_(largest_N1)
        sums = [columns.at(shifted_NV, targets_N1)]
        if share:
            sums.append(shifted_NV.sum(dim=1, keepdim=True))
        exponentials_NV = shifted_NV.exp_()
        sums.append(exponentials_NV.sum(dim=1, keepdim=True))
        target_N1, *every_N1, total_N1 = columns.add_up(sums)
        logarithm_N1 = total_N1.log()
        losses_N1 = target_N1 * (share - 1) + logarithm_N1
        if share:
            losses_N1 -= every_N1[0] * (share / columns.vocab_size)
        factor_N1 = weights_N1 / total_N1
        if self.z_loss:
            normaliser_N1 = logarithm_N1 + largest_N1
            losses_N1 += self.z_loss * normaliser_N1.square()
            factor_N1 = factor_N1 * (1 + 2 * self.z_loss * normaliser_N1)
        gradient_NV = exponentials_NV.mul_(factor_N1)
        if share:
            gradient_NV.sub_(weights_N1 * (share / columns.vocab_size))
        columns.add_at_(gradient_NV, targets_N1, weights_N1 * (share - 1))
        return torch.dot(losses_N1.squeeze(1), weights_N)


def at_least_float32(logits: Tensor) -> Tensor:
    """Float64 as it is, anything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
