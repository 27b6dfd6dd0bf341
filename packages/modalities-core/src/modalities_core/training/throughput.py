"""How fast a run goes: tokens per second without evaluation and saving, where the time goes, and MFU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Window:
    """Steps and seconds of training since the last window."""

    steps: int
    seconds: float


class Phases:
    """Seconds per part of the steps, such as forward, backward, optimizer and data, without stopping the device.

    On CUDA a part lasts from the moment the device reaches its first operation to the one it has done its last: time
    in which the device waits for the host, as for data, belongs to the part that made it wait. Elsewhere it is the
    host's time. Parts do not nest.

    Args:
        device: that the parts run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: dict[str, float] = {}
        self._events = device.type == "cuda"
        self._device = device
        self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count what runs inside to the part ``name``; returns before the device has done it."""
        if not self._events:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - start)
            return
        first = self._record()
        try:
            yield
        finally:
            self._open.append((name, first, self._record()))
            self._collect()

    def seconds(self) -> dict[str, float]:
        """By part, on this rank, since the last call; on CUDA waits until the device has done them."""
        if self._open:
            self._open[-1][2].synchronize()
            self._collect()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect(self) -> None:
        # Asking an event never waits; so their number stays that of the operations still in flight.
        while self._open and self._open[0][2].query():
            name, first, last = self._open.popleft()
            self._add(name, first.elapsed_time(last) / 1000)
            self._free += (first, last)


class Stopwatch:
    """Training time since the last window, without what ran inside :meth:`excluded`.

    Args:
        clock: seconds that only go up.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._excluded = 0.0
        self._steps = 0

    def step_done(self) -> None:
        """Count one step."""
        self._steps += 1

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside does not count as training: evaluation, saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - start

    def window(self) -> Window:
        """What happened since the last call; starts the next window."""
        now = self._clock()
        window = Window(self._steps, now - self._start - self._excluded)
        self._start, self._excluded, self._steps = now, 0.0, 0
        return window


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, ranks: int) -> float | None:
    """Model FLOPs utilisation: the share of all devices' peak that the model's own arithmetic takes.

    Recomputed activations do not count (PaLM, arXiv:2204.02311 appendix B); what attention counts as is the
    convention of ``flops_per_token``.

    Args:
        tokens_per_second: over all ranks.
        flops_per_token: forward and backward.
        peak: FLOP/s of one device, or None.
        ranks: devices.

    Returns:
        A share, usually below 1, or None without a peak.
    """
    return tokens_per_second * flops_per_token / (peak * ranks) if peak else None
