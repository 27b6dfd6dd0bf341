"""The fastest matrix product of a device, measured: its peak where no data sheet tells."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

CPU_SIZES = (384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Sides of square products on the CPU: the least last under a millisecond, so that on a machine shared with others a
few run undisturbed; many cores need the largest."""
GPU_SIZES = (2048, 4096, 8192)
LONGEST_SHARE = 0.1
"""A product that would last more than so much of a measurement is left out."""
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
        """Multiply for about ``seconds``; memory that does not suffice ends it early."""
        begin = time.perf_counter()
        sizes = GPU_SIZES if self._device.type == "cuda" else CPU_SIZES
        factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        while (left := begin + seconds - time.perf_counter()) > 0:
            for size in sizes:
                # In turns, so that a disturbance hits all of them and none alone.
                if size > sizes[0] and 2 * size**3 > min(left, LONGEST_SHARE * seconds) * self.flops:
                    break
                try:
                    if size not in factors:
                        factors[size] = self._factors(size)
                    self._multiply(*factors[size])
                except RuntimeError:  # out of memory, or a dtype that the device does not multiply
                    sizes = tuple(smaller for smaller in sizes if smaller < size)
                    break
            if not sizes:
                break
        self._spent += time.perf_counter() - begin

    def settle(self) -> None:
        """Measure until it does not get better, at most four times.

        One thread comes first: where others keep the cores busy, several that wait for each other may never run
        undisturbed, but together they can do what one does.
        """
        threads = torch.get_num_threads()
        if self._device.type == "cpu" and threads > 1:
            torch.set_num_threads(1)
            try:
                self.measure(SECONDS / 2)
            finally:
                torch.set_num_threads(threads)
        for _ in range(4):
            before = self.flops
            self.measure()
            if before and self.flops < 1.05 * before:
                break

    def measure_again(self, trained_seconds: float) -> None:
        """Measure once more if all measuring together then stays a five-hundredth of ``trained_seconds``."""
        if self._spent + SECONDS <= SHARE_OF_RUN * trained_seconds:
            self.measure()

    def reached(self, flops_per_second: float) -> None:
        """A run computed so fast: the peak is at least that, once a measurement has had another chance."""
        if flops_per_second > self.flops:
            self.measure()
            self.flops = max(self.flops, flops_per_second)

    def _factors(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Two matrices and room for their product, which is computed once to warm up."""
        # Always the same numbers: what a product costs can depend on them, and a run's random state is not ours.
        generator = torch.Generator(self._device).manual_seed(0)
        left = torch.randn(size, size, generator=generator, device=self._device).to(self._dtype)
        right, product = left.t().contiguous(), torch.empty_like(left)
        torch.mm(left, right, out=product)
        self._wait()
        return left, right, product

    def _multiply(self, left: Tensor, right: Tensor, product: Tensor) -> None:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        self._wait()
        self.flops = max(self.flops, 2 * len(left) ** 3 / (time.perf_counter() - start))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measured_peak(device: torch.device, dtype: torch.dtype) -> MeasuredPeak:
    """The peak of a device, measured once per process, dtype and number of threads and improved ever after."""
    return _measured(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> MeasuredPeak:
    peak = MeasuredPeak(device, dtype)
    peak.settle()
    return peak
