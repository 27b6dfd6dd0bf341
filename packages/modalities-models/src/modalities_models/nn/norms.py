"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) whose scale follows the input's dtype, as under autocast they can differ."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size), same dtype; the mean square is taken in float32 or wider."""
        weight = self.weight.to(x.dtype)
        if _taken_apart(x, weight):
            normed: Any = _RMSNorm.apply(x, weight, self.eps)
            return normed
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def _taken_apart(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would differentiate the norm step by step; GPUs have a kernel, and compilers write their own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return not (hasattr(x, "to_local") or hasattr(weight, "to_local"))


class _RMSNorm(torch.autograd.Function):
    """RMSNorm on the CPU with its gradient in few passes: half of the time, and nothing kept but the input.

    With n = x / sqrt(mean(x^2) + eps) and the gradient g of n * weight, that of x is
    (g * weight - n * mean(g * weight * n)) / sqrt(mean(x^2) + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factors = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factors)
        return (x * factors).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable  # hides the parameter names from type checkers
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        (gradient,) = grad_outputs
        x, weight, factors = ctx.saved_tensors
        wide_weight = weight.to(factors.dtype)
        normed = x * factors
        products = normed * gradient
        weight_gradient = products.reshape(-1, x.shape[-1]).sum(0)
        means = (products @ wide_weight).unsqueeze(-1).div_(x.shape[-1])
        torch.mul(gradient, wide_weight, out=products)
        x_gradient = products.addcmul_(normed, means, value=-1).mul_(factors)
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None


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
