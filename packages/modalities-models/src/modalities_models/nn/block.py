"""One block of a decoder.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_models.architecture import Architecture
from modalities_models.nn.attention import Attention
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.feedforward import dense
from modalities_models.nn.masks import Mask
from modalities_models.nn.norms import norm
from modalities_models.nn.rope import Rotation


class Block(nn.Module):
    """Attention and feed-forward, each normed before, after or on both sides and added to the residual stream.

    Args:
        architecture: of the whole decoder.
        layer: number of the block, from 0.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.attention_norm = _norm(a, a.norm_placement != "post")
        self.attention = Attention(a, layer)
        self.attention_output_norm = _norm(a, a.norm_placement != "pre")
        self.feedforward_norm = _norm(a, a.norm_placement != "post")
        shape = a.feedforward_shape
        self.feedforward = dense(shape) if a.feedforward is None else a.feedforward.build(shape, layer)
        self.feedforward_output_norm = _norm(a, a.norm_placement != "pre")
        self.multiplier = a.residual_multiplier
        self.dropout = a.dropout

    def forward(
        self, hidden_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D); ``rotation``, ``mask`` and ``cache`` as for the attention."""
        mixed_BTD = self.attention(self.attention_norm(hidden_BTD), rotation, mask, cache)
        hidden_BTD = self._added(hidden_BTD, self.attention_output_norm(mixed_BTD))
        inner_BTD = self.feedforward(self.feedforward_norm(hidden_BTD))
        return self._added(hidden_BTD, self.feedforward_output_norm(inner_BTD))

    def _added(self, hidden: Tensor, update: Tensor) -> Tensor:
        if self.dropout and self.training:
            update = F.dropout(update, self.dropout)
        return torch.add(hidden, update, alpha=self.multiplier)


def _norm(architecture: Architecture, wanted: bool) -> nn.Module:
    """A norm where one is wanted; else nothing, without parameters."""
    a = architecture
    return norm(a.norm, a.hidden_size, a.norm_eps, a.bias) if wanted else nn.Identity()
