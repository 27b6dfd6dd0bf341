"""Which ids the columns of a matrix of logits belong to: the whole vocabulary, or one rank's part of it.

Where ranks share the head each has some columns of every token's logits. What a loss needs of the others are a few
numbers per token: the largest logit, and sums.

Shape suffixes: N tokens, V columns, S sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modalities_core.interfaces import VocabularyShard


class Columns(NamedTuple):
    """The ids that logits are of.

    vocab_size: of the whole vocabulary.
    shard: the ranks that have the other columns; None where these are all.
    """

    vocab_size: int
    shard: VocabularyShard | None = None

    @property
    def first(self) -> int:
        """The id of the first column."""
        return 0 if self.shard is None else self.shard.first

    def of(self, rows: int) -> int:
        """How many of ``rows`` rows of the head's weight are ids; the others are padding behind the vocabulary."""
        return min(rows, max(self.vocab_size - self.first, 0))

    def largest(self, logits_NV: Tensor) -> Tensor:
        """The largest logit of each token over all ranks, (N, 1)."""
        if self.shard is None:
            return logits_NV.amax(dim=1, keepdim=True)
        lowest_N1 = logits_NV.new_full((len(logits_NV), 1), float("-inf"))
        return self.shard.max_(logits_NV.amax(dim=1, keepdim=True) if logits_NV.shape[1] else lowest_N1)

    def add_up(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each of these sums over own columns, (N, 1), over all ranks; one reduction."""
        return sums if self.shard is None else self.shard.sum_(torch.stack(tuple(sums))).unbind()

    def at(self, values_NV: Tensor, targets_N1: Tensor) -> Tensor:
        """Each token's value in the column of its target, 0 where that is another rank's: (N, 1).

        Raises:
            RuntimeError: a target is outside the whole vocabulary; on a GPU when something waits for it.
        """
        if self.shard is None:
            return values_NV.gather(1, targets_N1)
        # Read for nothing but the check of the index, which asks no device to wait.
        targets_N1.new_zeros(1).expand(self.vocab_size).gather(0, targets_N1[:, 0])
        if not values_NV.shape[1]:
            return values_NV.new_zeros(len(targets_N1), 1)
        places_N1, own_N1 = self._places(targets_N1, values_NV.shape[1])
        return values_NV.gather(1, places_N1).masked_fill_(~own_N1, 0)

    def add_at_(self, values_NV: Tensor, targets_N1: Tensor, amounts_N1: Tensor) -> None:
        """Add to each token's value in the column of its target, where that is one of these."""
        # Not scatter_add_, whose order of additions on a GPU is nobody's promise.
        if self.shard is None:
            values_NV.scatter_(1, targets_N1, values_NV.gather(1, targets_N1) + amounts_N1)
        elif values_NV.shape[1]:
            places_N1, own_N1 = self._places(targets_N1, values_NV.shape[1])
            values_NV.scatter_(1, places_N1, values_NV.gather(1, places_N1) + amounts_N1.masked_fill(~own_N1, 0))

    def _places(self, targets_N1: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """The column of each target, any where it is another rank's, and whether it is one of these."""
        shifted_N1 = targets_N1 - self.first
        places_N1 = shifted_N1.clamp(0, columns - 1)
        return places_N1, places_N1 == shifted_N1
