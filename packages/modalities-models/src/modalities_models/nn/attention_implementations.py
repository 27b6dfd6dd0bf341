"""The ways attention is computed, and which one serves where.

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modalities_models.nn.chunked_attention import chunked_causal_attention, suits
from modalities_models.nn.masks import Mask


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the product of query and key.

    Args:
        window: how many tokens a token sees, itself included; None is all.
        scale: factor on the product; None is F ** -0.5.
        softcap: scores s become softcap * tanh(s / softcap); None leaves them.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def attend(
    query_BHTF: Tensor,
    key_BHSF: Tensor,
    value_BHSF: Tensor,
    mask: Mask,
    scores: Scores,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """softmax(softcap(scale * query key^T)) value over what the mask shows.

    Args:
        query_BHTF: (B, heads, T, F).
        key_BHSF: (B, key-value heads, S, F), heads a multiple of key-value heads.
        value_BHSF: like ``key_BHSF``.
        mask: who sees whom.
        scores: window, scale and soft cap.
        dropout: probability of dropping an attention weight.
        implementation: one of architecture.AttentionKind.

    Returns:
        (B, heads, T, F).
    """
    plain = mask.plain_causal(scores.window)
    if scores.softcap is not None:
        return plain_attention(query_BHTF, key_BHSF, value_BHSF, mask, scores, dropout)
    if plain and scores.scale is None and suits(query_BHTF, key_BHSF, dropout):
        return chunked_causal_attention(query_BHTF, key_BHSF, value_BHSF)
    return F.scaled_dot_product_attention(
        query_BHTF,
        key_BHSF,
        value_BHSF,
        attn_mask=None if plain or mask.hides_nothing(scores.window) else mask.dense(scores.window),
        dropout_p=dropout,
        is_causal=plain,
        scale=scores.scale,
        enable_gqa=query_BHTF.shape[1] != key_BHSF.shape[1],
    )


def plain_attention(
    query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, mask: Mask, scores: Scores, dropout: float
) -> Tensor:
    """The definition, with all scores in memory: serves everything, anywhere."""
    repeats = query_BHTF.shape[1] // key_BHSF.shape[1]
    if repeats > 1:
        key_BHSF, value_BHSF = key_BHSF.repeat_interleave(repeats, 1), value_BHSF.repeat_interleave(repeats, 1)
    scale = query_BHTF.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    scores_BHTS = (query_BHTF * scale) @ key_BHSF.transpose(-1, -2)
    if scores.softcap is not None:
        scores_BHTS = scores.softcap * torch.tanh(scores_BHTS / scores.softcap)
    if not mask.hides_nothing(scores.window):
        scores_BHTS = scores_BHTS.masked_fill(~mask.dense(scores.window), float("-inf"))
    weights_BHTS = scores_BHTS.softmax(-1)
    return F.dropout(weights_BHTS, dropout) @ value_BHSF
