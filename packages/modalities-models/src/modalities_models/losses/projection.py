"""Which heads a loss may compute itself, piece by piece, instead of calling them.

Shape suffixes: D hidden size, V vocabulary size, R stored rows of the weight, at least V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modalities_models.head import Head


class Projection(NamedTuple):
    """What a head does: logits z = multiplier * hidden @ weight[:vocab_size].T, then softcap * tanh(z / softcap).

    weight_RD: the parameter, whole, on this device.
    vocab_size: V.
    multiplier: factor on the logits, before the soft cap.
    softcap: None leaves the logits as they are.
    dtype: of both factors of the product.
    """

    weight_RD: Tensor
    vocab_size: int
    multiplier: float
    softcap: float | None
    dtype: torch.dtype


def projection(head: nn.Module, hidden: Tensor) -> Projection | None:
    """What ``head`` computes, or None where only calling it tells.

    Known are ``Head`` and ``nn.Linear`` without bias, sharded or not as long as their weight is whole now. A subclass
    with a forward of its own (low precision, adapters), hooks or a replaced ``forward`` make a head unknown, except a
    ``forward`` that only adds autocast and says so by its attribute ``autocast_dtype``.

    Args:
        head: the output head.
        hidden: what it is about to be given; decides the precision as it would for ``F.linear``.
    """
    forward = type(head).forward
    known = isinstance(head, Head) and forward is Head.forward
    known |= isinstance(head, nn.Linear) and forward is nn.Linear.forward and head.bias is None
    if not known or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    own = head.__dict__.get("forward")
    autocast: torch.dtype | None = getattr(own, "autocast_dtype", None)
    if own is not None and autocast is None:
        return None
    weight = head.weight
    if not isinstance(weight, Tensor) or hasattr(weight, "to_local"):
        return None  # a shard
    device = hidden.device.type
    if autocast is None and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    dtype = hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast
    if autocast is None and weight.dtype != dtype:
        return None
    if isinstance(head, Head):
        return Projection(weight, head.vocab_size, head.multiplier, head.softcap, dtype)
    return Projection(weight, weight.shape[0], 1.0, None, dtype)
