"""Whether the files of a packed folder are there and as large as the manifest says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG

from modalities_core.errors import DataError, ModalitiesError
from modalities_data.disk import as_user_error
from modalities_data.manifest import Shard

PER_TURN = 256
"""Shards the thread looks at between two pauses."""
PAUSE_SECONDS = 0.01


def check_size(path: str, expected: int, status: os.stat_result | None = None) -> None:
    """Refuse a file that is missing, of another size, or no regular file.

    Raises:
        DataError: about ``path``.
    """
    try:
        status = status or os.stat(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the manifest expects {expected} bytes") from None
    except OSError as error:
        raise as_user_error(error, path) from error
    if status.st_size != expected or not S_ISREG(status.st_mode):
        raise DataError(f"{path}: the manifest expects {expected} bytes, the file has {status.st_size}")


class SizeCheck:
    """Checks the files of the first shards at once, and those of the others on a thread.

    A file system over a network takes up to a millisecond for each file, which makes a minute for a folder of tens of
    thousands; a run need not wait for that, since each file is checked again when it is mapped.

    Args:
        folder: the packed folder.
        shards: of its manifest.
        at_once: how many files to check before anything else.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], at_once: int) -> None:
        """Check the first files and begin with the others.

        Raises:
            DataError: one of the first files is missing, or is not what the manifest says.
        """
        self._place = f"{folder}{os.sep}"  # thousands of files: Path objects would take most of the time
        self._shards = shards
        self._found: ModalitiesError | None = None
        first = checked = 0
        while first < len(shards) and checked < at_once:
            checked += self._check(shards[first])
            first += 1
        if first < len(shards):
            threading.Thread(target=self._check_from, args=(first,), name="sizes", daemon=True).start()

    def raise_found(self) -> None:
        """Tell what the thread found.

        Raises:
            DataError: a file is missing, or is not what the manifest says.
        """
        if self._found is not None:
            raise type(self._found)(self._found.message, hint=self._found.hint)

    def _check_from(self, first: int) -> None:
        try:
            for number in range(first, len(self._shards)):
                self._check(self._shards[number])
                if number % PER_TURN == 0:
                    time.sleep(PAUSE_SECONDS)
        except ModalitiesError as error:
            self._found = error

    def _check(self, shard: Shard) -> int:
        """Check the files of a shard; how many they are."""
        files = shard.files()
        for name, expected in files.items():
            check_size(self._place + name, expected)
        return len(files)
