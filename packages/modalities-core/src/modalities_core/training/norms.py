"""Norms of gradients in shares that can be added up over the ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over tokens and ranks: float64, but float32 on Apple's GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def norm_share(gradients: Iterable[Tensor], order: float, device: torch.device) -> Tensor:
    """What ``gradients`` add to the norm of all: the sum of abs(g) ** order, or the largest abs(g) for infinity.

    Args:
        gradients: of any shape and dtype, none of them sharded; empty ones add nothing.
        order: 1, 2 or infinity.
        device: of the result.

    Returns:
        A scalar of :func:`sum_dtype`; the host does not wait for it. NaN where any gradient is.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if gradient.numel():
            by_dtype[gradient.dtype].append(gradient)
    wide = sum_dtype(device)
    norms = []
    for dtype, group in by_dtype.items():
        # In half precision the norms themselves would be rounded to three digits.
        norms += torch._foreach_norm(group, order, dtype=torch.float32 if dtype in NARROW else None)
    if not norms:
        return torch.zeros((), dtype=wide, device=device)
    stacked = torch.stack([norm.to(wide) for norm in norms]) if len(by_dtype) > 1 else torch.stack(norms).to(wide)
    if math.isinf(order):
        return stacked.amax()
    return (stacked if order == 1 else stacked.square()).sum()
