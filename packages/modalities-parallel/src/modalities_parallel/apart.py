"""The ranks of a run for a second thread."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modalities_core.errors import DistributedError, first_line
from modalities_core.interfaces import Model

OTHER_RANK = "another rank has failed or hangs: look for the first error in the logs of the other ranks"


class Apart:
    """A ``World`` of the same ranks that talks over a process group of its own, on the CPU.

    Two threads of a rank must not use one group: the ranks would pair their calls differently.

    Args:
        group: of all ranks, over gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.data_rank, self.data_size = self.rank, self.size
        self.sequence_rank, self.sequence_size = 0, 1
        self.device = torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place; on the CPU."""
        with naming("a sum of a checkpoint", self.rank, self.size):
            dist.all_reduce(values, group=self.group)
        return values

    def norm_share(self, parameters: Iterable[Tensor], order: float) -> Tensor:
        """No training happens here."""
        raise AssertionError("a second thread has no gradients")

    def check(self, model: Model) -> None:
        """No training happens here."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, a JSON value, on every rank; the others' values are ignored."""
        with naming("a broadcast of a checkpoint", self.rank, self.size):
            return broadcast_json(value, self.rank, self.group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    def apart(self) -> Apart:
        """Itself: it is for another thread already."""
        return self

    def close(self) -> None:
        """The world it was made by closes it."""


@contextmanager
def naming(what: str, rank: int, size: int) -> Generator[None, None, None]:
    """Turn what the backend raises into a sentence about ``what`` was being done."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"rank {rank} of {size} lost the others during {what}: {first_line(error)}", hint=OTHER_RANK
        ) from error


def broadcast_json(value: Any, rank: int, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's ``value``, a JSON value, on every rank of ``group``; on the CPU."""
    content = torch.empty(0, dtype=torch.uint8)
    if rank == 0:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([content.numel()])
    dist.broadcast(length, 0, group=group)
    if rank != 0:
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0, group=group)
    return json.loads(bytes(content.tolist()))
