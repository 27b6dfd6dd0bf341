"""The costliest operations of a profile, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd import DeviceType

NAME_WIDTH = 56


def costliest(averages: Iterable[Any], steps: int, rows: int, memory: bool = False) -> str:
    """Self time per step of the operations that take most of it, and what share that is of all.

    A host's operations are timed on the host, where on a GPU they are only launched; the kernels they become are
    timed on the GPU, in a table of their own.

    Args:
        averages: ``torch.profiler.profile.key_averages()``.
        steps: that were recorded.
        rows: of each table.
        memory: with the bytes each operation left allocated, where memory was recorded.
    """
    events = [event for event in averages if not _is_mark(event)]
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    calls = [event for event in events if event.device_type == DeviceType.CPU]
    host = _table("host", calls, lambda event: event.self_cpu_time_total, steps, rows, memory)
    if not kernels:
        return host
    return _table("GPU", kernels, lambda event: event.self_device_time_total, steps, rows, False) + "\n\n" + host


def _table(
    where: str, events: list[Any], microseconds: Callable[[Any], float], steps: int, rows: int, memory: bool
) -> str:
    total = sum(map(microseconds, events)) or 1.0
    title = f"self time on the {where}, per step"
    lines = [f"{title:<{NAME_WIDTH}}{'ms':>10}{'share':>8}{'calls':>9}" + (f"{'MB kept':>11}" if memory else "")]
    for event in sorted(events, key=microseconds, reverse=True)[:rows]:
        spent = microseconds(event)
        line = f"{_shortened(event.key):<{NAME_WIDTH}}{spent / 1000 / steps:>10.3f}{spent / total:>8.1%}"
        line += f"{event.count / steps:>9,.1f}"
        lines.append(line + (f"{event.self_cpu_memory_usage / 1e6 / steps:>11,.2f}" if memory else ""))
    left = max(0, len(events) - rows)
    lines.append(f"{f'all {len(events)}' if left else 'all':<{NAME_WIDTH}}{total / 1000 / steps:>10.3f}{1:>8.1%}")
    return "\n".join(lines)


def _is_mark(event: Any) -> bool:
    """Whether it marks a stretch of time, such as a step, rather than being an operation."""
    return event.key.startswith("ProfilerStep") or getattr(event, "is_user_annotation", False)


def _shortened(name: str) -> str:
    return name if len(name) < NAME_WIDTH else name[: NAME_WIDTH - 4] + "..."
