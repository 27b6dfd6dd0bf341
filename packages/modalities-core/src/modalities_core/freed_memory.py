"""What happens to memory that is freed: glibc's malloc gives large pieces back to the system, and asks again.

Each page that comes back from the system is cleared and mapped anew, which takes longer than much of what is then
computed in it. Nothing here has an effect where there is no glibc.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Of glibc's malloc.h, see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 << 10, M_MMAP_MAX: 65536}
LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed(most: int) -> None:
    """Let this process keep up to ``most`` bytes that it has freed, for as long as it runs, for what it needs next."""
    _set({M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD, M_TRIM_THRESHOLD: most})


@contextmanager
def all_freed_kept() -> Iterator[None]:
    """Whatever is freed inside stays with this process, and goes back to the system at the end."""
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})
    try:
        yield
    finally:
        _set(DEFAULTS)
        trim = _glibc("malloc_trim")
        if trim is not None:
            trim(0)


def _set(options: dict[int, int]) -> None:
    set_option = _glibc("mallopt")
    if set_option is not None:
        for option, value in options.items():
            set_option(option, value)


def _glibc(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
