"""Attention by the flash-attn package (arXiv:2307.08691), for half precision on CUDA GPUs.

Documents packed into samples become one long row without padding; how many there are is read from the GPU once per
forward pass.

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head, N documents of a batch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from modalities_models.nn.attention_jobs import Implementation, Job
from modalities_models.nn.masks import Mask

# Looked up once, here: inside a compiled block it could not be.
_INSTALLED = find_spec("flash_attn") is not None
LARGEST_HEAD = 256


def _refusal(job: Job) -> str | None:
    if job.device != "cuda":
        return f"flash-attn needs a CUDA GPU, and this is {job.device}"
    if not _INSTALLED:
        return "flash-attn is not installed (pip install modalities-models[flash])"
    if job.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {str(job.dtype).removeprefix('torch.')}"
    if job.head_size > LARGEST_HEAD:
        return f"flash-attn takes heads of up to {LARGEST_HEAD} elements, not {job.head_size}"
    if job.mask.padding_B is not None:
        return "flash-attn takes no padding"
    if job.scores.softcap is not None and job.dropout:
        return "flash-attn has no dropout together with a soft cap"
    return None


def _attend(query_BHTF: Tensor, key_BHSF: Tensor, value_BHSF: Tensor, job: Job) -> Tensor:
    import flash_attn  # pyrefly: ignore[missing-import]

    scores, causal = job.scores, job.mask.order == "causal"
    options: dict[str, Any] = {
        "dropout_p": job.dropout,
        "softmax_scale": scores.scale,
        "causal": causal,
        # Counted in keys before the query, which is itself one of the window's.
        "window_size": (-1, -1) if job.window is None or not causal else (job.window - 1, 0),
        "softcap": scores.softcap or 0.0,
    }
    query_BTHF, key_BSHF, value_BSHF = (x.transpose(1, 2) for x in (query_BHTF, key_BHSF, value_BHSF))
    if job.mask.segments_BT is None:
        return flash_attn.flash_attn_func(query_BTHF, key_BSHF, value_BSHF, **options).transpose(1, 2)
    ends_N, longest = document_ends(job.mask), query_BHTF.shape[2]
    mixed = flash_attn.flash_attn_varlen_func(
        query_BTHF.flatten(0, 1),
        key_BSHF.flatten(0, 1),
        value_BSHF.flatten(0, 1),
        cu_seqlens_q=ends_N,
        cu_seqlens_k=ends_N,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **options,
    )
    return mixed.unflatten(0, (-1, longest)).transpose(1, 2)


def document_ends(mask: Mask) -> Tensor:
    """(N + 1,) int32: 0 and where each document ends, in the batch's rows laid one after another."""
    return mask.kept("document_ends", lambda: _document_ends(mask.segments_BT))


def _document_ends(segments_BT: Tensor | None) -> Tensor:
    assert segments_BT is not None
    ends_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    ends_BT[:, :-1] = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_N = ends_BT.flatten().nonzero().flatten() + 1
    return torch.nn.functional.pad(ends_N, (1, 0)).to(torch.int32)


def _prepare(job: Job) -> Tensor | None:
    return None if job.mask.segments_BT is None else document_ends(job.mask)


FLASH = Implementation("flash", _refusal, _attend, _prepare)
