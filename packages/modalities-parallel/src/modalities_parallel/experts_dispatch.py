"""The way of rows to the ranks of their experts, and back.

Shape suffixes: R rows of this rank's tokens, S rows of all ranks' tokens for this rank's experts, D hidden size,
E experts of all ranks, e experts of one rank, P ranks that share the experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Arrangement(NamedTuple):
    """Which rows come from where.

    sent: rows to each rank; they lie in the order of the experts, so in that of the ranks.
    received: rows from each rank, each rank's in the order of the experts; S in all.
    order_S: takes them into the order of the experts, and within an expert of the ranks.
    place_S: undoes that.
    ends_e: int32, where then the rows of each of this rank's experts end.
    group: the ranks.
    """

    sent: list[int]
    received: list[int]
    order_S: Tensor
    place_S: Tensor
    ends_e: Tensor
    group: dist.ProcessGroup


def arrangement(ends_E: Tensor, group: dist.ProcessGroup) -> Arrangement:
    """Let the ranks tell each other how many rows they have for whom; the host waits for the device once.

    Args:
        ends_E: where the rows of each expert of all ranks end among those of this rank.
        group: the ranks, each with an equal part of the experts.
    """
    ranks = group.size()
    counts_Pe = ends_E.long().diff(prepend=ends_E.new_zeros(1).long()).view(ranks, -1)
    arriving_Pe = torch.empty_like(counts_Pe)
    dist.all_to_all_single(arriving_Pe, counts_Pe, group=group)
    sent, received = torch.stack([counts_Pe.sum(1), arriving_Pe.sum(1)]).tolist()
    # Starts of each rank's rows of each expert, as they arrive and as they are taken.
    arriving_eP = arriving_Pe.T.contiguous()
    from_Pe, to_eP = _starts(arriving_Pe), _starts(arriving_eP)
    rows_S = torch.arange(sum(received), device=ends_E.device)
    shifts_eP = from_Pe.T - to_eP
    order_S = rows_S + _repeated(shifts_eP, arriving_eP, len(rows_S))
    place_S = rows_S - _repeated(shifts_eP.T, arriving_Pe, len(rows_S))
    ends_e = arriving_Pe.sum(0).cumsum(0).int()
    return Arrangement(sent, received, order_S, place_S, ends_e, group)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """The next ``sent[i]`` rows to rank i of the group, and ``received[i]`` from it, in that order."""
    return cast(Tensor, _Exchange.apply(rows, sent, received, group))


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order; ``inverse`` undoes it, so that the gradient need not be scattered."""
    return cast(Tensor, _Permute.apply(rows, order, inverse))


def _starts(counts: Tensor) -> Tensor:
    """How many there are before each."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view_as(counts)


def _repeated(values: Tensor, counts: Tensor, total: int) -> Tensor:
    return torch.repeat_interleave(values.flatten(), counts.flatten(), output_size=total)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = received, sent, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        return _exchanged(grad_outputs[0], *ctx.back), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        (inverse,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, inverse), None, None
