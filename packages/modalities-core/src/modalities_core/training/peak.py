"""What a device can compute at best: the denominator of MFU."""

from __future__ import annotations

import time
from functools import cache

import torch

BF16_PEAKS: tuple[tuple[str, float], ...] = (
    # Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets; most of them print the doubled figure for sparsity.
    ("B300", 2250e12),  # HGX B300: 36 PFLOP/s sparse for eight
    ("GB200", 2500e12),  # GB200 NVL72: 360 PFLOP/s sparse for 72
    ("B200", 2250e12),  # HGX B200: 36 PFLOP/s sparse for eight
    ("GH200", 989e12),  # GH200 Grace Hopper: the H100 SXM's tensor cores
    ("H200 NVL", 835e12),  # H200 NVL: 1671 TFLOP/s sparse
    ("H200", 989e12),  # H200 SXM: 1979 TFLOP/s sparse
    ("H100 NVL", 835e12),  # H100 NVL: 1671 TFLOP/s sparse, per GPU
    ("H100 PCIe", 756e12),  # H100 PCIe: 1513 TFLOP/s sparse
    ("H100", 989e12),  # H100 SXM5: 1979 TFLOP/s sparse
    ("H800", 989e12),  # H800 SXM: the H100's tensor cores, less NVLink
    ("A100", 312e12),  # A100: 312 TFLOP/s dense
    ("A800", 312e12),  # A800: the A100's tensor cores, less NVLink
    ("L40S", 362e12),  # L40S: 362 TFLOP/s dense
    ("L40", 181e12),  # L40: 181 TFLOP/s dense
    ("L4", 121e12),  # L4: 242 TFLOP/s sparse
    ("A10G", 70e12),  # A10G as in AWS G5: 70 TFLOP/s dense
    ("A10", 125e12),  # A10: 125 TFLOP/s dense
    ("A40", 149.7e12),  # A40: 149.7 TFLOP/s dense
)
"""Part of the device's name and its peak; the first that occurs in the name counts, so longer ones stand first."""

MATMUL_SIZE = 1536
MATMUL_SECONDS = 0.2


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s one device reaches at best in matrix products, or None where that is not known.

    A GPU counts with its dense bf16 peak whatever the precision of the run, as published MFU figures do. A CPU is
    measured once per dtype and process, which takes about 0.2 seconds.
    """
    if device.type == "cuda":
        return bf16_peak(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return measured_cpu_peak(dtype, torch.get_num_threads())
    return None


def bf16_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU with this marketing name, or None."""
    words = name.replace("-", " ").split()
    if "MIG" in words:  # a slice of the chip has a share of its peak
        return None
    for part, peak in BF16_PEAKS:
        if all(word in words for word in part.split()):
            return peak
    return None


@cache
def measured_cpu_peak(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of square matrix products on the CPU, the fastest of as many as fit into 0.2 seconds.

    Args:
        dtype: of both factors.
        threads: torch's thread count, which the result depends on; part of the cache key.
    """
    left = torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = left.t().contiguous()
    torch.mm(left, right)
    seconds: list[float] = []
    while not seconds or sum(seconds) < MATMUL_SECONDS:
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / min(seconds)
