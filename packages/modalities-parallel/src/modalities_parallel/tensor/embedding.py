"""Tables whose rows are split over ranks: each looks up the ids it has, and the sum over ranks is the whole."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from modalities_parallel.tensor.exchange import Axis, add_up

RANKS = "_ranks_of_rows"


class SplitTable:
    """In front of the class of an ``nn.Embedding``, whose ``weight`` is then this rank's rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """What ids of any shape stand for, the same on all ranks."""
        table: Any = self
        rows = table.weight.shape[0]
        tp: Axis = table.__dict__[RANKS]
        own = ids - tp.rank * rows
        elsewhere = (own < 0) | (own >= rows)
        found = cast(Tensor, super().forward(own.masked_fill(elsewhere, 0)))  # pyrefly: ignore[missing-attribute]
        return add_up(found.masked_fill(elsewhere[..., None], 0), tp)


def prepare_table(table: nn.Module, tp: Axis, rows: int) -> None:
    """What a table of ``rows`` rows needs to know to be a ``SplitTable``."""
    table.__dict__[RANKS] = tp
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        own = padding - tp.rank * (rows // tp.size)
        table.padding_idx = own if 0 <= own < rows // tp.size else None  # pyrefly: ignore[bad-argument-type]
