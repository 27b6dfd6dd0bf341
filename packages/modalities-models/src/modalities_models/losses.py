"""Losses: hidden states and the output head to a weighted sum over tokens.

Shape suffixes: B batch, T tokens, N = B * T, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, LossSum

_NO_IGNORED_ID = -(2**62)
"""F.cross_entropy skips targets of -100 by default; masks are weights here, and a wrong id has to be seen."""


class CrossEntropy:
    """Cross entropy in nats, each target times its weight, summed; satisfies ``modalities_core.interfaces.Loss``.

    The log-softmax is float32 whatever the precision of the logits, also under autocast (float64 stays float64).

    Args:
        chunk_tokens: take the head and the loss over this many tokens at a time and recompute each chunk's logits in
            the backward pass, so that logits never exist whole; None takes all at once, which is faster where
            they fit.
    """

    def __init__(self, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens}", about=(self, "chunk_tokens"))
        self.chunk_tokens = chunk_tokens

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro batch and the sum of its weights.

        Args:
            hidden_BTD: (B, T, D) from the model.
            head: (..., D) to logits (..., V).
            batch: its targets, and weights or None where every target counts 1.
        """
        hidden_ND = hidden_BTD.flatten(0, -2)
        targets_N = batch.targets_BT.flatten()
        weights_N = None if batch.weights_BT is None else batch.weights_BT.flatten().float()
        if weights_N is None:
            tokens = torch.full((), targets_N.numel(), dtype=torch.float32, device=hidden_ND.device)
        else:
            tokens = weights_N.sum()
        if self.chunk_tokens is None or self.chunk_tokens >= targets_N.numel():
            return LossSum(summed_cross_entropy(hidden_ND, head, targets_N, weights_N), tokens)
        return LossSum(self._chunked(hidden_ND, head, targets_N, weights_N), tokens)

    def _chunked(self, hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
        size = self.chunk_tokens
        assert size is not None, "only called with a chunk size"
        hidden, targets = hidden_ND.split(size), targets_N.split(size)
        weights = [None] * len(targets) if weights_N is None else weights_N.split(size)
        losses = [
            checkpoint(summed_cross_entropy, h, head, t, w, use_reentrant=False, preserve_rng_state=False)
            for h, t, w in zip(hidden, targets, weights, strict=True)
        ]
        return torch.stack(losses).sum()


def summed_cross_entropy(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Weighted sum of the cross entropies of N tokens, in nats: a scalar, float32 unless the logits are float64.

    Args:
        hidden_ND: (N, D).
        head: (N, D) to logits (N, V).
        targets_N: (N,) int64 in [0, V).
        weights_N: (N,) float32, or None where every target counts 1.
    """
    logits_NV = head(hidden_ND)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if weights_N is None:
        return F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=_NO_IGNORED_ID)
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=_NO_IGNORED_ID)
    return torch.dot(losses_N, weights_N.to(losses_N.dtype))
