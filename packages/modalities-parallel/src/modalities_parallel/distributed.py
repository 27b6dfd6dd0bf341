"""The processes of a run that torchrun started."""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from modalities_core.errors import ConfigError, DistributedError, first_line
from modalities_core.interfaces import Model
from modalities_core.training.norms import norm_share
from modalities_parallel.apart import OTHER_RANK, Apart, broadcast_json, naming
from modalities_parallel.environment import Launch
from modalities_parallel.mesh import Degrees, Meshes, device_meshes
from modalities_parallel.sharing import some_of, unshared


class Distributed:
    """A ``World`` of several processes: NCCL between GPUs, gloo between CPUs.

    ``meshes`` has the axes of ``Degrees``, and ``mesh`` is the whole one; data-parallel ranks are numbered along both
    of their axes. ``timeout`` is how long ranks wait for each other.

    Args:
        place: this process in its launch.
        degrees: ranks along each axis of the mesh.
        timeout_seconds: how long ranks wait for each other.
    """

    def __init__(self, place: Launch, degrees: Degrees, timeout_seconds: float = 600.0) -> None:
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds is {timeout_seconds}, but ranks have to wait for each other")
        self.rank = place.rank
        self.size = place.size
        self.device = _device(place)
        self.timeout = timedelta(seconds=timeout_seconds)
        _join(place, self.device, self.timeout)
        # Only gloo can name the ranks that miss a barrier.
        self._control: dist.ProcessGroup | None = None
        if self.device.type == "cuda":
            self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self.timeout))
        self.arrange(degrees)

    def arrange(self, degrees: Degrees) -> None:
        """Take another mesh of the same ranks; collective. What was built in the one before has to be gone."""
        self.meshes: Meshes = device_meshes(self.device.type, degrees, self.timeout)
        self.mesh: DeviceMesh = self.meshes.whole
        self.data_size = degrees.dp_replicate * degrees.dp_shard
        self.data_rank = self.meshes.data_rank
        self.sequence_size = degrees.cp
        self.sequence_rank = self.meshes.sequence_rank

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place; ``values`` of any shape, on the device or the CPU."""
        with naming("a sum", self.rank, self.size):
            dist.all_reduce(values)
        return values

    def norm_share(self, parameters: Iterable[Tensor], order: float) -> Tensor:
        """This rank's share of the norm of the gradients, a scalar on the device: of order 1, 2 or infinity.

        Copies of a gradient share what it adds between them, so that the sum over all ranks is the whole; the largest
        is the largest, however often it is there. Nothing is sent and the host does not wait.
        """
        copies: dict[int, list[Tensor]] = {}
        for gradient in (p.grad for p in parameters if p.grad is not None):
            if isinstance(gradient, DTensor):
                copies.setdefault(_replicas(gradient), []).append(gradient.to_local())
            else:
                copies.setdefault(self.size, []).append(gradient)
        # Gradients that are offloaded are on the CPU, but sums over ranks are made on the device.
        if math.isinf(order):
            return norm_share(itertools.chain(*copies.values()), order, self.device).to(self.device)
        shares = (
            norm_share(gradients, order, self.device).to(self.device) / count for count, gradients in copies.items()
        )
        return sum(shares, start=norm_share((), order, self.device))

    def check(self, model: Model) -> None:
        """Raise ConfigError if gradients of ``model`` would not be reduced over the ranks."""
        if self.size == 1:
            return
        parameters = dict(cast(nn.Module, model).named_parameters())
        local = [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)]
        if local:
            raise unshared(self.meshes.degrees, some_of(local), model)
        # A stage of a pipeline is on the ranks of its own only.
        together = self.size // self.meshes.degrees.pp
        strangers = {name: _ranks_of(parameter) for name, parameter in parameters.items()}
        strangers = {name: ranks for name, ranks in strangers.items() if ranks != together}
        if strangers:
            raise ConfigError(
                f"{some_of(list(strangers))}: shared between {next(iter(strangers.values()))} ranks, but {together} "
                f"train them ({self.meshes.degrees})",
                hint="let parallel.fsdp2 share it out, around a model that is not sharded yet",
                about=model,
            )

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, a JSON value, on every rank; the others' values are ignored."""
        with naming("a broadcast", self.rank, self.size):
            return broadcast_json(value, self.rank, self._control)

    def apart(self) -> Apart:
        """The same ranks, for another thread to talk to; collective."""
        return Apart(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self.timeout)))

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            DistributedError: some ranks do not come in time; on rank 0 the message names them.
        """
        try:
            dist.monitored_barrier(self._control, timeout=self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise DistributedError(_missing(str(error), self.rank, self.timeout), hint=OTHER_RANK) from error

    def close(self) -> None:
        """Leave the process group; sharded models and optimizers have to be dropped before. May be called twice."""
        if not dist.is_initialized():
            return
        # Sharded tensors in reference cycles keep communication threads alive, which abort an exiting interpreter.
        gc.collect()
        dist.destroy_process_group()


def _device(place: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {place.local_rank} has no GPU: this node shows {torch.cuda.device_count()}",
            hint=f"start at most {torch.cuda.device_count()} processes on it (torchrun --nproc-per-node)",
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(place: Launch, device: torch.device, timeout: timedelta) -> None:
    """Enter the process group, or say in one sentence why not."""
    if dist.is_initialized():
        raise ConfigError("this process is already in a process group", hint="build one world per process")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        where = f"{place.address}:{place.port}"
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise DistributedError(
                f"port {place.port} on {place.address} is in use, so the ranks cannot meet there",
                hint="another run uses it: set another MASTER_PORT, or let torchrun choose one with --standalone",
            ) from error
        raise DistributedError(
            f"rank {place.rank} waited {timeout.total_seconds():g} s for all {place.size} ranks to meet at {where}: "
            f"{first_line(error)}",
            hint="are all ranks started? In a shell that kept variables of an earlier launch: "
            "unset RANK WORLD_SIZE LOCAL_RANK",
        ) from error


def _ranks_of(parameter: Tensor) -> int:
    return cast(DTensor, parameter).device_mesh.size()


def _replicas(gradient: DTensor) -> int:
    """How many ranks hold the same values."""
    assert not any(placement.is_partial() for placement in gradient.placements), "a gradient was not reduced"
    return math.prod(
        gradient.device_mesh.size(axis)
        for axis, placement in enumerate(gradient.placements)
        if placement.is_replicate()
    )


def _missing(text: str, rank: int, timeout: timedelta) -> str:
    seconds = f"{timeout.total_seconds():g} s"
    if match := re.search(r"Ranks? ([\d, ]+) failed to pass", text):
        names = match[1].strip(" ,")
        return f"rank{'s' if ',' in names else ''} {names} did not reach a barrier within {seconds}"
    return f"rank {rank} waited {seconds} at a barrier that not all ranks reached: {text.strip().splitlines()[0]}"
