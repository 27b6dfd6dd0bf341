"""A part of a dataset, without copying: what is held out, and what is left to train on."""

from __future__ import annotations

import numpy as np

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Dataset, Samples
from modalities_data.datasets.arrays import checked, fingerprint


class PartDataset:
    """The samples of ``dataset`` between two fractions of it, in their order.

    Parts that meet at the same fraction share no sample, and together they are the whole.

    Args:
        dataset: where the samples are.
        start: from 0.0 on; the part begins with the sample at this fraction.
        end: up to 1.0; the part ends before the sample at this fraction.
    """

    sequence_length: int
    largest_id: int
    fingerprint: str
    bytes_per_token: float | None

    def __init__(self, dataset: Dataset, start: float = 0.0, end: float = 1.0) -> None:
        """Find the first and the last sample.

        Raises:
            ConfigError: the fractions are out of order or range, or no sample lies between them.
        """
        if not 0 <= start < end <= 1:
            raise ConfigError(f"a part is 0 <= start < end <= 1, not {start} to {end}", about=(self, "start"))
        self._dataset = dataset
        self._first, self._behind = (round(fraction * len(dataset)) for fraction in (start, end))
        if self._first == self._behind:
            raise ConfigError(
                f"no sample of {len(dataset)} lies between the fractions {start} and {end}", about=(self, "end")
            )
        self.sequence_length = dataset.sequence_length
        self.largest_id = dataset.largest_id
        self.bytes_per_token = dataset.bytes_per_token
        self.image_shape = getattr(dataset, "image_shape", None)
        place = f"{dataset.fingerprint} {self._first} {self._behind}"
        self.fingerprint = fingerprint("part", place, dataset.sequence_length)

    def __len__(self) -> int:
        """How many samples the part has."""
        return self._behind - self._first

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices`` of the part.

        Raises:
            IndexError: an index is not in [0, len).
        """
        return self._dataset.gather(checked(indices, len(self)) + self._first)
