"""Self-attention with grouped queries (arXiv:2305.13245).

Layout: ``query`` (heads * F, D), ``key`` and ``value`` (key_value_heads * F, D) and ``output`` (D, heads * F) are
separate matrices whose rows (columns for ``output``) hold one head after another, exactly as q_proj, k_proj, v_proj
and o_proj of Hugging Face's Llama and Qwen: conversion is renaming, and a contiguous shard is a set of whole heads.
Query head h reads key-value head h // (heads / key_value_heads).

Shape suffixes: B batch, T new tokens, S tokens they may see, H heads, F elements of one head, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from modalities_models.architecture import Architecture
from modalities_models.nn.attention_implementations import attend
from modalities_models.nn.attention_jobs import Scores
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.masks import Mask
from modalities_models.nn.norms import RMSNorm
from modalities_models.nn.rope import Rotation, rotate


class Attention(nn.Module):
    """Self-attention of one block.

    Args:
        architecture: heads, biases, norms, windows, scale, soft cap, dropout and implementation.
        layer: number of the block, from 0; decides its window.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        wide, narrow = a.heads * a.head_size, a.key_value_heads * a.head_size
        self.head_size = a.head_size
        self.implementation = a.attention
        self.scores = Scores(a.window(layer), a.attention_scale, a.attention_softcap)
        self.dropout = a.dropout
        self.query = nn.Linear(a.hidden_size, wide, bias=a.has_query_key_value_bias)
        self.key = nn.Linear(a.hidden_size, narrow, bias=a.has_query_key_value_bias)
        self.value = nn.Linear(a.hidden_size, narrow, bias=a.has_query_key_value_bias)
        self.output = nn.Linear(wide, a.hidden_size, bias=a.bias)
        self.query_norm = self.key_norm = None
        if a.query_key_norm == "head":
            self.query_norm, self.key_norm = RMSNorm(a.head_size, a.norm_eps), RMSNorm(a.head_size, a.norm_eps)
        elif a.query_key_norm == "projection":
            self.query_norm, self.key_norm = RMSNorm(wide, a.norm_eps), RMSNorm(narrow, a.norm_eps)
        self.norm_of_heads = a.query_key_norm == "head"

    def forward(
        self, hidden_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D).

        Args:
            hidden_BTD: the tokens.
            rotation: turns queries and keys; None leaves them.
            mask: who sees whom.
            cache: holds the tokens before these, and is extended by them.
        """
        query_BTHF = self._heads(self.query(hidden_BTD), self.query_norm)
        key_BTHF = self._heads(self.key(hidden_BTD), self.key_norm)
        value_BHSF = self.value(hidden_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        if rotation is not None:
            query_BTHF, key_BTHF = rotate(query_BTHF, rotation), rotate(key_BTHF, rotation)
        query_BHTF, key_BHSF = query_BTHF.transpose(1, 2), key_BTHF.transpose(1, 2)
        if cache is not None:
            key_BHSF, value_BHSF = cache.append(key_BHSF, value_BHSF)
        dropout = self.dropout if self.training else 0.0
        mixed_BHTF = attend(query_BHTF, key_BHSF, value_BHSF, mask, self.scores, dropout, self.implementation)
        return self.output(mixed_BHTF.transpose(1, 2).flatten(2))

    def _heads(self, projected_BTP: Tensor, norm: RMSNorm | None) -> Tensor:
        """The heads of a projection, (B, T, H, F), normed one by one or before they are parted."""
        if norm is not None and not self.norm_of_heads:
            projected_BTP = norm(projected_BTP)
        # Heads are counted from the projection's output, which tensor parallelism makes narrower.
        heads_BTHF = projected_BTP.unflatten(-1, (-1, self.head_size))
        return norm(heads_BTHF) if norm is not None and self.norm_of_heads else heads_BTHF
