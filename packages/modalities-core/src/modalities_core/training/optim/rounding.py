"""From float32 to bfloat16 without bias: each value goes up or down with the probability that keeps it on average.

The random bits are a hash of the parameter's name, its step and the element's place in the whole parameter, not of a
generator's state. They are therefore the same for every sharding, on replicas, on every device and in a resumed run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFF
_WORD = 0xFFFFFFFF
# Multipliers of the 32-bit integer hash "lowbias32" (Christopher Wellons, nullprogram.com/blog/2018/07/31), and 2^32
# over the golden ratio; as signed numbers where tensors are int32.
_FIRST, _SECOND, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def salt(name: str) -> int:
    """32 bits that tell one parameter's random numbers from another's."""
    return zlib.crc32(name.encode())


def keys(steps: Sequence[Tensor], salts: Tensor) -> list[Tensor]:
    """One int32 scalar per parameter for this step, computed where the steps are.

    Args:
        steps: scalar tensors, all on one device.
        salts: of the parameters, as :func:`salt` gives them, int64 on that device.
    """
    word = (torch.stack(list(steps)).to(torch.int64) * _GOLDEN + salts) & _WORD
    for multiplier in (_FIRST, _SECOND):
        word = ((word ^ (word >> 16)) * multiplier) & _WORD
    word ^= word >> 15
    return list((word - (1 << 31)).to(torch.int32).unbind())


def round_stochastically(values: Tensor, key: Tensor, first: int, stream: int, width: int = 0, step: int = 0) -> Tensor:
    """``values`` in bfloat16, each rounded up with the probability of its distance to the value below.

    Values that bfloat16 has, infinities and NaN included, stay as they are.

    Args:
        values: float32, any shape, contiguous.
        key: int32 scalar, one per parameter and step.
        first: place of the first value in the whole parameter.
        stream: tells what is rounded with the same key apart, such as the parameter and its momentum.
        width: how many values lie side by side in the whole parameter; 0 where all do.
        step: from one such stretch of values to the next.
    """
    place = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    if width and width < values.numel():
        place.add_(place.div(width, rounding_mode="floor").mul_(step - width))
    noise = place.mul_(_signed(_GOLDEN)).add_(key).add_(_signed((first + stream * _FIRST) * _GOLDEN))
    noise.bitwise_xor_(noise.bitwise_right_shift(15).bitwise_and_(0x1FFFF)).mul_(_signed(_SECOND))
    noise = noise.bitwise_right_shift_(16).bitwise_and_(_LOW)
    raised = noise.view(values.shape).add_(values.view(torch.int32)).bitwise_and_(~_LOW).view(torch.float32)
    # The bits of a NaN could overflow into those of a number.
    return torch.where(values.isnan(), values, raised).to(torch.bfloat16)


def _signed(word: int) -> int:
    return ((word + (1 << 31)) & _WORD) - (1 << 31)
