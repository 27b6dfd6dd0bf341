"""Rows of values out of many mapped files, taken in one indexing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

ABSENT = -(2**62)
"""An offset that makes every place negative: there is nothing mapped to index."""


def checked(indices: np.ndarray, samples: int) -> np.ndarray:
    """``indices`` as int64.

    Raises:
        IndexError: one is not in [0, samples).
    """
    indices = np.asarray(indices, np.int64)
    # Without its sign a negative number is a huge one: one pass finds both.
    if indices.size and int(np.maximum.reduce(indices.view(np.uint64), axis=None)) >= samples:
        raise IndexError(f"sample indices are in [0, {samples}), found {indices.min()} to {indices.max()}")
    return indices


class Rows:
    """Rows ``i * step`` to ``i * step + width`` of the values of several files, which count as one long row.

    A mapped file is a range of this process's addresses, so one strided view that spans all of them takes rows out of
    any number of files at the speed of one array. Which rows lie wholly inside a file, and how far its addresses are
    from its numbers, is one table; only rows that run on into the next file are put together piece by piece.

    Args:
        lengths: (files,) values in each.
        step: values from the start of a row to the start of the next.
        width: values in a row, at least ``step``.
        dtype: of the values.
        stored: gives the values of a file by its number; None stands for a file of nothing but 1.
        keep: whether all files may stay mapped; otherwise ``stored`` is asked for every row.
    """

    def __init__(
        self,
        lengths: list[int],
        step: int,
        width: int,
        dtype: np.dtype,
        stored: Callable[[int], np.ndarray | None],
        keep: bool,
    ) -> None:
        """Lay down which rows lie inside which file."""
        self._step, self._width, self._dtype, self._stored, self._keep = step, width, dtype, stored, keep
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._begins = self._ends - np.array(lengths, np.int64)
        self._count = max(0, (int(self._ends[-1]) - width) // step + 1)
        first = -(-self._begins // step)
        behind = np.maximum(first, (self._ends - width) // step + 1)
        # Rows from first to behind lie inside their file, those up to the next first run on into other files.
        self._bounds = np.minimum(np.stack([first, behind], 1).ravel(), self._count)
        self._kept: dict[int, np.ndarray] = {}
        self._addresses = np.zeros(len(lengths), np.int64)
        self._view = (np.empty((0, width), dtype), np.full(len(self._bounds) + 1, ABSENT))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many rows there are."""
        return self._count

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """(N, width): the rows at ``indices``, (N,) integers.

        Raises:
            IndexError: an index is not in [0, len).
        """
        indices = np.asarray(indices, np.int64)
        window, offsets = self._view
        places = indices * self._step
        places += offsets[self._bounds.searchsorted(indices, "right")]
        if len(places) and np.minimum.reduce(places) >= 0:
            # One value of each row first: these loads wait for memory together, copies of rows one after the other.
            window[:, 0].take(places)
            return window[places]
        return self._gather_mapping(checked(indices, self._count))

    def _gather_mapping(self, indices: np.ndarray) -> np.ndarray:
        """The same where an index is out of range, a file is not mapped yet, or a row runs on into the next."""
        starts = indices * self._step
        files = self._ends.searchsorted(starts, "right")
        if self._keep:
            self._map(np.unique(files).tolist())
        window, offsets = self._view
        places = starts + offsets[self._bounds.searchsorted(indices, "right")]
        inside = places >= 0
        result = np.empty((len(indices), self._width), self._dtype)
        result[inside] = window[places[inside]]
        others = np.flatnonzero(~inside)
        within = starts[others] - self._begins[files[others]]
        for row, file, place in zip(others.tolist(), files[others].tolist(), within.tolist(), strict=True):
            self._copy(file, place, result[row])
        return result

    def _copy(self, file: int, place: int, row: np.ndarray) -> None:
        """Fill ``row`` with the values from ``place`` of ``file`` on, from as many files as it takes."""
        filled = 0
        while filled < self._width:
            stored = self._stored(file)
            count = min(self._width - filled, int(self._ends[file] - self._begins[file]) - place)
            row[filled : filled + count] = 1 if stored is None else stored[place : place + count]
            filled += count
            file, place = file + 1, 0

    def _map(self, files: list[int]) -> None:
        """Have ``files`` in the view."""
        with self._lock:
            missing = [(file, self._stored(file)) for file in files if file not in self._kept]
            found = {file: values for file, values in missing if values is not None and len(values)}
            if found:
                # Kept for as long as this object: no address in the view may outlive its mapping.
                self._kept |= found
                self._addresses[list(found)] = [values.ctypes.data for values in found.values()]
                self._view = self._spanning()

    def _spanning(self) -> tuple[np.ndarray, np.ndarray]:
        """A view over the addresses of all kept files, and what to add to a row's start to have its place there."""
        size = self._dtype.itemsize
        files = self._addresses.nonzero()[0]
        addresses = self._addresses[files]
        origin = int(addresses.min())
        behind = int((addresses + size * (self._ends - self._begins)[files]).max())
        offsets = np.full(len(self._bounds) + 1, ABSENT)
        count = max(0, (behind - origin) // size - self._width + 1)
        if (addresses % size).any() or count * self._width * size >= 2**63:
            return self._view[0], offsets
        offsets[2 * files + 1] = (addresses - origin) // size - self._begins[files]
        span = _Span((count, self._width), (size, size), self._dtype.str, origin)
        return np.asarray(span), offsets


class _Span:
    """A range of addresses that numpy can make an array of; what is mapped there is for the one who asks to know."""

    def __init__(self, shape: tuple[int, int], strides: tuple[int, int], dtype: str, address: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3, "shape": shape, "strides": strides, "typestr": dtype, "data": (address, True),
        }  # fmt: skip
