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


def available_bytes() -> int | None:
    """Bytes of the host's memory that this process could still take, others left alone; None where nobody tells.

    What it gave back after its peak counts as taken, as it is likely to need that again.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = (line.split() for line in info.read_text().splitlines())
    found = [1024 * int(fields[1]) for fields in lines if fields[0] == "MemAvailable:"]
    usage = memory(torch.device("cpu"))
    free = min([*found, *_left_by_limits()])
    return max(0, free - (usage["peak_resident"] - usage["resident"]))


def _left_by_limits() -> list[int]:
    """What control groups, as of containers and batch jobs, leave this process; caches of files can be given up."""
    left = []
    for root, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = (root / limit).read_text().strip()
            lines = (line.split() for line in (root / "memory.stat").read_text().splitlines())
            caches = sum(int(fields[1]) for fields in lines if fields[0] in ("inactive_file", "active_file"))
            if most != "max":
                left.append(int(most) - int((root / used).read_text()) + caches)
        except (OSError, ValueError, IndexError):
            continue
    return left
