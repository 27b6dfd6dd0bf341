"""Rotary position embeddings (arXiv:2104.09864), in the half-split form of Llama and Qwen checkpoints.

Element i of a head is paired with element i + F/2 and turned by position * theta^(-2i/F).

Shape suffixes: T tokens, H heads, F elements of one head; 1 where a dimension broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modalities_models.nn.rope_scaling import plain_frequencies
from modalities_models.parts import RopeScaling


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of a forward pass, (T, 1, F) or (B, T, 1, F) float32; sines are negated in the first half of F.

    Not a tuple on purpose: FSDP2's mixed precision casts the tensors of containers it can look into, and would round
    what is shared by all blocks.
    """

    cos_T1F: Tensor
    sin_T1F: Tensor


def rotation(
    positions: Tensor, head_size: int, theta: float, scaling: RopeScaling | None = None, sequence_length: int = 0
) -> Rotation:
    """The rotation of tokens, in float32 whatever the model's precision.

    In bfloat16 positions above 256 would already collide; cosines are rounded only where they meet a head. In float64
    models, too, angles are float32: so are those of Hugging Face's, and a difference of 1e-8 in a rotation is one of
    1e-8 in the logits.

    Args:
        positions: places of the tokens in their documents, (T,) or (B, T) integers.
        head_size: F, even.
        theta: base of the wavelengths.
        scaling: what the frequencies are instead of theta^(-2i/F).
        sequence_length: the longest input of the model, which some scalings depend on.
    """
    if scaling is None:
        frequencies, factor = plain_frequencies(head_size, theta, positions.device), 1.0
    else:
        frequencies, factor = scaling.frequencies(head_size, theta, sequence_length, positions.device)
    angles = positions.float()[..., None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(heads_BTHF: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head by its token's angle; same shape and dtype."""
    cos, sin = rotation.cos_T1F.to(heads_BTHF.dtype), rotation.sin_T1F.to(heads_BTHF.dtype)
    # Its halves swapped as rows of two, which unlike a roll of the whole is also read in order where it is compiled.
    partners_BTHF = heads_BTHF.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(heads_BTHF * cos, partners_BTHF, sin)
