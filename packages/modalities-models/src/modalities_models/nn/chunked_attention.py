"""Attention on the CPU by batched matrix products over chunks of queries, each with the keys it can see.

A chunk of queries meets only the keys from the start of its window to its own end, so nearly half of the products of
a causal mask are never taken, and of a window far shorter than the sequence nearly all; each product runs on the
processor's matrix units. Query heads that share a key head are one longer chunk. The attention weights are kept for
the backward pass where that is little memory, and made again from query and key where it is not.

Shape suffixes: B batch, K key-value heads, R query heads of each, H = K * R, T tokens, F elements of one head,
C queries of a chunk, Q = R * C, S keys the chunk meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_CHUNK = 128
SMALLEST_WINDOWED_CHUNK = 64
MOST_CHUNKS = 8
PIECE_BYTES = 2 << 20
"""Attention weights of a chunk that one thread works on at a time: what stays in its cache from product to softmax to
product. 8 x 6 heads of 64, 512 tokens in bfloat16, one core: 59 ms forward and backward in pieces, 86 without."""
MOST_KEPT = 640
"""Attention weights per query and head that are kept for the backward pass, 2.5 kB in float32."""


class Chunk(NamedTuple):
    """Queries from ``start`` to ``end`` and keys from ``first`` to ``end``."""

    start: int
    end: int
    first: int


def chunk_size(length: int, window: int | None = None) -> int:
    """Queries of a chunk; with a window no more than it, so that they meet at most twice as many keys."""
    size = max(SMALLEST_CHUNK, -(-length // MOST_CHUNKS))
    return size if window is None else max(SMALLEST_WINDOWED_CHUNK, min(size, window))


def chunks(length: int, window: int | None, size: int) -> list[Chunk]:
    """The chunks of a sequence, in order, the last perhaps smaller."""
    starts = range(0, length, size)
    return [
        Chunk(start, min(start + size, length), 0 if window is None else max(0, start - window + 1)) for start in starts
    ]


def pieces(batch: int, heads: int, head_bytes: int) -> list[tuple[slice, slice]]:
    """Samples and key-value heads to take at a time: some samples, or where one is too much some heads of it.

    Args:
        batch: number of samples.
        heads: key-value heads of each.
        head_bytes: what the attention weights of one of them take.
    """
    most = max(1, torch.get_num_threads() * PIECE_BYTES // max(1, head_bytes))
    if most >= heads:
        rows = most // max(1, heads)
        return [(slice(row, row + rows), slice(None)) for row in range(0, batch, rows)]
    return [(slice(row, row + 1), slice(head, head + most)) for row in range(batch) for head in range(0, heads, most)]


def weights_per_query(length: int, window: int | None = None) -> int:
    """Attention weights made for each query and head, rounded down."""
    parts = chunks(length, window, chunk_size(length, window))
    return sum((end - start) * (end - first) for start, end, first in parts) // length


def chunked_attention(
    query_BHTF: Tensor,
    key_BKTF: Tensor,
    value_BKTF: Tensor,
    hidden_BTT: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(softcap(scale * query key^T)) value, each token attending to itself and what came before it.

    Args:
        query_BHTF: (B, heads, T, F).
        key_BKTF: (B, key-value heads, T, F), heads a multiple of key-value heads.
        value_BKTF: like ``key_BKTF``.
        hidden_BTT: (B, T, T) booleans, which keys a query does not see, the window and later ones among them; None
            hides these alone.
        window: how many tokens a token sees, itself included; None is all.
        scale: factor on the products; None is F ** -0.5.
        softcap: scores s become softcap * tanh(s / softcap); None leaves them.

    Returns:
        (B, heads, T, F), contiguous.
    """
    scale = query_BHTF.shape[-1] ** -0.5 if scale is None else scale
    scaled_BKRTF = (query_BHTF * scale).unflatten(1, (key_BKTF.shape[1], -1)).contiguous()
    size = chunk_size(query_BHTF.shape[2], window)
    needed = query_BHTF.requires_grad or key_BKTF.requires_grad or value_BKTF.requires_grad
    keep = needed and weights_per_query(query_BHTF.shape[2], window) <= MOST_KEPT
    # The first call of an operator loads torch's compiler, which reading alone need not wait for.
    attention = _attention if needed or torch.compiler.is_compiling() else _mixed
    mixed_BKRTF, _ = attention(
        scaled_BKRTF, key_BKTF.contiguous(), value_BKTF.contiguous(), hidden_BTT, window, softcap, size, keep
    )
    return mixed_BKRTF.flatten(1, 2)


