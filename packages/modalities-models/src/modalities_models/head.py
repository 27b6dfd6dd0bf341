"""Output heads: hidden states to logits, and what a loss may know about them.

Shape suffixes: D hidden size, V vocabulary size, R stored rows, V rounded up to a multiple.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.interfaces import VocabularyShard


class Head(nn.Module):
    """Hidden states (..., D) to logits (..., V): z = multiplier * hidden @ weight[:V].T, then the soft cap.

    A loss that never holds all logits may compute them itself, piece by piece, instead of calling the head. It may
    rely on ``weight``, ``vocab_size``, ``multiplier`` and ``softcap``, and on this: there is no bias; rows of
    ``weight`` from ``vocab_size`` on are padding and belong to no token; the gradient that autograd gives the tensor
    ``weight`` is the gradient of the parameter. It reads ``weight`` in every call and after the model's forward, as
    sharding puts another tensor there each time, and under autocast it casts hidden states and weight as
    ``F.linear`` does. A head that is no ``Head`` has to be called.

    Whoever splits it over ranks by vocabulary sets ``vocabulary_shard``; ``weight`` is then this rank's rows, and what
    is called gathers. If that takes a ``forward`` in front of this one, on the object or its class, that has an
    attribute ``gathers_vocabulary``, true, so that a loss may do without it.

    Args:
        vocab_size: V.
        multiplier: factor on the logits, before the soft cap.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma 2, arXiv:2408.00118); None leaves them.
    """

    weight: Tensor
    """(R, D), R >= V; or this rank's rows of these."""
    vocabulary_shard: VocabularyShard | None = None
    """Which rows these are, where ranks share them."""

    def __init__(self, vocab_size: int, multiplier: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.multiplier = multiplier
        self.softcap = softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        if self.multiplier != 1.0:
            hidden = hidden * self.multiplier  # narrower than the logits, and the same product
        weight = self.weight
        logits = F.linear(hidden, weight)
        if weight.shape[0] != self.vocab_size:
            logits = logits[..., : self.vocab_size]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class LinearHead(Head):
    """A head with a weight of its own.

    Args:
        rows: R.
        hidden_size: D.
        vocab_size: V.
        multiplier: see ``Head``.
        softcap: see ``Head``.
    """

    def __init__(
        self, rows: int, hidden_size: int, vocab_size: int, multiplier: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__(vocab_size, multiplier, softcap)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))


class TiedHead(Head):
    """A head that reads the embedding's weight when called and owns no parameter.

    So it stays tied through construction on the meta device, ``to_empty``, casting, copying and sharding.

    Args:
        embedding: holds the weight (R, D).
        vocab_size: V.
        multiplier: see ``Head``.
        softcap: see ``Head``.
    """

    def __init__(
        self, embedding: nn.Embedding, vocab_size: int, multiplier: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__(vocab_size, multiplier, softcap)
        # In a tuple, where nn.Module does not look: a second registration would store the weight twice.
        self._embedding = (embedding,)

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]  # read only: it is another module's
        """The embedding's weight, (R, D)."""
        return self._embedding[0].weight
