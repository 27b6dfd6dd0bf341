"""Causal self-attention with grouped queries (arXiv:2305.13245).

Layout: ``query`` (heads * F, D), ``key`` and ``value`` (key_value_heads * F, D) and ``output`` (D, heads * F) are
separate matrices whose rows (columns for ``output``) hold one head after another, exactly as q_proj, k_proj, v_proj
and o_proj of Hugging Face's Llama and Qwen: conversion is renaming, and a contiguous shard is a set of whole heads.
Query head h reads key-value head h // (heads / key_value_heads).

Shape suffixes: B batch, T new tokens, S all tokens so far, H heads, F elements of one head, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_models.nn.chunked_attention import chunked_causal_attention, suits
from modalities_models.nn.norms import RMSNorm
from modalities_models.nn.rope import Rotation, rotate


class KeyValueCache:
    """Keys and values one block has seen, in memory allocated once.

    Args:
        capacity: the most tokens it holds.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BHTF: Tensor, value_BHTF: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens; give keys and values of all tokens so far, (B, H, S, F) each."""
        if self._keys is None or self._values is None:
            batch, heads, _, size = key_BHTF.shape
            self._keys = key_BHTF.new_empty(batch, heads, self.capacity, size)
            self._values = torch.empty_like(self._keys)
        end = self.length + key_BHTF.shape[2]
        assert end <= self.capacity, "the decoder checks the length of its input"
        self._keys[:, :, self.length : end] = key_BHTF
        self._values[:, :, self.length : end] = value_BHTF
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        hidden_size: D.
        heads: query heads.
        key_value_heads: key and value heads; divides ``heads``.
        head_size: F.
        bias: biases in the four projections.
        query_key_norm_eps: eps of an RMSNorm over each query and key head (arXiv:2505.09388), or None for no norm.
        dropout: probability of dropping an attention weight in training mode.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int,
        head_size: int,
        bias: bool = False,
        query_key_norm_eps: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, heads * head_size, bias=bias)
        self.key = nn.Linear(hidden_size, key_value_heads * head_size, bias=bias)
        self.value = nn.Linear(hidden_size, key_value_heads * head_size, bias=bias)
        self.output = nn.Linear(heads * head_size, hidden_size, bias=bias)
        normed = query_key_norm_eps is not None
        self.query_norm = RMSNorm(head_size, eps=query_key_norm_eps) if normed else None
        self.key_norm = RMSNorm(head_size, eps=query_key_norm_eps) if normed else None

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: Rotation | None,
        cache: KeyValueCache | None = None,
        mask_B1TT: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D); with a cache the T tokens follow those it holds; a mask says who sees whom."""
        # Heads are counted from the projections' output, which tensor parallelism makes narrower.
        query_BTHF = self.query(hidden_BTD).unflatten(-1, (-1, self.head_size))
        key_BTHF = self.key(hidden_BTD).unflatten(-1, (-1, self.head_size))
        value_BHTF = self.value(hidden_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query_BTHF, key_BTHF = self.query_norm(query_BTHF), self.key_norm(key_BTHF)
        if rotation is not None:
            query_BTHF, key_BTHF = rotate(query_BTHF, rotation), rotate(key_BTHF, rotation)
        query_BHTF, key_BHTF = query_BTHF.transpose(1, 2), key_BTHF.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            key_BHTF, value_BHTF = cache.append(key_BHTF, value_BHTF)
        mixed_BHTF = causal_attention(query_BHTF, key_BHTF, value_BHTF, dropout, mask_B1TT)
        return self.output(mixed_BHTF.transpose(1, 2).flatten(2))


def segment_mask(segments_BT: Tensor) -> Tensor:
    """(B, 1, T, T) booleans: a token sees itself and what stands before it in its own segment."""
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril()[:, None]


def segment_positions(segments_BT: Tensor) -> Tensor:
    """(B, T) int64: each token's distance from the start of its segment."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(starts_BT, places_T, 0).cummax(1).values


def causal_attention(
    query_BHTF: Tensor,
    key_BHSF: Tensor,
    value_BHSF: Tensor,
    dropout: float = 0.0,
    mask_B1TS: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of the last T of S tokens, each to itself and all before it.

    Args:
        query_BHTF: (B, heads, T, F).
        key_BHSF: (B, key-value heads, S, F), S >= T.
        value_BHSF: like ``key_BHSF``.
        dropout: probability of dropping an attention weight.
        mask_B1TS: who sees whom, (B, 1, T, S) booleans; None for all that came before.

    Returns:
        (B, heads, T, F).
    """
    if mask_B1TS is None and suits(query_BHTF, key_BHSF, dropout):
        return chunked_causal_attention(query_BHTF, key_BHSF, value_BHSF)
    new, total = query_BHTF.shape[2], key_BHSF.shape[2]
    # Branches, not comparisons as values: those would be symbols under torch.compile with changing lengths.
    mask, whole = mask_B1TS, False
    if mask_B1TS is not None:
        pass
    elif new == total:
        whole = True
    elif new > 1:
        mask = torch.ones(new, total, dtype=torch.bool, device=query_BHTF.device).tril(total - new)
    return F.scaled_dot_product_attention(
        query_BHTF,
        key_BHSF,
        value_BHSF,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=whole,
        enable_gqa=query_BHTF.shape[1] != key_BHSF.shape[1],
    )
