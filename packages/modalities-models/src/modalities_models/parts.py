"""What an architecture may be given as objects: the promises of a decoder's parts that are components themselves.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Activation = Literal["swiglu", "geglu", "gelu", "relu_squared"]

GATED = frozenset({"swiglu", "geglu"})
"""Activations with a gate: three matrices, down(act(gate(x)) * up(x)); the others have two, down(act(up(x)))."""


@dataclass(frozen=True, slots=True)
class FeedForwardShape:
    """What a block says about its feed-forward.

    Args:
        hidden_size: D.
        intermediate_size: I of the dense feed-forward.
        activation: between the matrices.
        bias: biases in the matrices.
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation
    bias: bool


class FeedForwardCount(NamedTuple):
    """What one feed-forward has and keeps.

    total: all parameters.
    active: parameters that one token passes through.
    matmul: those of them that are elements of matrices.
    kept: elements per token that it keeps for the backward pass, its input included.
    """

    total: int
    active: int
    matmul: int
    kept: int


@runtime_checkable
class FeedForward(Protocol):
    """What stands in for the dense feed-forward of the blocks: data that builds one module per block."""

    def build(self, shape: FeedForwardShape, layer: int) -> nn.Module:
        """The module of block ``layer``, from 0: (B, T, D) to (B, T, D)."""
        ...

    def count(self, shape: FeedForwardShape, layer: int) -> FeedForwardCount:
        """What that module has and keeps."""
        ...

    def check(self, layers: int) -> None:
        """Raise ConfigError if it does not fit a model of ``layers`` blocks."""
        ...


@runtime_checkable
class RopeScaling(Protocol):
    """Rotary frequencies that differ from theta^(-2i/F)."""

    def frequencies(
        self, head_size: int, theta: float, sequence_length: int, device: torch.device | None = None
    ) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32 on ``device``, and the factor on cosines and sines.

        Args:
            head_size: F, even.
            theta: base of the wavelengths.
            sequence_length: the longest input of the model.
            device: where the frequencies are made; None is torch's default device.
        """
        ...
