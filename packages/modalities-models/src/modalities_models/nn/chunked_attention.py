"""Causal attention for bfloat16 training on the CPU, by batched matrix products over chunks of queries.

A chunk of queries meets only the keys up to its end, so nearly half of the masked products are never taken, and each
product runs on the processor's bfloat16 units. The attention weights of a layer are kept for the backward pass,
which limits the length it is good for.

Shape suffixes: B batch, H heads, T tokens, F elements of one head, C queries of a chunk, S keys up to its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 1024
"""Beyond this the kept weights, B * H * T * T / 2 elements a layer, outgrow what the speed is worth."""
SMALLEST_CHUNK = 64
MOST_CHUNKS = 8


def suits(query_BHTF: Tensor, key_BHTF: Tensor, dropout: float) -> bool:
    """Whether this beats torch's own attention: bfloat16 on the CPU, with gradients, over a short whole sequence."""
    return (
        query_BHTF.device.type == "cpu"
        and query_BHTF.dtype == torch.bfloat16
        and query_BHTF.requires_grad
        and dropout == 0.0
        and query_BHTF.shape[2] == key_BHTF.shape[2]
        and 1 < query_BHTF.shape[2] <= LONGEST
    )


def chunked_causal_attention(query_BHTF: Tensor, key_BHTF: Tensor, value_BHTF: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(F)) value, each token attending to itself and all before it.

    Args:
        query_BHTF: (B, heads, T, F).
        key_BHTF: (B, key-value heads, T, F), heads a multiple of key-value heads.
        value_BHTF: like ``key_BHTF``.

    Returns:
        (B, heads, T, F), contiguous.
    """
    repeats = query_BHTF.shape[1] // key_BHTF.shape[1]
    if repeats > 1:
        key_BHTF, value_BHTF = key_BHTF.repeat_interleave(repeats, 1), value_BHTF.repeat_interleave(repeats, 1)
    return _ChunkedAttention.apply(query_BHTF, key_BHTF, value_BHTF)


def chunk_bounds(length: int) -> list[tuple[int, int]]:
    """First query and end of every chunk of a sequence."""
    size = max(SMALLEST_CHUNK, -(-length // MOST_CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scaled, key, value = query.contiguous() * query.shape[-1] ** -0.5, key.contiguous(), value.contiguous()
        mixed = torch.empty_like(scaled)
        kept = []
        for start, end in chunk_bounds(query.shape[2]):
            scores_BHCS = scaled[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores_BHCS[..., start:].masked_fill_(future, float("-inf"))
            weights_BHCS = scores_BHCS.softmax(-1)
            mixed[:, :, start:end] = weights_BHCS @ value[:, :, :end]
            kept.append(weights_BHCS)
        ctx.save_for_backward(scaled, key, value, *kept)
        return mixed

    @staticmethod
    @once_differentiable  # hides the parameter names from type checkers
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        scaled, key, value, *kept = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        query_gradient = torch.empty_like(scaled)
        # Summed over chunks in float32, so that more chunks do not mean more rounding.
        key_gradient = torch.zeros_like(key, dtype=torch.promote_types(key.dtype, torch.float32))
        value_gradient = torch.zeros_like(key_gradient)
        for (start, end), weights_BHCS in zip(chunk_bounds(scaled.shape[2]), kept, strict=True):
            chunk = gradient[:, :, start:end]
            value_gradient[:, :, :end] += weights_BHCS.transpose(-1, -2) @ chunk
            weights_gradient = chunk @ value[:, :, :end].transpose(-1, -2)
            scores_gradient = torch.ops.aten._softmax_backward_data(
                weights_gradient, weights_BHCS, -1, weights_BHCS.dtype
            )
            query_gradient[:, :, start:end] = scores_gradient @ key[:, :, :end]
            key_gradient[:, :, :end] += scores_gradient.transpose(-1, -2) @ scaled[:, :, start:end]
        query_gradient.mul_(scaled.shape[-1] ** -0.5)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)
