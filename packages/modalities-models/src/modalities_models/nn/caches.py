"""What a block remembers of the tokens it has read, for generation.

Shape suffixes: B batch, H key-value heads, T new tokens, S tokens given back, F elements of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values one block has seen, in memory allocated once.

    With a window only the last ``window`` - 1 tokens are kept between calls, as no later token sees more; the memory
    is bounded by twice the window, whatever the length of the text.

    Args:
        capacity: the most tokens it takes.
        window: how many tokens the block sees, the present one included; None is all.
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        self.capacity = capacity
        self.window = window
        self.length = 0
        self._kept = 0
        self._end = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BHTF: Tensor, value_BHTF: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens.

        Returns:
            Keys and values, (B, H, S, F) each, of these tokens and the kept ones before them: all so far, or with a
            window the last min(length before, window - 1) + T. Valid until the next call.
        """
        new = key_BHTF.shape[2]
        assert self.length + new <= self.capacity, "the decoder checks the length of its input"
        self.length += new
        if self._keys is None or self._values is None:
            rows = self.capacity if self.window is None else min(self.capacity, 2 * self.window)
            batch, heads, _, size = key_BHTF.shape
            self._keys = key_BHTF.new_empty(batch, heads, rows, size)
            self._values = value_BHTF.new_empty(batch, heads, rows, size)
        if self.window is not None and self._end + new > self._keys.shape[2]:
            return self._slide(key_BHTF, value_BHTF, self.window)
        start, end = self._end - self._kept, self._end + new
        self._keys[:, :, self._end : end] = key_BHTF
        self._values[:, :, self._end : end] = value_BHTF
        self._end, self._kept = end, self._still_seen(self._kept + new)
        return self._keys[:, :, start:end], self._values[:, :, start:end]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts, and forget the others.

        Args:
            rows: (R,) int64, their rows; those of the next tokens are in the same order.
        """
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def _slide(self, key_BHTF: Tensor, value_BHTF: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Add tokens that do not fit behind the others: what later tokens see moves to the front."""
        assert self._keys is not None and self._values is not None
        kept = slice(self._end - self._kept, self._end)
        keys = torch.cat((self._keys[:, :, kept], key_BHTF), 2)
        values = torch.cat((self._values[:, :, kept], value_BHTF), 2)
        self._kept = self._end = self._still_seen(keys.shape[2])
        first = keys.shape[2] - self._kept
        self._keys[:, :, : self._kept] = keys[:, :, first:]
        self._values[:, :, : self._kept] = values[:, :, first:]
        return keys, values

    def _still_seen(self, tokens: int) -> int:
        """How many of the last ``tokens`` a later token can see."""
        return tokens if self.window is None else min(tokens, self.window - 1)
