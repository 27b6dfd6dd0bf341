"""Samples as tensors, and tensors on their way to a GPU.

Shape suffixes: B samples of a micro batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Samples


def as_batch(samples: Samples, counts_B: np.ndarray | None, pinned: bool) -> Batch:
    """Samples as tensors; where ``counts_B`` is given, (B,) bool, the other rows weigh nothing."""
    tokens, weights, segments, images = samples
    pair = torch.empty((2, len(tokens), tokens.shape[1] - 1), dtype=torch.int64, pin_memory=pinned)
    # Written once, straight into the memory that is copied from.
    inputs, targets = pair.numpy()
    inputs[...], targets[...] = tokens[:, :-1], tokens[:, 1:]
    inputs_BT, targets_BT = pair.unbind()
    if counts_B is not None:
        base = np.ones(inputs.shape, np.float32) if weights is None else weights
        weights = base * counts_B[:, None].astype(np.float32)
    return Batch(
        inputs_BT,
        targets_BT,
        _tensor(weights, np.float32, pinned),
        _tensor(segments, np.int32, pinned),
        None if images is None else _tensor(images.transpose(0, 3, 1, 2), np.uint8, pinned),
    )


def _tensor(values: np.ndarray | None, dtype: type, pinned: bool) -> torch.Tensor | None:
    if values is None:
        return None
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype))
    return tensor.pin_memory() if pinned else tensor


class _MicroBatches(Sequence[Batch], ABC):
    """Micro batches that come into being when they are asked for; a subclass makes one."""

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        """A micro batch; counted from the end where negative."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._batch(range(len(self))[index])

    @abstractmethod
    def _batch(self, number: int) -> Batch:
        """Number ``number``, in [0, len)."""


class MadeWhenAsked(_MicroBatches):
    """Micro batches out of samples that are read: tensors only while one is used, in memory that is still in a cache.

    Args:
        read: samples, in each a whole number of micro batches, and in all but the last the same.
        size: samples of a micro batch.
        pinned: whether tensors lie in pinned memory.
    """

    def __init__(self, read: Sequence[Samples], size: int, pinned: bool) -> None:
        """Make nothing yet."""
        self._read, self._size, self._pinned = read, size, pinned
        self._per_read = len(read[0].tokens) // size
        self._count = sum(len(samples.tokens) for samples in read) // size

    def __len__(self) -> int:
        """How many micro batches there are."""
        return self._count

    def _batch(self, number: int) -> Batch:
        """On the host, in tensors of its own each time."""
        of_read, place = divmod(number, self._per_read)
        rows = slice(place * self._size, (place + 1) * self._size)
        tokens, *others = self._read[of_read]
        some = Samples(tokens[rows], *(None if values is None else values[rows] for values in others))
        return as_batch(some, None, self._pinned)


class CopiedAhead(_MicroBatches):
    """Micro batches on a GPU: while one is computed, the next is copied, on a stream of its own."""

    def __init__(self, batches: Sequence[Batch], device: torch.device, stream: torch.cuda.Stream) -> None:
        """Start to copy the first of ``batches``, which lie in pinned memory, on ``stream``."""
        self._batches, self._device, self._stream = batches, device, stream
        self._copied: dict[int, tuple[Batch, torch.cuda.Event]] = {}
        self._copy(0)

    def __len__(self) -> int:
        """How many micro batches there are."""
        return len(self._batches)

    def _batch(self, number: int) -> Batch:
        """On the device, safe to use on its current stream."""
        self._copy(number)
        batch, done = self._copied.pop(number)
        self._copy(number + 1)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(done)
        tensors = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.images_BCHW)
        for tensor in tensors:
            if tensor is not None:
                # Its memory came from the other stream: it may go back only when this one is done with it.
                tensor.record_stream(compute)
        return batch

    def _copy(self, number: int) -> None:
        if number >= len(self._batches) or number in self._copied:
            return
        with torch.cuda.stream(self._stream):
            batch = self._batches[number].to(self._device)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._copied[number] = (batch, done)


def check_positive(owner: object, name: str, value: int) -> None:
    """Refuse a size below 1.

    Raises:
        ConfigError: about the argument ``name``.
    """
    if value < 1:
        raise ConfigError(f"{name} is at least 1, not {value}", about=(owner, name))
