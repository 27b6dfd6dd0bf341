"""What tokenizers share about the ids they are asked to decode."""

from __future__ import annotations

from collections.abc import Sequence

from modalities_core.errors import DataError


def checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """``ids`` as Python integers.

    Raises:
        DataError: an id is not in [0, vocab_size).
    """
    values = [int(value) for value in ids]
    if values and not 0 <= min(values) <= max(values) < vocab_size:
        raise DataError(f"token ids of this tokenizer are 0 to {vocab_size - 1}, found {min(values)} to {max(values)}")
    return values
