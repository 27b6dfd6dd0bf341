"""The ways attention is computed, what each can do, and which one ``auto`` takes where.

On the CPU ``auto`` takes chunks (nn/chunked_attention.py) for windows, documents and soft caps and for training in
bfloat16, and torch's scaled_dot_product_attention for the rest. Measured in CPU milliseconds of one core (AVX-512,
torch 2.13) for forward and backward of 8 heads of 64, torch's against chunks:
    causal, bfloat16    4 x 512 tokens: 120 to 67;   2 x 1024: 137 to 100;  1 x 2048: 221 to 200
    causal, float32     4 x 512 tokens: 112 to 87;   2 x 1024: 163 to 169;  1 x 2048: 294 to 393
    window of an eighth, bfloat16   2 x 1024: 217 to 43;  1 x 2048: 423 to 70;  float32: 237 to 75; 494 to 120
    documents, bfloat16             2 x 1024: 224 to 110; 1 x 2048: 439 to 253; float32: 263 to 186; 497 to 466
FlexAttention on the CPU has no backward pass and is never taken by itself: in float32 it is fast (9.6 ms forward for
4 heads, 1024 tokens and a window of 128, torch's 36.8, after 17 s of compilation), in bfloat16 it is not (210 to 39).

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modalities_models.nn.chunked_attention import chunked_attention
from modalities_models.nn.masks import Mask

LONGEST_BFLOAT16 = 2048
"""Up to this many tokens chunks beat torch's own attention in bfloat16 training without a window."""
SHORTEST_FLOAT32 = 512
"""From this many tokens on chunks beat torch's own attention in training with documents in wider types."""


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


@dataclass(frozen=True, slots=True)
class Job:
    """One attention to compute.

    Args:
        mask: who sees whom.
        scores: window, scale and soft cap.
        dropout: probability of dropping an attention weight.
        device: ``cpu``, ``cuda``, ...
        dtype: of query, key and value.
        head_size: F.
        gradient: whether gradients are wanted.
    """

    mask: Mask
    scores: Scores
    dropout: float
    device: str
    dtype: torch.dtype
    head_size: int
    gradient: bool

    @property
    def bare(self) -> bool:
        """Whether it is full causal or bidirectional attention of plain scores, which needs no mask in memory."""
        return self.scores.softcap is None and (
            self.mask.plain_causal(self.scores.window) or self.mask.hides_nothing(self.scores.window)
        )


@dataclass(frozen=True, slots=True)
class Implementation:
    """A way to compute attention.

    Args:
        name: how logs call it.
        refusal: why it cannot do a job, or None where it can.
        attend: query (B, H, T, F), key and value (B, K, S, F) and the job to (B, H, T, F).
        prepare: makes what it takes of the mask, ahead of the blocks.
    """

    name: str
    refusal: Callable[[Job], str | None]
    attend: Callable[[Tensor, Tensor, Tensor, Job], Tensor]
    prepare: Callable[[Job], object]


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
    gradient = query_BHTF.requires_grad or key_BHSF.requires_grad or value_BHSF.requires_grad
    job = Job(mask, scores, dropout, query_BHTF.device.type, query_BHTF.dtype, query_BHTF.shape[-1], gradient)
    return choose(job).attend(query_BHTF, key_BHSF, value_BHSF, job)


def choose(job: Job) -> Implementation:
    """The fastest implementation for a job."""
    for candidate in (CHUNKED, SDPA):
        if candidate.refusal(job) is None:
            return candidate
    return PLAIN


def _chunked_refusal(job: Job) -> str | None:
    mask, window = job.mask, job.mask.effective(job.scores.window)
    if job.device != "cpu":
        return "made for the CPU"
    if job.dropout:
        return "has no dropout"
    if mask.order != "causal" or mask.past or mask.new == 1:
        return "takes whole causal sequences"
    if job.scores.softcap is not None or window is not None:
        return None
    if not job.gradient:
        return "slower without gradients"
    if job.dtype == torch.bfloat16:
        return None if mask.new <= LONGEST_BFLOAT16 or not job.bare else "slower for long sequences"
    return "slower in this type" if job.bare or mask.new < SHORTEST_FLOAT32 else None


def _chunked(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    hidden, scores = _hidden(job), job.scores
    window = job.mask.effective(scores.window)
    return chunked_attention(query_BHTF, key_BHSF, value_BHSF, hidden, window, scores.scale, scores.softcap)


def _hidden(job: Job) -> Tensor | None:
    return job.mask.hidden(job.scores.window) if job.mask.rows_differ else None


def _sdpa_refusal(job: Job) -> str | None:
    return None if job.scores.softcap is None else "torch's scaled_dot_product_attention has no soft cap"


def _sdpa(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
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


def _dense(job: Job) -> Tensor | None:
    return None if job.bare else job.mask.dense(job.scores.window)


def _dense_or_none(job: Job) -> Tensor | None:
    return None if job.mask.hides_nothing(job.scores.window) else job.mask.dense(job.scores.window)


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
    if (seen := _dense_or_none(job)) is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen, float("-inf"))
    weights_BHTS = scores_BHTS.softmax(-1)
    return F.dropout(weights_BHTS, job.dropout) @ value_BHSF


CHUNKED = Implementation("chunks", _chunked_refusal, _chunked, _hidden)
SDPA = Implementation("sdpa", _sdpa_refusal, _sdpa, _dense)
PLAIN = Implementation("plain", lambda job: None, _plain, _dense_or_none)
