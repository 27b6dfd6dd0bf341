"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) whose scale follows the input's dtype, as under autocast they can differ."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size), same dtype; the mean square is taken in float32 or wider."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm(kind: Literal["rms", "layer"], size: int, eps: float, bias: bool) -> RMSNorm | nn.LayerNorm:
    """A norm with a learned scale over the last dimension of (..., size); dtype in is dtype out.

    Args:
        kind: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450).
        size: elements normalised together.
        eps: added to the mean square or variance.
        bias: whether a LayerNorm also learns an offset; RMSNorm never does.
    """
    if kind == "rms":
        return RMSNorm(size, eps=eps)
    return nn.LayerNorm(size, eps=eps, bias=bias)
