"""What an implementation of attention is asked, and what it says of itself.

Shape suffixes: B batch, H heads, K key-value heads, T queries, S keys, F elements of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modalities_models.nn.masks import Mask


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the product of query and key.

    Args:
        window: how many tokens a token sees, itself included; None is all.
        scale: factor on the product; None is F ** -0.5.
        softcap: scores s become softcap * tanh(s / softcap); None leaves them.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One attention to compute.

    Args:
        mask: who sees whom.
        scores: window, scale and soft cap.
        dropout: probability of dropping an attention weight.
        device: ``cpu``, ``cuda``, ...
        dtype: of query, key and value.
        head_size: F.
        gradient: whether gradients are wanted.
    """

    mask: Mask
    scores: Scores
    dropout: float
    device: str
    dtype: torch.dtype
    head_size: int
    gradient: bool

    @property
    def bare(self) -> bool:
        """Whether it is full causal or bidirectional attention of plain scores, which needs no mask in memory."""
        window = self.scores.window
        return self.scores.softcap is None and (self.mask.plain_causal(window) or self.mask.hides_nothing(window))

    @property
    def window(self) -> int | None:
        """The window, or None where it hides nothing."""
        return self.mask.effective(self.scores.window)

    def kind(self) -> str:
        """What it is, in words."""
        parts = ["causal" if self.mask.order == "causal" else "bidirectional"]
        parts += [f"a window of {self.window}"] if self.window is not None else []
        parts += ["documents"] if self.mask.segments_BT is not None else []
        parts += ["padding"] if self.mask.padding_B is not None else []
        parts += ["a soft cap"] if self.scores.softcap is not None else []
        parts += ["dropout"] if self.dropout else []
        kind = parts[0] if len(parts) == 1 else f"{parts[0]} with {', '.join(parts[1:])}"
        return f"{kind}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True, slots=True)
class Implementation:
    """A way to compute attention.

    Args:
        name: how logs call it.
        refusal: why it cannot do a job, or None where it can.
        attend: query (B, H, T, F), key and value (B, K, S, F) and the job to (B, H, T, F).
        prepare: makes what it takes of the mask, ahead of the blocks.
    """

    name: str
    refusal: Callable[[Job], str | None]
    attend: Callable[[Tensor, Tensor, Tensor, Job], Tensor]
    prepare: Callable[[Job], object]
