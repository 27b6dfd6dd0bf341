"""One matrix product per expert over rows that lie sorted by expert.

On a GPU in bfloat16 this is ``torch.nn.functional.grouped_mm``, one kernel for all experts that reads the group sizes
on the device. Elsewhere it is a loop over the experts on the host that writes each product in its place, hidden in an
operator of its own so that torch.compile traces around it.

Shape suffixes: N rows, E experts, I in features, O out features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16
"""Bytes to which rows have to be aligned for the grouped kernel."""


def grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the transposed matrix of its expert, (N, O); under autocast in its dtype, as ``F.linear``.

    Args:
        rows_NI: all rows of expert 0, then those of expert 1, and so on.
        weight_EOI: one matrix per expert.
        ends_E: int32, where each expert's rows end; rises from expert to expert, the last is N.
    """
    kind = rows_NI.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the meta device has no autocast
        dtype = torch.get_autocast_dtype(kind)
        rows_NI, weight_EOI = rows_NI.to(dtype), weight_EOI.to(dtype)
    if _has_kernel(rows_NI, weight_EOI):
        return F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=ends_E)
    return torch.ops.modalities.grouped_linear(rows_NI, weight_EOI, ends_E)


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    widths = (rows.shape[-1], weight.shape[1])
    return all(width * rows.element_size() % ALIGNMENT == 0 for width in widths)


def _parts(ends_E: Tensor) -> list[tuple[int, int, int]]:
    """Number, first row and end of every expert."""
    ends = ends_E.tolist()
    return list(zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True))


@torch.library.custom_op("modalities::grouped_linear", mutates_args=())
def _forward(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    product_NO = rows_NI.new_empty(rows_NI.shape[0], weight_EOI.shape[1])
    for expert, start, end in _parts(ends_E):
        if end > start:
            torch.mm(rows_NI[start:end], weight_EOI[expert].t(), out=product_NO[start:end])
    return product_NO


@_forward.register_fake
def _(rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return rows_NI.new_empty(rows_NI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("modalities::grouped_linear_backward", mutates_args=())
def _backward(gradient_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    gradient_NO = gradient_NO.contiguous()
    of_rows, of_weight = torch.empty_like(rows_NI), torch.empty_like(weight_EOI)
    for expert, start, end in _parts(ends_E):
        if end == start:
            of_weight[expert].zero_()
            continue
        torch.mm(gradient_NO[start:end], weight_EOI[expert], out=of_rows[start:end])
        torch.mm(gradient_NO[start:end].t(), rows_NI[start:end], out=of_weight[expert])
    return of_rows, of_weight


@_backward.register_fake
def _(gradient_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_NI), torch.empty_like(weight_EOI)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.modalities.grouped_linear_backward(gradient_NO, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_keep)
