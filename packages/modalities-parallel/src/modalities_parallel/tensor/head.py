"""An output head whose rows are split over ranks: each has the logits of its own ids (loss parallelism)."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from modalities_parallel.tensor.exchange import Axis, gather_copies


class Shard:
    """This rank's part of the head; see ``modalities_core.interfaces.VocabularyShard``.

    Args:
        tp: the ranks that share the head.
        rows: on each of them.
    """

    def __init__(self, tp: Axis, rows: int) -> None:
        self.tp = tp
        self.first = tp.rank * rows

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share the head, in place; autograd does not see it."""
        dist.all_reduce(values, group=self.tp.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Likewise the largest."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.tp.group)
        return values


class SplitHead:
    """In front of the class of a head, whose ``weight`` is then this rank's rows: called, it gives all logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        head: Any = self
        own = cast(Tensor, super().forward(hidden))  # pyrefly: ignore[missing-attribute]
        logits = gather_copies(own, -1, head.vocabulary_shard.tp)
        # Padding rows are the last.
        return logits[..., : getattr(head, "vocab_size", None)]

    # A loss that takes its own logits may do without this.
    forward.gathers_vocabulary = True  # pyrefly: ignore[missing-attribute]


def can_split(head: nn.Module) -> bool:
    """Whether a head is a product with ``weight`` and something done to each logit: one that says so, or a layer."""
    return hasattr(type(head), "vocabulary_shard") or type(head).forward is nn.Linear.forward
