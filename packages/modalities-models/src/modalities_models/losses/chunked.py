"""The head and the loss over some tokens at a time, so that logits never exist whole.

Where the head is known, each chunk's gradient is taken while its logits are there: one pass over the vocabulary
instead of two, and nothing but the gradients is kept for the backward pass. It costs one copy of the head's weight
in float32, the gradient that the backward pass would need anyway. (The idea is that of Liger Kernel, arXiv:2410.10989,
section 3.2.) Any other head is called, and called again in the backward pass.

Where ranks share a known head by vocabulary (loss parallelism), each takes the logits of its own rows: of a chunk they
tell each other the largest logit and two or three sums per token, and no logits. Each then has the whole value, the
gradient of its rows, and its part of that of the hidden states: these parts add up over the ranks.

Shape suffixes: N tokens, C tokens of one chunk, D hidden size, V vocabulary size or this rank's part of it, R stored
rows of the weight.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from modalities_models.losses.objective import Objective, at_least_float32
from modalities_models.losses.projection import Projection, projection


def chunked(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, weights_N: Tensor | None, objective: Objective, size: int
) -> Tensor:
    """``objective`` summed over N tokens, ``size`` tokens at a time: a scalar, float32 unless the logits are float64.

    Args:
        hidden_ND: (N, D).
        head: (C, D) to logits (C, V).
        targets_N: (N,) int64 in [0, V).
        weights_N: (N,) float32, or None where every target counts 1.
        objective: what is summed.
        size: the most tokens of a chunk.
    """
    known = projection(head, hidden_ND)
    if known is not None and (torch.is_grad_enabled() or known.columns.shard is not None):
        if weights_N is None:
            weights_N = torch.ones(len(targets_N), device=hidden_ND.device)
        if torch.is_grad_enabled():
            value = _GradientsInForward.apply(hidden_ND, known.weight_RD, known, targets_N, weights_N, objective, size)
            assert isinstance(value, Tensor)
            return value
        return _chunks(hidden_ND, known, targets_N, weights_N, objective, size, None, None)

    def summed(hidden_CD: Tensor, targets_C: Tensor, weights_C: Tensor | None) -> Tensor:
        return objective.summed(head(hidden_CD), targets_C, weights_C)

    hidden, targets = hidden_ND.split(size), targets_N.split(size)
    weights = [None] * len(targets) if weights_N is None else weights_N.split(size)
    values: list[Any] = [
        checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden, targets, weights, strict=True)
    ]
    return torch.stack(values).sum()


class _GradientsInForward(torch.autograd.Function):
    """The sum, its gradients computed along with it; the backward pass only multiplies them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_RD: Tensor,
        known: Projection,
        targets_N: Tensor,
        weights_N: Tensor,
        objective: Objective,
        size: int,
    ) -> Tensor:
        """The arguments of ``chunked``; ``weight_RD`` is that of ``known``, given again for autograd to see."""
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        # Sums over many chunks in bfloat16 would lose what the late chunks add.
        summing = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
        hidden_gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        weight_gradient_RD = torch.zeros_like(weight_RD, dtype=summing) if for_weight else None
        value = _chunks(hidden_ND, known, targets_N, weights_N, objective, size, hidden_gradient_ND, weight_gradient_RD)
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_RD)
        ctx.dtypes = hidden_ND.dtype, weight_RD.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Both gradients times that of the sum, in place: they are as large as hidden states and weight."""
        scaled = (
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)


def _chunks(
    hidden_ND: Tensor,
    known: Projection,
    targets_N: Tensor,
    weights_N: Tensor,
    objective: Objective,
    size: int,
    hidden_gradient_ND: Tensor | None,
    weight_gradient_RD: Tensor | None,
) -> Tensor:
    """The sum over all chunks; the gradient of the hidden states is written, that of the weight added, where given."""
    values: list[Tensor] = []
    device = hidden_ND.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        matrix_VD = known.matrix_VD
        for start in range(0, len(targets_N), size):
            part = slice(start, start + size)
            inputs_CD = hidden_ND[part].to(known.dtype)
            if known.multiplier != 1.0:
                inputs_CD = inputs_CD * known.multiplier
            value, gradient_CV = _differentiated(
                inputs_CD, matrix_VD, known, targets_N[part], weights_N[part], objective
            )
            values.append(value)
            if hidden_gradient_ND is not None:
                torch.mul(gradient_CV @ matrix_VD, known.multiplier, out=hidden_gradient_ND[part])
            if weight_gradient_RD is not None:
                _add_product(weight_gradient_RD[: len(matrix_VD)], gradient_CV.T, inputs_CD)
            del gradient_CV  # before the next chunk's logits come
    return torch.stack(values).sum()


def _differentiated(
    inputs_CD: Tensor,
    matrix_VD: Tensor,
    known: Projection,
    targets_C: Tensor,
    weights_C: Tensor,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """The sum over a chunk, and its gradient by the product of both matrices, in their dtype."""
    softcap = known.softcap
    logits_CV = at_least_float32(inputs_CD @ matrix_VD.T)
    slope_CV: Tensor | None = None
    if softcap is not None:
        logits_CV.div_(softcap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(softcap)
    value = objective.differentiate_(logits_CV, targets_C, weights_C.to(logits_CV.dtype), known.columns)
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    return value, logits_CV.to(inputs_CD.dtype)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add the product to ``sum_VD`` in place, without a copy of it where the dtypes allow."""
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD
