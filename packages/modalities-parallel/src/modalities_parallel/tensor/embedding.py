"""Tables whose rows are split over ranks: each looks up the ids it has, and the sum over ranks is the whole."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from modalities_parallel.tensor.regions import Tokens

TOKENS = "_tokens_of_ranks"


class SplitTable:
    """In front of the class of an ``nn.Embedding``, whose ``weight`` is then this rank's rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """Of ids of any shape, what all ranks find together: this rank's tokens of it, or all."""
        table: Any = self
        rows = table.weight.shape[0]
        tokens: Tokens = table.__dict__[TOKENS]
        own = ids - tokens.tp.rank * rows
        elsewhere = (own < 0) | (own >= rows)
        found = cast(Tensor, super().forward(own.masked_fill(elsewhere, 0)))  # pyrefly: ignore[missing-attribute]
        return tokens.leave(found.masked_fill(elsewhere[..., None], 0))


def prepare_table(table: nn.Module, tokens: Tokens, rows: int) -> None:
    """What a table of ``rows`` rows needs to know to be a ``SplitTable``."""
    table.__dict__[TOKENS] = tokens
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        own = padding - tokens.tp.rank * (rows // tokens.tp.size)
        table.padding_idx = own if 0 <= own < rows // tokens.tp.size else None  # pyrefly: ignore[bad-argument-type]
