"""What stands where a rank of a pipeline does not hold a part of the model.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Absent(nn.Module):
    """Gives its first argument on as it is; attributes are those of the part that it stands for.

    Args:
        original: that part, on the meta device; its parameters are none of this module's.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not look.
        self._original = (original,)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The first argument, of whatever shape."""
        return arguments[0] if arguments else next(iter(keywords.values()))

    def __getattr__(self, name: str) -> Any:
        """What the original has; so models that ask their blocks for settings find them."""
        original = self.__dict__.get("_original")
        if original is None:
            raise AttributeError(name)
        return getattr(original[0], name)


class AbsentEmbedding(Absent):
    """Zeros of the shape that a table would give, (B, T) to (B, T, D), in the memory of a single number.

    Args:
        original: the table, with a ``weight`` (rows, D), on the meta device.
        dtype: of the zeros.
    """

    def __init__(self, original: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(original)
        self._dtype = dtype

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Zeros (..., D) for ids (...); they take gradients where those of the table would."""
        ids: Tensor = super().forward(*arguments, **keywords)
        zero = torch.zeros((), dtype=self._dtype, device=ids.device, requires_grad=torch.is_grad_enabled())
        return zero.expand(*ids.shape, self.weight.shape[-1])
