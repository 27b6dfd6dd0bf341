"""Batches of tensors, as pure functions of the step.

Shape suffixes: B samples of a micro batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Dataset, Samples, World
from modalities_core.progress import accumulation
from modalities_data.order import ORDER_VERSION, check_seed, shuffled


class ShuffledBatches:
    """Training data, reshuffled in every epoch; which samples a step sees depends on the seed and the step alone.

    Step s takes the global samples ``s * samples_per_step`` to ``(s + 1) * samples_per_step``. Each data-parallel rank
    takes one contiguous part of them and cuts it into micro batches, so all ranks' micro batches in order are the same
    samples in the same order for any number of ranks and any micro batch size. The next step is read ahead on a thread.

    Args:
        dataset: where the samples come from.
        world: tells this rank's place among the data-parallel ranks, and whether memory is to be pinned.
        samples_per_step: samples in one step over all ranks, micro batches and accumulation.
        micro_batch_size: samples a rank computes at once.
        seed: chooses the order, from 0 on.
    """

    samples_per_step: int
    sequence_length: int
    largest_id: int
    fingerprint: str

    def __init__(
        self, dataset: Dataset, world: World, samples_per_step: int, micro_batch_size: int, seed: int = 0
    ) -> None:
        """Check that the step divides evenly.

        Raises:
            ConfigError: a size or the seed is out of range, or the ranks' micro batches do not make up the step.
        """
        for name, value in (("samples_per_step", samples_per_step), ("micro_batch_size", micro_batch_size)):
            _check_positive(self, name, value)
        check_seed(seed, about=(self, "seed"))
        try:
            self._accumulation = accumulation(samples_per_step, micro_batch_size, world.data_size)
        except ConfigError as error:
            raise ConfigError(error.message, hint=error.hint, about=(self, "samples_per_step")) from None
        self.samples_per_step = samples_per_step
        self.sequence_length = dataset.sequence_length
        self.largest_id = dataset.largest_id
        order = f"shuffled {ORDER_VERSION} {seed}\n{dataset.fingerprint}\n{dataset.sequence_length}"
        self.fingerprint = xxhash.xxh3_64_hexdigest(order.encode())
        self._dataset, self._seed = dataset, seed
        self._micro_batch_size = micro_batch_size
        self._first = world.data_rank * (samples_per_step // world.data_size)
        self._pinned = world.device.type == "cuda"
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro batches of the zero-based ``step``, each (micro_batch_size, T) int64, on the host."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._compute(step)
        self._ahead = (step + 1, self._reader.submit(self._compute, step + 1))
        return batches

    def _compute(self, step: int) -> list[Batch]:
        share = self._accumulation * self._micro_batch_size
        first = step * self.samples_per_step + self._first
        indices = shuffled(np.arange(first, first + share, dtype=np.int64), len(self._dataset), self._seed)
        return [
            _batch(self._dataset.gather(part), None, self._pinned) for part in np.split(indices, self._accumulation)
        ]


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
        _check_positive(self, "micro_batch_size", micro_batch_size)
        if max_samples is not None:
            _check_positive(self, "max_samples", max_samples)
        self.sequence_length = dataset.sequence_length
        self.largest_id = dataset.largest_id
        self.bytes_per_token = dataset.bytes_per_token
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
            yield _batch(samples, places < self._samples if padded else None, self._pinned)


def _batch(samples: Samples, counts_B: np.ndarray | None, pinned: bool) -> Batch:
    """Samples as tensors; where ``counts_B`` is given, (B,) bool, the other rows weigh nothing."""
    tokens, weights = samples
    pair = np.empty((2, len(tokens), tokens.shape[1] - 1), np.int64)
    pair[0], pair[1] = tokens[:, :-1], tokens[:, 1:]
    if counts_B is not None:
        base = np.ones(pair.shape[1:], np.float32) if weights is None else weights
        weights = base * counts_B[:, None].astype(np.float32)
    tokens_BT, targets_BT = torch.from_numpy(pair)
    weights_BT = None if weights is None else torch.from_numpy(np.ascontiguousarray(weights, np.float32))
    if pinned:
        tokens_BT, targets_BT = tokens_BT.pin_memory(), targets_BT.pin_memory()
        weights_BT = None if weights_BT is None else weights_BT.pin_memory()
    return Batch(tokens_BT, targets_BT, weights_BT)


def _check_positive(owner: object, name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is at least 1, not {value}", about=(owner, name))
