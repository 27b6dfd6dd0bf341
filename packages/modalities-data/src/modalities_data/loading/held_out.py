"""Evaluation batches: one pass over a fixed set.

Shape suffixes: B samples of a micro batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from modalities_core.interfaces import Batch, Dataset, World
from modalities_data.loading.tensors import as_batch, check_positive


class HeldOutBatches:
    """Evaluation data in order: every sample once over all ranks, the same number of equal shapes on each.

    Where the samples do not fill the last batches of all ranks, rows of weight 0 do.

    Args:
        dataset: where the samples come from.
        world: tells this rank's place among the data-parallel ranks, and whether memory is to be pinned.
        micro_batch_size: samples a rank computes at once.
        max_samples: take only the first so many; all by default.
    """

    sequence_length: int
    largest_id: int
    bytes_per_token: float | None

    def __init__(self, dataset: Dataset, world: World, micro_batch_size: int, max_samples: int | None = None) -> None:
        """Count the batches.

        Raises:
            ConfigError: a size is not positive.
        """
        check_positive(self, "micro_batch_size", micro_batch_size)
        if max_samples is not None:
            check_positive(self, "max_samples", max_samples)
        self.sequence_length = dataset.sequence_length
        self.largest_id = dataset.largest_id
        self.bytes_per_token = dataset.bytes_per_token
        self.image_shape = getattr(dataset, "image_shape", None)
        self._dataset, self._size = dataset, micro_batch_size
        self._samples = len(dataset) if max_samples is None else min(max_samples, len(dataset))
        self._rank, self._ranks = world.data_rank, world.data_size
        self._pinned = world.device.type == "cuda"

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-self._samples // (self._size * self._ranks))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches, each (micro_batch_size, T) int64, on the host."""
        padded = self._samples % (self._size * self._ranks) != 0
        for number in range(len(self)):
            first = (number * self._ranks + self._rank) * self._size
            places = np.arange(first, first + self._size, dtype=np.int64)
            samples = self._dataset.gather(np.minimum(places, self._samples - 1))
            # Weights on all batches or on none: a compiled model then sees one kind of batch.
            yield as_batch(samples, places < self._samples if padded else None, self._pinned)