def _weights(
    scaled_BKRTF: Tensor,
    key_BKTF: Tensor,
    hidden_BTT: Tensor | None,
    chunk: Chunk,
    window: int | None,
    softcap: float | None,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """Attention weights of a chunk, (B, K, Q, S), and, where scores are capped, the tanh their gradient needs.

    They are written into ``out`` where it is given.
    """
    start, end, first = chunk
    scores_BKQS = scaled_BKRTF[:, :, :, start:end].flatten(2, 3) @ key_BKTF[:, :, first:end].transpose(-1, -2)
    tanh_BKQS = None
    if softcap is not None:
        tanh_BKQS = torch.tanh(scores_BKQS.div_(softcap), out=out[1] if out else None)
        scores_BKQS = tanh_BKQS * softcap
    scores_BKRCS = scores_BKQS.unflatten(2, (-1, end - start))
    if hidden_BTT is not None:
        scores_BKRCS.masked_fill_(hidden_BTT[:, None, None, start:end, first:end], float("-inf"))
    else:
        _hide(scores_BKRCS, chunk, window)
    return torch.softmax(scores_BKQS, -1, out=out[0] if out else None), tanh_BKQS


def _hide(scores_BKRCS: Tensor, chunk: Chunk, window: int | None) -> None:
    """Put -inf where a key is later than the query, or out of its window."""
    start, end, first = chunk
    later_CC = torch.ones(end - start, end - start, dtype=torch.bool, device=scores_BKRCS.device).triu_(1)
    scores_BKRCS[..., start - first :].masked_fill_(later_CC, float("-inf"))
    if window is not None and end - first > window:
        # Query start + r does not see key first + c where their distance, start - first + r - c, is window or more.
        columns = end - first - window
        before = torch.ones(end - start, columns, dtype=torch.bool, device=scores_BKRCS.device)
        before.tril_(start - first - window)
        scores_BKRCS[..., :columns].masked_fill_(before, float("-inf"))


def _mixed(
    scaled: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    window: int | None,
    softcap: float | None,
    size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """What attention mixes, (B, K, R, T, F), and what is kept of each chunk; the first three are contiguous."""
    mixed = torch.empty_like(scaled)
    kept = _kept(scaled, window, softcap, size) if keep else []
    each = 1 if softcap is None else 2
    for piece in _pieces(scaled, window, size):
        queries, keys, values = scaled[piece], key[piece], value[piece]
        for number, chunk in enumerate(chunks(scaled.shape[3], window, size)):
            start, end, first = chunk
            out = [tensor[piece] for tensor in kept[each * number : each * (number + 1)]]
            weights_BKQS, _ = _weights(queries, keys, _of(hidden, piece), chunk, window, softcap, out)
            mixed_BKQF = weights_BKQS @ values[:, :, first:end]
            mixed[piece][:, :, :, start:end] = mixed_BKQF.unflatten(2, (-1, end - start))
    return mixed, kept


def _kept(scaled: Tensor, window: int | None, softcap: float | None, size: int) -> list[Tensor]:
    """Room for each chunk's weights, (B, K, Q, S), and where scores are capped for the tanh after them."""
    batch, heads, groups, length, _ = scaled.shape
    return [
        scaled.new_empty(batch, heads, groups * (end - start), end - first)
        for start, end, first in chunks(length, window, size)
        for _ in range(1 if softcap is None else 2)
    ]


def _pieces(scaled: Tensor, window: int | None, size: int) -> list[tuple[slice, slice]]:
    batch, heads, groups, length, _ = scaled.shape
    keys = length if window is None else min(length, size + window)
    return pieces(batch, heads, groups * min(size, length) * keys * scaled.element_size())


def _of(hidden_BTT: Tensor | None, piece: tuple[slice, slice]) -> Tensor | None:
    """The samples of a piece, where samples differ."""
    return hidden_BTT if hidden_BTT is None or hidden_BTT.shape[0] == 1 else hidden_BTT[piece[0]]


# Operators of their own, which compilers leave alone: taken apart, a chunk's part of a gradient became a pass over all
# of it, and a block took as long compiled as not. The size of the chunks is an argument because compilers, which keep
# their work between runs, tell graphs apart by the arguments in them.
_attention = torch.library.custom_op("modalities::chunked_attention", _mixed, mutates_args=(), device_types="cpu")


@_attention.register_fake
def _(
    scaled: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    window: int | None,
    softcap: float | None,
    size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(scaled), _kept(scaled, window, softcap, size) if keep else []


@torch.library.custom_op("modalities::chunked_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    gradient: Tensor,
    scaled: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    kept: Sequence[Tensor],
    window: int | None,
    softcap: float | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``scaled``, ``key`` and ``value`` by that of what was mixed."""
    gradient = gradient.contiguous()
    gradients = torch.empty_like(scaled), torch.empty_like(key), torch.empty_like(value)
    for piece in _pieces(scaled, window, size):
        of_piece = gradient[piece], scaled[piece], key[piece], value[piece], _of(hidden, piece)
        parts = _piece_backward(*of_piece, [tensor[piece] for tensor in kept], window, softcap, size)
        for whole, part in zip(gradients, parts, strict=True):
            whole[piece] = part
    return gradients


def _piece_backward(
    gradient: Tensor,
    scaled: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    kept: Sequence[Tensor],
    window: int | None,
    softcap: float | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    scaled_gradient = torch.empty_like(scaled)
    # Summed over chunks in float32, so that more chunks do not mean more rounding.
    key_gradient = torch.zeros_like(key, dtype=torch.promote_types(key.dtype, torch.float32))
    value_gradient = torch.zeros_like(key_gradient)
    for number, chunk in enumerate(chunks(scaled.shape[3], window, size)):
        start, end, first = chunk
        if not kept:
            weights_BKQS, tanh_BKQS = _weights(scaled, key, hidden, chunk, window, softcap)
        elif softcap is None:
            weights_BKQS, tanh_BKQS = kept[number], None
        else:
            weights_BKQS, tanh_BKQS = kept[2 * number], kept[2 * number + 1]
        chunk_BKQF = gradient[:, :, :, start:end].flatten(2, 3)
        value_gradient[:, :, first:end] += weights_BKQS.transpose(-1, -2) @ chunk_BKQF
        weights_gradient = chunk_BKQF @ value[:, :, first:end].transpose(-1, -2)
        scores_gradient = torch.ops.aten._softmax_backward_data(weights_gradient, weights_BKQS, -1, weights_BKQS.dtype)
        if tanh_BKQS is not None:
            scores_gradient = scores_gradient * (1 - tanh_BKQS.square())
        scaled_gradient[:, :, :, start:end] = (scores_gradient @ key[:, :, first:end]).unflatten(2, (-1, end - start))
        key_gradient[:, :, first:end] += scores_gradient.transpose(-1, -2) @ scaled[:, :, :, start:end].flatten(2, 3)
    return scaled_gradient, key_gradient, value_gradient


@_attention_backward.register_fake
def _(
    gradient: Tensor,
    scaled: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    kept: Sequence[Tensor],
    window: int | None,
    softcap: float | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(scaled), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    scaled, key, value, hidden, ctx.window, ctx.softcap, ctx.size, _ = inputs
    ctx.save_for_backward(scaled, key, value, hidden, *output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    scaled, key, value, hidden, *kept = ctx.saved_tensors
    gradients = _attention_backward(gradient, scaled, key, value, hidden, kept, ctx.window, ctx.softcap, ctx.size)
    return *gradients, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
