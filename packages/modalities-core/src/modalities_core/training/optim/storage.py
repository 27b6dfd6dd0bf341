"""How what an optimizer remembers of a parameter is stored: in full, in bfloat16, or in 8 bits with scales."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from modalities_core.training.optim import quantized
from modalities_core.training.optim.placement import local, rows_like

SCALE = "_scale"
"""Ends the name of a state that holds the scales of another's blocks."""
SMALLEST_QUANTIZED = 4096
"""Smaller parameters and vectors keep float32 states: they weigh little, and some, such as norms, matter much."""


def zeros(parameter: Tensor, name: str, dtype: Literal["fp32", "bf16", "int8"]) -> dict[str, Tensor]:
    """A state of zeros for a parameter, sharded as it is, under ``name`` and perhaps ``name_scale``."""
    if dtype == "int8" and is_quantized(parameter):
        codes = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        return {
            name: codes,
            name + SCALE: rows_like(parameter, quantized.blocks(math.prod(local(parameter).shape[1:]))),
        }
    stored = torch.bfloat16 if dtype == "bf16" else computing(parameter.dtype)
    return {name: torch.zeros_like(parameter, dtype=stored, requires_grad=False)}


def is_quantized(parameter: Tensor) -> bool:
    """Whether 8-bit states of this parameter are in 8 bits indeed."""
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST_QUANTIZED


def computing(dtype: torch.dtype) -> torch.dtype:
    """What values of a parameter of this dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


def read(state: dict[str, Tensor], name: str, dtype: torch.dtype, signed: bool) -> Tensor:
    """The values of a state in ``dtype``; the stored tensor itself where it has that."""
    if state[name].dtype == torch.uint8:
        return quantized.dequantize(state[name], state[name + SCALE], signed).to(dtype)
    return state[name].to(dtype)


def write_quantized(state: dict[str, Tensor], name: str, value: Tensor, signed: bool) -> None:
    """Put values back as codes and scales."""
    codes, scales = quantized.quantize(value.to(torch.float32), signed)
    state[name].copy_(codes)
    state[name + SCALE].copy_(scales)
