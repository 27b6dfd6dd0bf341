"""Optimizer states in 8 bits per value: blocks that share a scale, and a code that is dense near zero.

Method: block-wise dynamic quantization (Dettmers et al., arXiv:2110.02861). Blocks lie within a row, so that a
parameter sharded by rows has the same blocks under any number of ranks. The code of the second moment has no zero:
a value that is not zero never becomes one, for it is divided by.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of the nearest values, to 8 bits of the relative magnitude, and the scale of each block.

    Args:
        values: (rows, ...) float32; not negative unless ``signed``.
        signed: which code is used.

    Returns:
        codes like ``values`` in uint8, and scales (rows, blocks) float32, the largest magnitude of each block.
    """
    rows = values.flatten(1)
    width = rows.shape[1]
    padded = F.pad(rows, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = padded.abs().amax(2)
    # A block of zeros has any code; its scale is what says zero.
    relative = (padded / torch.where(scales > 0, scales, 1.0)[..., None]).flatten(1)[:, :width]
    _, nearest = _code(signed, values.device)
    upper_half = relative.contiguous().view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    return nearest.index_select(0, upper_half.flatten()).view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What :func:`quantize` gave, as float32 again; quantizing that once more changes nothing."""
    values, _ = _code(signed, codes.device)
    rows = values.index_select(0, codes.flatten().to(torch.int32)).view(len(codes), -1)
    width = rows.shape[1]
    spread = scales.repeat_interleave(BLOCK, 1, output_size=scales.shape[1] * BLOCK)
    return rows.mul_(spread[:, :width]).view(codes.shape)


def blocks(width: int) -> int:
    """How many blocks a row of ``width`` values has."""
    return -(-width // BLOCK)


@cache
def _code(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values in rising order, the largest 1, and the nearest one's code for each upper half of a float32.

    A table takes one look-up where a search takes eight; no two values share an upper half.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** ((6 if signed else 7) - decade) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0**-decade)
    values = torch.cat([*positive, torch.ones(1, dtype=torch.float64)]).sort().values
    # Room for 1 and for -1, so that the largest of a block stays what it is, leaves no smallest negative value.
    more = [torch.zeros(1), -values[1:]] if signed else [torch.tensor([1e-7])]
    values = torch.cat([values, *more]).sort().values.to(torch.float32)
    assert values.numel() == 256
    halves = torch.arange(1 << 16, dtype=torch.int32)
    middles = (((halves ^ 0x8000) - 0x8000) * 0x10000 + 0x8000).view(torch.float32).nan_to_num(0.0)
    nearest = torch.bucketize(middles, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    # Zero has an upper half of its own, whose middle is not zero.
    nearest[0] = nearest[0x8000] = values.abs().argmin().to(torch.uint8)
    return values.to(device), nearest.to(device)
