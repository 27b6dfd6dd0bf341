"""Feed-forward layers: hidden states (..., D) to hidden states (..., D).

Gate and up stay separate matrices: on CPU splitting a fused product costs more than the fusion gains, and separate
matrices shard over tensor-parallel ranks and map to Hugging Face checkpoints without reordering rows.

Shape suffixes: D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from modalities_models.parts import GATED, Activation, FeedForwardCount, FeedForwardShape


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv:2109.08668)."""
    return F.relu(x).square()


NONLINEARITY: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "swiglu": F.silu,
        "geglu": partial(F.gelu, approximate="tanh"),
        "gelu": partial(F.gelu, approximate="tanh"),
        "relu_squared": squared_relu,
    }
)


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), arXiv:2002.05202: SwiGLU with SiLU, GeGLU with GELU in its tanh form."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.nonlinearity = NONLINEARITY[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(self.nonlinearity(self.gate(hidden)) * self.up(hidden))


class PlainFeedForward(nn.Module):
    """down(act(up(x))): GELU in its tanh form (arXiv:1606.08415) as in GPT-2, or squared ReLU (arXiv:2109.08668)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.nonlinearity = NONLINEARITY[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(self.nonlinearity(self.up(hidden)))


def dense(shape: FeedForwardShape) -> GatedFeedForward | PlainFeedForward:
    """The dense feed-forward of a block."""
    kind = GatedFeedForward if shape.activation in GATED else PlainFeedForward
    return kind(shape.hidden_size, shape.intermediate_size, shape.activation, shape.bias)


def dense_count(shape: FeedForwardShape) -> FeedForwardCount:
    """What the dense feed-forward has and keeps."""
    gated = shape.activation in GATED
    matrices = (3 if gated else 2) * shape.hidden_size * shape.intermediate_size
    biases = (1 + gated) * shape.intermediate_size + shape.hidden_size if shape.bias else 0
    # Of the gate its product and its activation, then up, then what down multiplies; without a gate the outer two.
    kept = shape.hidden_size + (4 if gated else 2) * shape.intermediate_size
    return FeedForwardCount(matrices + biases, matrices + biases, matrices, kept)
