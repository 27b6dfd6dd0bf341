"""How much memory a process has: on its GPU, or as the operating system counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def memory(device: torch.device) -> dict[str, int]:
    """Bytes by kind, without waiting for the device; nothing where nobody tells.

    On a GPU ``allocated`` by tensors and ``reserved`` by PyTorch's allocator, each now and, as ``peak_...``, at most
    since the process began. Elsewhere the process's ``resident`` set and its ``peak_resident``.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes there, in units of 1024 elsewhere; what is resident now it does not tell
        return {"peak_resident": peak}
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
    # Linux brings the peak up to date now and then only.
    return {"resident": now, "peak_resident": max(now, 1024 * peak)}


def most_relevant(bytes_by_kind: dict[str, int]) -> int:
    """The one figure of :func:`memory` to watch: a GPU's peak allocation, else what is resident; 0 without any."""
    for kind in ("peak_allocated", "resident", "peak_resident"):
        if kind in bytes_by_kind:
            return bytes_by_kind[kind]
    return 0
