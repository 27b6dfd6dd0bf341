"""Who sees whom in one forward pass: made once, shared by all blocks, in the form each implementation takes.

Shape suffixes: B batch, T new tokens (queries), S tokens they may see (keys), the last T of which are the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

Order = Literal["causal", "everything"]


class Mask:
    """Which keys each query sees, for any window.

    An object on purpose: FSDP2's mixed precision casts the tensors of containers it can look into. What it makes it
    keeps; ``prepare`` makes it ahead of the blocks, so that none of them, compiled or recomputed, is the first to.

    Args:
        order: ``causal``: a token sees itself and what came before it; ``everything``: all see all.
        new: T.
        past: tokens the caches hold.
        device: of the tokens.
        segments_BT: (B, T) integers, the number of each token's document; tokens see only their own. Without past.
        padding_B: (B,) integers, how many leading tokens of a row, past ones included, are padding: no other token
            sees them.
    """

    def __init__(
        self,
        order: Order,
        new: int = 0,
        past: int = 0,
        device: torch.device | None = None,
        segments_BT: Tensor | None = None,
        padding_B: Tensor | None = None,
    ) -> None:
        assert segments_BT is None or not past, "a cache holds one document"
        self.order: Order = order
        self.new = new
        self.past = past
        self.device = device
        self.segments_BT = segments_BT
        self.padding_B = padding_B
        self._kept: dict[Hashable, Any] = {}

    @property
    def rows_differ(self) -> bool:
        """Whether documents or padding make one row of the batch differ from another."""
        return self.segments_BT is not None or self.padding_B is not None

    def effective(self, window: int | None) -> int | None:
        """``window``, or None where the tokens are so few that it hides nothing."""
        return None if window is None or window >= self.past + self.new else window

    def hides_nothing(self, window: int | None) -> bool:
        """Whether every query sees every key that a cache with this window gives."""
        if self.order == "everything":
            return True
        # One new token sees all that a cache keeps for it.
        return self.new == 1 and self.padding_B is None

    def plain_causal(self, window: int | None) -> bool:
        """Whether it is the lower triangle of a square and nothing else."""
        if self.order != "causal" or self.past or self.effective(window) is not None:
            return False
        return not self.rows_differ

    def kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gave the first time it was asked for under ``name``."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def dense(self, window: int | None) -> Tensor:
        """Booleans, true where a query sees a key: (T, S), or (B, 1, T, S) where rows differ."""
        window = self.effective(window)
        return self.kept(("dense", window), lambda: self._make_dense(window))

    def hidden(self, window: int | None) -> Tensor:
        """Booleans (B, T, S), or (1, T, S) where rows do not differ, true where a query does not see a key."""
        window = self.effective(window)
        return self.kept(("hidden", window), lambda: self._make_hidden(window))

    def _make_hidden(self, window: int | None) -> Tensor:
        seen = self._make_dense(window)
        return (seen[:, 0] if seen.dim() == 4 else seen[None]).logical_not()

    def _make_dense(self, window: int | None) -> Tensor:
        assert self.order == "causal", "where all see all no mask is needed"
        end = self.past + self.new
        first = 0 if window is None else self.past - min(self.past, window - 1)
        query_T1 = torch.arange(self.past, end, device=self.device)[:, None]
        key_S = torch.arange(first, end, device=self.device)
        seen = key_S <= query_T1
        if window is not None:
            seen = seen & (query_T1 - key_S < window)
        if self.segments_BT is not None:
            seen = seen & (self.segments_BT[:, None, :, None] == self.segments_BT[:, None, None, :])
        if self.padding_B is not None:
            # Padding sees itself: a row of attention weights with nothing in it would not be finite.
            seen = seen & ((key_S >= self.padding_B[:, None, None, None]) | (key_S == query_T1))
        return seen


def causal(
    tokens_BT: Tensor, past: int = 0, segments_BT: Tensor | None = None, padding_B: Tensor | None = None
) -> Mask:
    """Each token sees itself and what came before it.

    Args:
        tokens_BT: the new tokens; only the length and the device are used.
        past: tokens the caches hold.
        segments_BT: (B, T) integers, the number of each token's document; tokens see only their own.
        padding_B: (B,) integers, how many leading tokens of a row, past ones included, are padding.
    """
    return Mask("causal", tokens_BT.shape[1], past, tokens_BT.device, segments_BT, padding_B)


def everything() -> Mask:
    """All tokens see all, as in encoders."""
    return Mask("everything")


def positions(
    tokens_BT: Tensor, past: int = 0, segments_BT: Tensor | None = None, padding_B: Tensor | None = None
) -> Tensor:
    """Each token's place in its document: (T,) int64, or (B, T) where rows differ; arguments as for ``causal``.

    Padding is at place 0, as is the first token after it.
    """
    if segments_BT is not None:
        places_BT = segment_positions(segments_BT)
        assert padding_B is None, "documents packed into a sample have no padding before them"
        return places_BT
    places_T = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)
    return places_T if padding_B is None else (places_T - padding_B[:, None]).clamp_min(0)


def segment_positions(segments_BT: Tensor) -> Tensor:
    """(B, T) int64: each token's distance from the start of its segment."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(starts_BT, places_T, 0).cummax(1).values
