"""Hidden states on their way from stage to stage, forward only.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modalities_parallel.mesh import PIPELINE, Meshes, place_along

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER = 8


class Shape(NamedTuple):
    """Of hidden states between two stages, on one rank."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


class Line:
    """The ranks of one pipeline, and what this one knows of the tensors that pass between them.

    Args:
        meshes: of the world.
        device: of this rank.
        timeout: how long to wait for a neighbour; None is torch's default.

    Making one is collective over all ranks.
    """

    def __init__(self, meshes: Meshes, device: torch.device, timeout: timedelta | None) -> None:
        lines = meshes.whole.mesh.flatten(1).T.tolist()
        own, _ = dist.new_subgroups_by_enumeration(lines, timeout=timeout)
        assert isinstance(own, dist.ProcessGroup), "every rank is in a pipeline"
        self.group: dist.ProcessGroup = own
        self.place = place_along(meshes.whole, PIPELINE)
        self.size = meshes.degrees.pp
        self._ranks = next(line for line in lines if dist.get_rank() in line)
        self._device = device
        self._shapes: dict[Hashable, Shape] = {}
        self._sent: list[tuple[dist.Work | None, Tensor]] = []

    def shape(self, stage: int, key: Hashable) -> Shape:
        """Of what goes into ``stage`` when the batch is one of ``key``; it has passed here before."""
        return self._shapes[stage, key]

    def knows(self, stage: int, key: Hashable) -> bool:
        """Whether it has."""
        return (stage, key) in self._shapes

    def send(self, stage: int, hidden_BTD: Tensor, key: Hashable) -> None:
        """Hand hidden states on to ``stage``, without waiting for its rank.

        Args:
            stage: that takes them.
            hidden_BTD: this rank's tokens of them.
            key: batches of one key have hidden states of one shape.
        """
        target = self._ranks[stage % self.size]
        hidden_BTD = hidden_BTD.contiguous()
        if not self.knows(stage, key):
            shape = Shape(tuple(hidden_BTD.shape), hidden_BTD.dtype)
            self._shapes[stage, key] = shape
            header = torch.zeros(HEADER, dtype=torch.int64)
            header[: 2 + len(shape.sizes)] = torch.tensor([DTYPES.index(shape.dtype), len(shape.sizes), *shape.sizes])
            dist.send(header.to(self._device), target, group=self.group)
        self._sent.append((dist.isend(hidden_BTD, target, group=self.group), hidden_BTD))

    def receive(self, stage: int, key: Hashable) -> Tensor:
        """The hidden states that ``stage`` is to work on, from the rank that has the stage before."""
        source = self._ranks[(stage - 1) % self.size]
        if not self.knows(stage, key):
            header = torch.zeros(HEADER, dtype=torch.int64, device=self._device)
            dist.recv(header, source, group=self.group)
            dtype, dimensions, *sizes = header.tolist()
            self._shapes[stage, key] = Shape(tuple(sizes[:dimensions]), DTYPES[dtype])
        shape = self._shapes[stage, key]
        hidden_BTD = torch.empty(shape.sizes, dtype=shape.dtype, device=self._device)
        dist.recv(hidden_BTD, source, group=self.group)
        return hidden_BTD

    def settle(self) -> None:
        """Wait until all that was sent has gone."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()
