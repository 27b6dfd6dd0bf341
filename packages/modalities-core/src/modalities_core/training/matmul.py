"""The fastest matrix product of a device, measured: its peak where no data sheet tells."""

from __future__ import annotations

import time
from functools import cache

import torch

CPU_SIZES = (384, 512, 768, 1024)
"""Sides of square products on the CPU: some last under a millisecond, so that on a machine shared with others a few
run undisturbed."""
GPU_SIZES = (2048, 4096, 8192)
SECONDS = 0.25
SHARE_OF_RUN = 0.002
"""Measuring again takes at most so much of a run's time."""


class MeasuredPeak:
    """FLOP/s of square matrix products, the fastest that was ever seen.

    What else runs on the machine can only make a measurement too low; so it is taken again while a run goes on, and
    a run that outdoes it raises it.

    Args:
        device: a CPU or GPU.
        dtype: of the factors.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.flops = 0.0
        self._device, self._dtype = device, dtype
        self._spent = 0.0

    def measure(self, seconds: float = SECONDS) -> None:
        """Multiply for about ``seconds`` after a warm-up; memory that does not suffice ends it early."""
        start = time.perf_counter()
        sizes = GPU_SIZES if self._device.type == "cuda" else CPU_SIZES
        for size in sizes:
            try:
                self._measure(size, seconds / len(sizes))
            except RuntimeError:  # out of memory, or a dtype that the device does not multiply
                break
        self._spent += time.perf_counter() - start

    def measure_again(self, trained_seconds: float) -> None:
        """Measure once more if all measuring together then stays a five-hundredth of ``trained_seconds``."""
        if self._spent + SECONDS <= SHARE_OF_RUN * trained_seconds:
            self.measure()

    def reached(self, flops_per_second: float) -> None:
        """A run computed so fast: the peak is at least that, once a measurement has had another chance."""
        if flops_per_second > self.flops:
            self.measure()
            self.flops = max(self.flops, flops_per_second)

    def _measure(self, size: int, seconds: float) -> None:
        # Always the same numbers: what a product costs can depend on them, and a run's random state is not ours.
        generator = torch.Generator(self._device).manual_seed(0)
        left = torch.randn(size, size, generator=generator, device=self._device).to(self._dtype)
        right, product = left.t().contiguous(), torch.empty_like(left)
        torch.mm(left, right, out=product)
        self._wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            torch.mm(left, right, out=product)
            self._wait()
            self.flops = max(self.flops, 2 * size**3 / (time.perf_counter() - start))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measured_peak(device: torch.device, dtype: torch.dtype) -> MeasuredPeak:
    """The peak of a device, measured once per process, dtype and number of threads and improved ever after."""
    return _measured(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> MeasuredPeak:
    peak = MeasuredPeak(device, dtype)
    peak.measure()
    return peak
