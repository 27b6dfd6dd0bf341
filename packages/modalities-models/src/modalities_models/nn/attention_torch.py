"""Attention by PyTorch alone: scaled_dot_product_attention, chunks on the CPU, and the plain definition.

Which is fastest on the CPU was measured in milliseconds of one core (AVX-512, torch 2.13), forward and backward of 8
heads of 64, torch's own against chunks:
    causal, bfloat16    4 x 512 tokens: 102 to 55;   2 x 1024: 123 to 87;   1 x 2048: 208 to 181;  1 x 4096: 770 to 1008
    causal, float32     4 x 512 tokens: 101 to 73;   2 x 1024: 146 to 123;  1 x 2048: 238 to 274
    window of an eighth, bfloat16   2 x 1024: 215 to 49;  1 x 2048: 348 to 68;  float32: 220 to 69; 424 to 125
    documents, bfloat16             2 x 1024: 214 to 112; 1 x 2048: 368 to 194; float32: 211 to 135; 474 to 347

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modalities_models.nn.attention_jobs import Implementation, Job
from modalities_models.nn.chunked_attention import chunked_attention

LONGEST_BFLOAT16 = 2048
"""Up to this many tokens chunks beat torch's own attention in bfloat16 training without a window."""
LONGEST_FLOAT32 = 1024
"""The same in float32."""
SHORTEST_WIDE = 512
"""From this many tokens on chunks beat torch's own attention in training in wider types."""


def _chunked_refusal(job: Job) -> str | None:
    mask = job.mask
    if job.device != "cpu":
        return "it is made for the CPU"
    if job.dropout:
        return "it has no dropout"
    if mask.order != "causal" or mask.past or mask.new == 1:
        return "it takes whole causal sequences"
    if job.scores.softcap is not None or job.window is not None:
        return None
    if not job.gradient:
        return "it is slower without gradients"
    if job.dtype == torch.bfloat16:
        return None if mask.new <= LONGEST_BFLOAT16 or not job.bare else "it is slower for long sequences"
    slow = job.bare and (job.dtype != torch.float32 or mask.new > LONGEST_FLOAT32)
    return "it is slower in this type" if slow or mask.new < SHORTEST_WIDE else None


def _chunked(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    scores = job.scores
    return chunked_attention(query_BHTF, key_BHSF, value_BHSF, _hidden(job), job.window, scores.scale, scores.softcap)


def _hidden(job: Job) -> Tensor | None:
    return job.mask.hidden(job.scores.window) if job.mask.rows_differ else None


def _sdpa_refusal(job: Job) -> str | None:
    return None if job.scores.softcap is None else "torch's scaled_dot_product_attention has no soft cap"


def _sdpa(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    if job.device == "cpu" and job.mask.order == "causal" and job.mask.new == 1:
        return _one_token(query_BHTF, key_BHSF, value_BHSF, job)
    return F.scaled_dot_product_attention(
        query_BHTF,
        key_BHSF,
        value_BHSF,
        attn_mask=_dense(job),
        dropout_p=job.dropout,
        # A bool by its own branch: as the value of a comparison it would be a symbol under torch.compile.
        is_causal=job.mask.plain_causal(job.scores.window),
        scale=job.scores.scale,
        enable_gqa=query_BHTF.shape[1] != key_BHSF.shape[1],
    )


def _one_token(query_BH1F: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    """One token after a cache: the heads that share keys and values are read as queries of one head.

    The kernel takes several queries at once with matrix products. In microseconds, 8 heads on 4 of 64, 1000 keys, a
    batch of 1: 853 to 134 in bfloat16, 110 to 99 in float32.
    """
    batch, heads, _, size = query_BH1F.shape
    query_BHGF = query_BH1F.reshape(batch, key_BHSF.shape[1], -1, size)
    if query_BHGF.shape[2] == 1 and query_BH1F.dtype == torch.bfloat16:
        # Where none share, the same query twice still takes half the time (8 heads of 64: 853 to 450).
        query_BHGF = query_BHGF.expand(-1, -1, 2, -1)
    mixed_BHGF = F.scaled_dot_product_attention(
        query_BHGF, key_BHSF, value_BHSF, attn_mask=_dense(job), dropout_p=job.dropout, scale=job.scores.scale
    )
    groups = heads // key_BHSF.shape[1]
    return mixed_BHGF[:, :, :groups].reshape(batch, heads, 1, size)


def _dense(job: Job) -> Tensor | None:
    return None if job.bare else job.mask.dense(job.scores.window)


def _plain(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    """The definition, with all scores in memory: serves everything, anywhere."""
    scores = job.scores
    repeats = query_BHTF.shape[1] // key_BHSF.shape[1]
    if repeats > 1:
        key_BHSF, value_BHSF = key_BHSF.repeat_interleave(repeats, 1), value_BHSF.repeat_interleave(repeats, 1)
    scale = job.head_size**-0.5 if scores.scale is None else scores.scale
    scores_BHTS = (query_BHTF * scale) @ key_BHSF.transpose(-1, -2)
    if scores.softcap is not None:
        scores_BHTS = scores.softcap * torch.tanh(scores_BHTS / scores.softcap)
    if (seen := _seen(job)) is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen, float("-inf"))
    weights_BHTS = scores_BHTS.softmax(-1)
    return F.dropout(weights_BHTS, job.dropout) @ value_BHSF


def _seen(job: Job) -> Tensor | None:
    return None if job.mask.hides_nothing(job.scores.window) else job.mask.dense(job.scores.window)


CHUNKED = Implementation("chunks", _chunked_refusal, _chunked, _hidden)
SDPA = Implementation("sdpa", _sdpa_refusal, _sdpa, _dense)
PLAIN = Implementation("plain", lambda job: None, _plain, _seen)
