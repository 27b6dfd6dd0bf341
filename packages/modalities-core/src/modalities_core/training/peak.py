"""What a device can compute at best: the denominator of MFU, from a table of data sheets or measured."""

from __future__ import annotations

import torch

from modalities_core.training.matmul import MeasuredPeak, measured_peak

DENSE_PEAKS: tuple[tuple[str, float], ...] = (
    # Dense FLOP/s of bf16 products with fp32 sums, from the makers' data sheets and white papers; most of them print
    # the doubled figure for sparsity too, or only that. Two that compute no bf16 stand with fp16.
    ("B300", 2250e12),  # NVIDIA HGX B300: 36 PFLOP/s sparse for eight
    ("GB200", 2500e12),  # NVIDIA GB200 NVL72: 360 PFLOP/s sparse for 72
    ("B200", 2250e12),  # NVIDIA HGX B200: 36 PFLOP/s sparse for eight
    ("GH200", 989e12),  # NVIDIA GH200 Grace Hopper: the H100 SXM's tensor cores
    ("H200 NVL", 835e12),  # NVIDIA H200 NVL: 1671 TFLOP/s sparse
    ("H200", 989e12),  # NVIDIA H200 SXM: 1979 TFLOP/s sparse
    ("H100 NVL", 835e12),  # NVIDIA H100 NVL: 1671 TFLOP/s sparse, per GPU
    ("H100 PCIe", 756e12),  # NVIDIA H100 PCIe: 1513 TFLOP/s sparse
    ("H100", 989e12),  # NVIDIA H100 SXM5: 1979 TFLOP/s sparse
    ("H800", 989e12),  # NVIDIA H800 SXM: the H100's tensor cores, less NVLink
    ("H20", 148e12),  # NVIDIA H20: 148 TFLOP/s dense
    ("A100", 312e12),  # NVIDIA A100: 312 TFLOP/s dense
    ("A800", 312e12),  # NVIDIA A800: the A100's tensor cores, less NVLink
    ("A30", 165e12),  # NVIDIA A30: 165 TFLOP/s dense
    ("L40S", 362e12),  # NVIDIA L40S: 362 TFLOP/s dense
    ("L40", 181e12),  # NVIDIA L40: 181 TFLOP/s dense
    ("L4", 121e12),  # NVIDIA L4: 242 TFLOP/s sparse
    ("A10G", 70e12),  # NVIDIA A10G as in AWS G5: 70 TFLOP/s dense
    ("A10", 125e12),  # NVIDIA A10: 125 TFLOP/s dense
    ("A40", 149.7e12),  # NVIDIA A40: 149.7 TFLOP/s dense
    ("V100 PCIE", 112e12),  # NVIDIA V100 PCIe: 112 TFLOP/s in fp16
    ("V100", 125e12),  # NVIDIA V100 SXM2: 125 TFLOP/s in fp16
    ("T4", 65e12),  # NVIDIA T4: 65 TFLOP/s in fp16
    ("RTX 6000 Ada", 364.2e12),  # NVIDIA Ada GPU architecture, professional: 364.2 TFLOP/s dense
    ("RTX A6000", 154.8e12),  # NVIDIA Ampere GA102: 154.8 TFLOP/s dense
    ("RTX 5090", 209.5e12),  # NVIDIA RTX Blackwell: 209.5 TFLOP/s dense with fp32 sums
    ("RTX 4090", 165.2e12),  # NVIDIA Ada GPU architecture: 165.2 TFLOP/s dense with fp32 sums
    ("RTX 3090", 71e12),  # NVIDIA Ampere GA102: 71 TFLOP/s dense with fp32 sums
    ("MI355X", 2516.6e12),  # AMD Instinct MI355X: 2.5 PFLOP/s dense
    ("MI350X", 2306.9e12),  # AMD Instinct MI350X: 2.3 PFLOP/s dense
    ("MI325X", 1307.4e12),  # AMD Instinct MI325X: 1307.4 TFLOP/s dense
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X: 1307.4 TFLOP/s dense
    ("MI300A", 980.6e12),  # AMD Instinct MI300A: 980.6 TFLOP/s dense
    ("MI250X", 191.5e12),  # AMD Instinct MI250X: 383 TFLOP/s for its two dies, each of which is one device
    ("MI250", 181e12),  # AMD Instinct MI250: 362.1 TFLOP/s for its two dies
    ("MI210", 181e12),  # AMD Instinct MI210: 181 TFLOP/s
)
"""Words of the device's name and its peak; the first that occur in the name count, so longer ones stand first."""

OTHER_CHIPS = frozenset({"MIG", "Laptop", "Max", "D"})
"""Words that mark a slice of a chip, or a slower one of the same name, whose peak is another."""


def device_peak(device: torch.device, dtype: torch.dtype) -> MeasuredPeak | float | None:
    """FLOP/s one device reaches at best in matrix products, or None where neither is to be had.

    A GPU of the table counts with its dense bf16 peak whatever the precision of the run, as published MFU figures do.
    A CPU, an unknown GPU and a part of one are measured in ``dtype``, once per process: that takes about a quarter
    of a second.
    """
    if device.type == "cuda":
        known = dense_peak(torch.cuda.get_device_name(device))
        return measured_peak(device, dtype) if known is None else known
    return measured_peak(device, dtype) if device.type == "cpu" else None


def dense_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU with this marketing name, as torch gives it on CUDA and ROCm, or None."""
    words = set(name.replace("-", " ").split())
    if words & OTHER_CHIPS:
        return None
    for part, peak in DENSE_PEAKS:
        if words.issuperset(part.split()):
            return peak
    return None


def computing_dtype(executor: object) -> torch.dtype:
    """In which dtype the matrix products of a run are computed, as far as executor and model tell.

    The executor tells by its ``precision``; where that is fp32, a wrapper may still have put mixed precision into
    the model, which then has a ``computing_dtype``.
    """
    precision = getattr(executor, "precision", "bf16")
    if precision == "fp32":
        wrapped = getattr(getattr(executor, "model", None), "computing_dtype", torch.float32)
        return wrapped if isinstance(wrapped, torch.dtype) else torch.float32
    return torch.float16 if precision == "fp16" else torch.bfloat16
