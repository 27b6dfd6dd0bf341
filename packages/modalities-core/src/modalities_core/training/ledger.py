"""Numbers on their way from the device to the host, read only when they have surely arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

LAG = 2
"""Steps after which the host asks: by then the device is long done with the copy, and still has a step to compute."""

T = TypeVar("T")


def lag_of(device: torch.device) -> int:
    """Steps between a step and the moment in which the host reads what it found; none where nothing is in flight."""
    return 0 if device.type == "cpu" else LAG


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    about: T
    values: Tensor
    copied: torch.cuda.Event | None


class Ledger(Generic[T]):
    """First in, first out; :func:`lag_of` decides how long the host waits before it looks.

    The same calls on every rank give the same entries at the same time, so that all ranks act on them alike.

    Args:
        device: that the numbers come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lag = lag_of(device)
        self._entries: deque[_Entry[T]] = deque()
        self._free: list[Tensor] = []

    def add(self, about: T, values: Tensor) -> None:
        """Send ``values``, one axis and always of one length, on their way; ``about`` comes out with them."""
        copied = None
        if values.device.type == "cuda":
            host = self._free.pop() if self._free else torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._entries.append(_Entry(about, values, copied))

    def read(self, everything: bool = False) -> Iterator[tuple[T, list[float]]]:
        """What has been on its way for long enough, or all there is, waiting for it if need be."""
        while len(self._entries) > (0 if everything else self._lag):
            entry = self._entries.popleft()
            if entry.copied is not None:
                entry.copied.synchronize()
            host = entry.values if entry.values.device.type == "cpu" else entry.values.to("cpu")
            numbers = host.numpy().tolist()
            if entry.copied is not None:
                self._free.append(host)
            yield entry.about, numbers
