"""How rotary wavelengths are stretched for sequences longer than they were made for."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class RopeScaling(Protocol):
    """Rotary frequencies that differ from theta^(-2i/F)."""

    def frequencies(self, head_size: int, theta: float, sequence_length: int) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32 on the CPU, and the factor on cosines and sines."""
        ...
