"""Files mapped into memory."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

from modalities_core.errors import DataError
from modalities_data.disk import user_errors
from modalities_data.sizes import check_size

# Before Python 3.13 a mapping holds a file descriptor.
NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) and os.name == "posix" else {}
MOST_FILES = 16_384
"""Of 65,530 mappings that Linux grants a process."""


def mappable() -> int:
    """How many files may stay mapped: where each costs a file descriptor, other code needs some of those too."""
    if NO_DESCRIPTOR:
        return MOST_FILES
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else min(MOST_FILES, max(64, soft // 4))


def mapped(path: Path, expected: int) -> memoryview:
    """The content of a file, read-only.

    Args:
        path: the file.
        expected: its size in bytes.

    Raises:
        DataError: it is missing, has another size, or cannot be read.
    """
    try:
        with user_errors(path), path.open("rb") as stream:
            check_size(str(path), expected, os.fstat(stream.fileno()))
            if not expected:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), expected, access=mmap.ACCESS_READ, **NO_DESCRIPTOR))
    except DataError:
        check_size(str(path), expected)  # a missing file is told of as it is when a folder is opened
        raise
