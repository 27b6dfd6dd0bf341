"""Images as rows of patches (arXiv:2010.11929, section 3.1).

Shape suffixes: B batch, C channels, H height, W width, S patches, P side of a patch, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Square patches, row by row from the top left, each projected to one token.

    The projection's weight is (D, C * P * P), that of a convolution with kernel and stride P flattened behind its first
    dimension.

    Args:
        channels: C.
        patch_size: P; divides height and width.
        hidden_size: D.
    """

    def __init__(self, channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(channels * patch_size**2, hidden_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, S, D); uint8 becomes [-1, 1], floats are taken as they are."""
        dtype = self.projection.weight.dtype
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.to(dtype) / 127.5 - 1.0
        return self.projection(patches(images_BCHW.to(dtype), self.patch_size))


def patches(images_BCHW: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, S, C * size * size): S patches row by row, in each the pixels channel by channel."""
    parted = images_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B, C, rows, size, columns, size
    return parted.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
