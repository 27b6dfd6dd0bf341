"""Training batches, as pure functions of the step.

Each step takes the samples that follow those of the one before: the step's number and the sizes of the steps say
which. Each data-parallel rank takes one contiguous part of them and cuts it into micro batches, so all ranks' micro
batches in order are the same samples in the same order for any number of ranks and any micro batch size. The next step
is read ahead on a thread; where the device is a GPU, the next micro batch is copied to it while this one is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xxhash

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Batch, Dataset, World
from modalities_core.progress import accumulation
from modalities_data.batch_sizes import BatchSizes, Stage, StepSamples
from modalities_data.loading.tensors import CopiedAhead, MadeWhenAsked, check_positive
from modalities_data.order import ORDER_VERSION, check_seed, shuffled

STATE_VERSION = 1
GATHERED_TOGETHER = 512
"""Samples asked for at once: what a call costs whatever its size is spread over many, and still little lies twice."""
MADE_AHEAD = 1 << 18
"""Tokens of a step up to which its tensors, 16 bytes each or more, are made ahead too."""


class _StepBatches(ABC):
    """What all training batches share; a subclass says which sample has which place in the run.

    samples_per_step: of all steps, or of those after the warm-up.
    """

    samples_per_step: int
    sequence_length: int
    largest_id: int
    fingerprint: str

    def __init__(
        self,
        dataset: Dataset,
        world: World,
        samples_per_step: int,
        micro_batch_size: int,
        warmup: BatchSizes | None,
    ) -> None:
        for name, value in (("samples_per_step", samples_per_step), ("micro_batch_size", micro_batch_size)):
            check_positive(self, name, value)
        constant = [Stage(from_step=0, samples=samples_per_step)]
        stages = constant if warmup is None else warmup.until(samples_per_step)
        for size in (samples_per_step, *(stage.samples for stage in stages)):
            try:
                accumulation(size, micro_batch_size, world.data_size)
            except ConfigError as error:
                about = (self, "samples_per_step" if size == samples_per_step else "warmup")
                raise ConfigError(error.message, hint=error.hint, about=about) from None
        self._step_samples = StepSamples(stages)
        self.samples_per_step = samples_per_step
        self.sequence_length = dataset.sequence_length
        self.largest_id = dataset.largest_id
        self.image_shape = getattr(dataset, "image_shape", None)
        self._dataset = dataset
        self.micro_batch_size = micro_batch_size
        self._rank, self._ranks = world.data_rank, world.data_size
        self._device = world.device
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[Sequence[Batch]]] | None = None
        self._next_step = 0
        self._stream: torch.cuda.Stream | None = None

    def samples(self, step: int) -> range:
        """Global numbers of the samples of the zero-based ``step``, over all ranks."""
        return self._step_samples.samples(step)

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro batches of the zero-based ``step``, each (micro_batch_size, T) int64.

        On the host; where the world's device is a GPU, on their way to it while the one before is computed.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._compute(step)
        self._ahead = (step + 1, self._reader.submit(self._compute, step + 1))
        self._next_step = step + 1
        if self._device.type != "cuda":
            return batches
        self._stream = self._stream or torch.cuda.Stream(self._device)
        return CopiedAhead(batches, self._device, self._stream)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        """The micro batches of one step after the other, without end, from where ``state_dict`` stands."""
        while True:
            yield self.micro_batches(self._next_step)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as a few JSON values: the samples of all steps asked for, over all ranks."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.samples(self._next_step).start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the samples of ``state``, on any number of ranks and with any micro batch.

        Raises:
            CheckpointError: it belongs to other data or another order, or lies within a step of this size.
        """
        if state.get("version") != STATE_VERSION or not isinstance(state.get("samples"), int):
            raise CheckpointError(f"expected the state of batches, version {STATE_VERSION}, found {state!r}")
        if state.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"the state belongs to the data {state.get('fingerprint')}, these batches have {self.fingerprint}",
                hint="use the same dataset, sequence length and seed",
            )
        step = self._step_samples.step_at(state["samples"])
        if step is None:
            raise CheckpointError(
                f"{state['samples']} samples are no whole number of steps of {self.samples_per_step}",
                hint="go on with samples_per_step and its warm-up as they were, or with a divisor",
            )
        self._next_step = step

    def _compute(self, step: int) -> Sequence[Batch]:
        of_all, size = self.samples(step), self.micro_batch_size
        share = len(of_all) // self._ranks
        first = of_all.start + self._rank * share
        indices = self._order(np.arange(first, first + share, dtype=np.int64))
        together = size * max(1, GATHERED_TOGETHER // size)
        read = [self._dataset.gather(indices[start : start + together]) for start in range(0, share, together)]
        pinned = self._device.type == "cuda"
        batches = MadeWhenAsked(read, size, pinned)
        # On this thread, so that the one that computes never waits: into pinned memory, or what a cache holds anyway.
        return list(batches) if pinned or share * self.sequence_length <= MADE_AHEAD else batches

    @abstractmethod
    def _order(self, places: np.ndarray) -> np.ndarray:
        """The samples at ``places`` of an endless run."""


class ShuffledBatches(_StepBatches):
    """Training data, reshuffled in every epoch; which samples a step sees depends on the seed and the step alone.

    Args:
        dataset: where the samples come from.
        world: tells this rank's place among the data-parallel ranks, and whether memory is to be pinned.
        samples_per_step: samples in one step over all ranks, micro batches and accumulation.
        micro_batch_size: samples a rank computes at once.
        seed: chooses the order, from 0 on.
        warmup: smaller steps at first, which take the same samples in the same order; None has them all alike.
    """

    def __init__(
        self,
        dataset: Dataset,
        world: World,
        samples_per_step: int,
        micro_batch_size: int,
        seed: int = 0,
        warmup: BatchSizes | None = None,
    ) -> None:
        """Check that every step divides evenly.

        Raises:
            ConfigError: a size or the seed is out of range, or the ranks' micro batches do not make up a step.
        """
        check_seed(seed, about=(self, "seed"))
        super().__init__(dataset, world, samples_per_step, micro_batch_size, warmup)
        self._seed = seed
        order = f"shuffled {ORDER_VERSION} {seed}\n{dataset.fingerprint}\n{dataset.sequence_length}"
        self.fingerprint = xxhash.xxh3_64_hexdigest(order.encode())

    def _order(self, places: np.ndarray) -> np.ndarray:
        return shuffled(places, len(self._dataset), self._seed)


class InOrderBatches(_StepBatches):
    """Training data in the order of the dataset, over and over: for one that is in its right order, as a mixture is.

    Args:
        dataset: where the samples come from.
        world: tells this rank's place among the data-parallel ranks, and whether memory is to be pinned.
        samples_per_step: samples in one step over all ranks, micro batches and accumulation.
        micro_batch_size: samples a rank computes at once.
        warmup: smaller steps at first, which take the same samples in the same order; None has them all alike.
    """

    def __init__(
        self,
        dataset: Dataset,
        world: World,
        samples_per_step: int,
        micro_batch_size: int,
        warmup: BatchSizes | None = None,
    ) -> None:
        """Check that every step divides evenly.

        Raises:
            ConfigError: a size is out of range, or the ranks' micro batches do not make up a step.
        """
        super().__init__(dataset, world, samples_per_step, micro_batch_size, warmup)
        order = f"in order\n{dataset.fingerprint}\n{dataset.sequence_length}"
        self.fingerprint = xxhash.xxh3_64_hexdigest(order.encode())

    def _order(self, places: np.ndarray) -> np.ndarray:
        return places % len(self._dataset)
