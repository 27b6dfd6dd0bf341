"""Room in the memory of the host for a copy of what a rank writes."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from modalities_core.training.memory import available_bytes

ALIGNMENT = 64
PIECE_BYTES = 8 << 20
"""What one thread copies at once."""
MOST_THREADS = 8


class HostMemory:
    """Kept from one copy to the next, as the first touch of memory costs many times a copy; pinned for GPUs."""

    def __init__(self) -> None:
        self._room: mmap.mmap | bytearray | None = None
        self._pinned = False
        self._reserving: threading.Thread | None = None

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Begin to make room for copies of ``tensors``, in a thread of its own."""
        self._wait()
        size, cuda = _places(tensors)[1], _any_cuda(tensors)

        def make_room() -> None:
            with suppress(MemoryError):  # whoever then wants the copy is told
                room = self._room_for(size, cuda)
                for start in range(0, size, PIECE_BYTES):
                    ctypes.memset(_address(room) + start, 0, min(PIECE_BYTES, size - start))

        self._reserving = threading.Thread(target=make_room, name="room for checkpoints", daemon=True)
        self._reserving.start()

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``, complete; those of the call before are gone.

        Raises:
            MemoryError: the host has no room for them.
        """
        self._wait()
        places, size = _places(tensors)
        room = self._room_for(size, _any_cuda(tensors))
        copies = {name: _view(room, places[name], value) for name, value in tensors.items()}
        on_host = []
        for name, value in tensors.items():
            if value.device.type == "cpu" and value.is_contiguous():
                on_host.append((copies[name], value))
            else:
                copies[name].copy_(value, non_blocking=self._pinned)
        _copy_on_host(on_host)
        if _any_cuda(tensors):
            torch.cuda.current_stream().synchronize()
        return copies

    def _wait(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _room_for(self, size: int, cuda: bool) -> mmap.mmap | bytearray:
        if self._room is not None and len(self._room) >= size:
            return self._room
        if self._room is not None and self._pinned:
            _cuda_runtime().cudaHostUnregister(_address(self._room))
        self._room, self._pinned = None, False
        available = available_bytes()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if available is not None and size * ranks_here > available:
            raise MemoryError
        self._room = _allocate(size)
        if cuda:
            self._pinned = int(_cuda_runtime().cudaHostRegister(_address(self._room), size, 0)) == 0
        return self._room


def _places(tensors: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """Where the copy of each begins, and how many bytes they take together."""
    places, end = {}, 0
    for name, value in tensors.items():
        places[name] = end
        end += math.ceil(value.numel() * value.element_size() / ALIGNMENT) * ALIGNMENT
    return places, max(end, 1)


def _any_cuda(tensors: dict[str, Tensor]) -> bool:
    return any(value.is_cuda for value in tensors.values())


def _allocate(size: int) -> mmap.mmap | bytearray:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return bytearray(size)
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # not every kernel has huge pages
            room.madvise(mmap.MADV_HUGEPAGE)
    return room


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _address(room: mmap.mmap | bytearray) -> int:
    return torch.frombuffer(room, dtype=torch.uint8).data_ptr()


def _view(room: mmap.mmap | bytearray, place: int, value: Tensor) -> Tensor:
    """A tensor like ``value`` in ``room``, with a storage of its own: torch.save writes whole storages."""
    if not value.numel():
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")
    flat = torch.frombuffer(room, dtype=torch.uint8, count=value.numel() * value.element_size(), offset=place)
    return flat.view(value.dtype).view(value.shape)


def _copy_on_host(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first.

    Not with torch's own threads: they wait for each other after every tensor, which on a busy machine takes longer
    than copying with one.
    """
    pieces = []
    for copy, value in pairs:
        size, to, source = value.numel() * value.element_size(), copy.data_ptr(), value.data_ptr()
        starts = range(0, size, PIECE_BYTES)
        pieces += [(to + start, source + start, min(PIECE_BYTES, size - start)) for start in starts]
    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as pool:
        for _ in pool.map(lambda piece: ctypes.memmove(*piece), pieces):
            pass
