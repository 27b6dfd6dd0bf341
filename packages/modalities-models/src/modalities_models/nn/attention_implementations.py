"""Which implementation computes attention: the one that is named, or the fastest that can.

What ``auto`` takes. On the CPU: chunks where they were measured to be faster, else torch's own
scaled_dot_product_attention, else the plain definition. On GPUs: scaled_dot_product_attention, which has cuDNN's and
its own flash kernels below, for full causal and bidirectional attention and after a cache; otherwise flash-attn where
it is installed and FlexAttention where not, but for documents FlexAttention first, as flash-attn has to read their
number from the GPU.

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture
from modalities_models.nn.attention_flash import FLASH
from modalities_models.nn.attention_flex import FLEX
from modalities_models.nn.attention_jobs import Implementation, Job, Scores
from modalities_models.nn.attention_torch import CHUNKED, PLAIN, SDPA
from modalities_models.nn.masks import Mask

log = logging.getLogger("modalities")

NAMED = {"sdpa": SDPA, "flash": FLASH, "flex": FLEX}
_announced: set[str] = set()


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

    Raises:
        ConfigError: gradients are wanted and the named implementation cannot do it.
    """
    gradient = query_BHTF.requires_grad or key_BHSF.requires_grad or value_BHSF.requires_grad
    job = Job(mask, scores, dropout, query_BHTF.device.type, query_BHTF.dtype, query_BHTF.shape[-1], gradient)
    return choose(job, implementation).attend(query_BHTF, key_BHSF, value_BHSF, job)


def choose(job: Job, name: str = "auto", model: object = None) -> Implementation:
    """The implementation called ``name`` if it can do the job, or the fastest that can.

    Without gradients, as in evaluation, generation and export, one that cannot is replaced: a model trained on a GPU
    is also read on machines without one.

    Args:
        job: what is to be computed.
        name: one of architecture.AttentionKind.
        model: whose argument an error is about.

    Raises:
        ConfigError: gradients are wanted and the named implementation cannot do it.
    """
    if name != "auto":
        named = NAMED[name]
        reason = named.refusal(job)
        if reason is None:
            return named
        # On the meta device nothing is computed, so there every machine can stand for the one that will.
        if job.gradient and job.device != "meta":
            raise ConfigError(
                f"attention: {name} cannot be used for {job.kind()}: {reason}",
                hint="attention: auto takes the fastest that can",
                about=(model, "attention"),
            )
    for candidate in _fastest_first(job):
        if candidate.refusal(job) is None:
            return candidate
    return PLAIN


def _fastest_first(job: Job) -> tuple[Implementation, ...]:
    if job.device == "cpu":
        return CHUNKED, SDPA
    if job.bare or job.mask.past or job.device != "cuda":
        return (SDPA,)
    if job.mask.segments_BT is not None:
        return FLEX, FLASH, SDPA
    return FLASH, FLEX, SDPA


def prepare(mask: Mask, architecture: Architecture, hidden_BTD: Tensor, model: nn.Module) -> None:
    """Choose for every window and make what the choices take of the mask, so that no compiled block has to.

    The first use of each choice is logged.

    Args:
        mask: of this forward pass.
        architecture: windows, scale, soft cap, dropout and implementation.
        hidden_BTD: what the first block gets; its device and type, or autocast's, are those of the attention.
        model: whose blocks follow; in training mode dropout is active.

    Raises:
        ConfigError: gradients are wanted and the named implementation cannot do it.
    """
    a, device = architecture, hidden_BTD.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_BTD.dtype
    dropout = a.dropout if model.training else 0.0
    for window in dict.fromkeys(a.attention_windows):
        scores = Scores(window, a.attention_scale, a.attention_softcap)
        job = Job(mask, scores, dropout, device, dtype, a.head_size, torch.is_grad_enabled())
        chosen = choose(job, a.attention, model)
        chosen.prepare(job)
        if not torch.compiler.is_compiling():
            _announce(job, chosen, a.attention)


def _announce(job: Job, chosen: Implementation, name: str) -> None:
    """Log a choice once per process; those for tokens after a cache are left out."""
    if job.mask.past:
        return
    reason = NAMED[name].refusal(job) if name != "auto" else None
    said = f"attention: {chosen.name} for {job.kind()}" + (f" instead of {name}: {reason}" if reason else "")
    if said not in _announced:
        _announced.add(said)
        log.info(said)
