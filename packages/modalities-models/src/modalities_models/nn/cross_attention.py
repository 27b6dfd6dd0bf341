"""Attention to another sequence, and what is built of it: pooling by learned queries, and a decoder block.

The matrices lie as in nn/attention.py: ``query`` (heads * F, D), ``key`` and ``value`` (heads * F, C), ``output``
(D, heads * F), head after head.

Shape suffixes: B batch, T tokens, S context tokens, Q learned queries, H heads, F elements of one head, D hidden size,
C context size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_models.architecture import Architecture
from modalities_models.nn.block import Block
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.masks import Mask
from modalities_models.nn.norms import norm


class CrossAttention(nn.Module):
    """Every token sees all of a context (arXiv:1706.03762, section 3.2.3).

    Args:
        hidden_size: D, of the tokens that look.
        context_size: C, of the tokens that are looked at.
        heads: how many.
        head_size: F.
        bias: biases in the four projections.
        dropout: probability of dropping an attention weight in training mode.
    """

    def __init__(
        self, hidden_size: int, context_size: int, heads: int, head_size: int, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, heads * head_size, bias=bias)
        self.key = nn.Linear(context_size, heads * head_size, bias=bias)
        self.value = nn.Linear(context_size, heads * head_size, bias=bias)
        self.output = nn.Linear(heads * head_size, hidden_size, bias=bias)

    def forward(self, hidden_BTD: Tensor, context_BSC: Tensor) -> Tensor:
        """(B, T, D) and (B, S, C) to (B, T, D)."""
        mixed_BHTF = F.scaled_dot_product_attention(
            self._heads(self.query(hidden_BTD)),
            self._heads(self.key(context_BSC)),
            self._heads(self.value(context_BSC)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed_BHTF.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class AttentionPooling(nn.Module):
    """A fixed number of learned queries that each gather from the context what they look for (arXiv:1810.00825).

    Args:
        queries: Q.
        architecture: hidden size, heads, norm, biases and dropout.
        context_size: C.
    """

    def __init__(self, queries: int, architecture: Architecture, context_size: int) -> None:
        super().__init__()
        a = architecture
        self.query_embedding = nn.Parameter(torch.empty(queries, a.hidden_size))
        self.attention = CrossAttention(a.hidden_size, context_size, a.heads, a.head_size, a.bias, a.dropout)
        self.norm = norm(a.norm, a.hidden_size, a.norm_eps, a.bias)

    def forward(self, context_BSC: Tensor) -> Tensor:
        """(B, S, C) to (B, Q, D)."""
        queries_BQD = self.query_embedding.expand(context_BSC.shape[0], -1, -1)
        return self.norm(self.attention(queries_BQD, context_BSC))


class CrossBlock(Block):
    """A block that, between attention and feed-forward, looks at a context.

    Args:
        architecture: of the decoder.
        layer: number of the block, from 0.
        context_size: C.
    """

    def __init__(self, architecture: Architecture, layer: int, context_size: int) -> None:
        super().__init__(architecture, layer)
        a = architecture
        self.cross_attention_norm = norm(a.norm, a.hidden_size, a.norm_eps, a.bias)
        self.cross_attention = CrossAttention(a.hidden_size, context_size, a.heads, a.head_size, a.bias, a.dropout)

    def forward(  # pyrefly: ignore[bad-override]  # it takes a context where the other takes a rotation
        self, hidden_BTD: Tensor, context_BSC: Tensor, mask: Mask, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(B, T, D) and (B, S, C) to (B, T, D); ``mask`` and ``cache`` as for the attention."""
        mixed_BTD = self.attention(self.attention_norm(hidden_BTD), None, mask, cache)
        hidden_BTD = self._added(hidden_BTD, self.attention_output_norm(mixed_BTD))
        seen_BTD = self.cross_attention(self.cross_attention_norm(hidden_BTD), context_BSC)
        hidden_BTD = self._added(hidden_BTD, seen_BTD)
        inner_BTD = self.feedforward(self.feedforward_norm(hidden_BTD))
        return self._added(hidden_BTD, self.feedforward_output_norm(inner_BTD))
