"""Which heads a loss may compute itself, piece by piece, instead of calling them.

Shape suffixes: D hidden size, V vocabulary size, R stored rows of the weight, at least V, or this rank's of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from modalities_core.interfaces import VocabularyShard
from modalities_models.head import Head
from modalities_models.losses.vocabulary import Columns


class Projection(NamedTuple):
    """What a head does: logits z = multiplier * hidden @ weight[:vocab_size].T, then softcap * tanh(z / softcap).

    weight_RD: the parameter, whole, on this device; or this rank's rows of it.
    columns: which ids its rows are, as far as they are no padding.
    multiplier: factor on the logits, before the soft cap.
    softcap: None leaves the logits as they are.
    dtype: of both factors of the product.
    """

    weight_RD: Tensor
    columns: Columns
    multiplier: float
    softcap: float | None
    dtype: torch.dtype

    @property
    def matrix_VD(self) -> Tensor:
        """The rows that are ids, in the dtype of the product."""
        return self.weight_RD[: self.columns.of(len(self.weight_RD))].to(self.dtype)


def vocabulary_shard(head: nn.Module) -> VocabularyShard | None:
    """This rank's part of a head that ranks share; None where it is whole."""
    return getattr(head, "vocabulary_shard", None)


def projection(head: nn.Module, hidden: Tensor) -> Projection | None:
    """What ``head`` computes, or None where only calling it tells.

    Known are ``Head`` and ``nn.Linear`` without bias, sharded or not as long as their weight is whole now, or this
    rank's rows of it under a ``VocabularyShard``. A subclass with a forward of its own (low precision, adapters), hooks
    or a replaced ``forward`` make a head unknown, except a ``forward`` that says what it adds by an attribute:
    ``autocast_dtype``, or ``gathers_vocabulary`` where it only gathers the logits of the other ranks.

    Args:
        head: the output head.
        hidden: what it is about to be given; decides the precision as it would for ``F.linear``.
    """
    forward = _written_forward(head)
    known = isinstance(head, Head) and forward is Head.forward
    known |= isinstance(head, nn.Linear) and forward is nn.Linear.forward and head.bias is None
    if not known or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    own = head.__dict__.get("forward")
    autocast: torch.dtype | None = getattr(own, "autocast_dtype", None)
    if own is not None and autocast is None and not _only_gathers(own):
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
    shard = vocabulary_shard(head)
    if isinstance(head, Head):
        return Projection(weight, Columns(head.vocab_size, shard), head.multiplier, head.softcap, dtype)
    rows = weight.shape[0] if shard is None else cast(nn.Linear, head).out_features
    return Projection(weight, Columns(rows, shard), 1.0, None, dtype)


def _written_forward(head: nn.Module) -> Any:
    """The forward of the head's class below those that only gather."""
    written = (vars(kind)["forward"] for kind in type(head).__mro__ if "forward" in vars(kind))
    return next(forward for forward in written if not _only_gathers(forward))


def _only_gathers(forward: Any) -> bool:
    return getattr(forward, "gathers_vocabulary", False)
