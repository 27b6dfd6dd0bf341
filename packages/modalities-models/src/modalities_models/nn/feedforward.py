"""Feed-forward layers: hidden states (..., D) to hidden states (..., D).

Gate and up stay separate matrices: on CPU splitting a fused product costs more than the fusion gains, and separate
matrices shard over tensor-parallel ranks and map to Hugging Face checkpoints without reordering rows.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class GELU(nn.Module):
    """down(gelu(up(x))) with the tanh form of GELU (arXiv:1606.08415), as in GPT-2."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(F.gelu(self.up(hidden), approximate="tanh"))


def feedforward(
    activation: Literal["swiglu", "gelu"], hidden_size: int, intermediate_size: int, bias: bool
) -> SwiGLU | GELU:
    """The feed-forward of a block."""
    kind = SwiGLU if activation == "swiglu" else GELU
    return kind(hidden_size, intermediate_size, bias)
