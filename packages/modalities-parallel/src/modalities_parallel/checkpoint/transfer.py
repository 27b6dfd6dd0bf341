"""Tensors to and from a checkpoint's folder, over ``torch.distributed.checkpoint``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from modalities_core.errors import CheckpointError, ModalitiesError, first_line
from modalities_core.files import sync_folder
from modalities_core.interfaces import Model, World
from modalities_parallel.checkpoint import metadata
from modalities_parallel.checkpoint.differences import refuse_differences
from modalities_parallel.checkpoint.host_memory import HostMemory
from modalities_parallel.checkpoint.layout import Layout
from modalities_parallel.checkpoint.plan import Plan
from modalities_parallel.checkpoint.state import (
    MODEL,
    elsewhere,
    model_tensors,
    optimizer_tensors,
    parameter_names,
    state_for,
    take_numbers,
)
from modalities_parallel.checkpoint.storage import Reader, TensorPlanner, Writer

NO_GROUP = "torch.distributed is disabled, unavailable or uninitialized"


def save(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """:meth:`modalities_parallel.checkpoint.sharded.Sharded.save`."""
    plan = plan_of(model, optimizer)
    with _quiet():
        write(folder, plan)


def plan_of(model: Model, optimizer: torch.optim.Optimizer) -> Plan:
    """What this rank writes of them."""
    module = cast(nn.Module, model)
    names = parameter_names(module)
    return Plan(model_tensors(module) | optimizer_tensors(names, optimizer))


def stage(memory: HostMemory, model: Model, optimizer: torch.optim.Optimizer) -> Callable[[Path, World], None]:
    """:meth:`modalities_parallel.checkpoint.sharded.Sharded.stage`."""
    plan = plan_of(model, optimizer)
    plan.parts = memory.copy(plan.parts)
    # For good, as filters of warnings cannot be changed for one thread alone.
    warnings.filterwarnings("ignore", message=NO_GROUP)
    return lambda folder, world: write(folder, plan, getattr(world, "group", None))


def write(folder: Path, plan: Plan, group: dist.ProcessGroup | None = None) -> None:
    """Write the plans of all ranks into ``folder``; collective in ``group``, by default that of all ranks."""
    if (folder / metadata.FILE_NAME).exists():
        raise CheckpointError(
            f"{folder} holds a checkpoint already", hint="checkpoints are never overwritten; save into a new folder"
        )
    alone = not dist.is_initialized()
    with _one_failure():
        dcp.save({}, storage_writer=Writer(folder), planner=plan, process_group=group, no_dist=alone)
    sync_folder(folder)


def load(folder: Path, model: Model, optimizer: torch.optim.Optimizer | None) -> None:
    """:meth:`modalities_parallel.checkpoint.sharded.Sharded.load`."""
    module = cast(nn.Module, model)
    names = parameter_names(module)
    try:
        content = metadata.read(folder)
        saved = metadata.layout(content)
    except CheckpointError as error:
        _read(folder, Metadata({}, storage_data={}), {}, error)
        raise
    if optimizer is None:
        saved = {name: kind for name, kind in saved.items() if name.startswith(MODEL)}
        _read_checked(folder, content, saved, module, model_tensors(module))
        return
    with state_for(names, optimizer, saved):
        tensors = model_tensors(module) | optimizer_tensors(names, optimizer)
        _read_checked(folder, content, saved, module, tensors)
        take_numbers(names, optimizer, tensors)


def model_reader(folder: Path) -> Callable[[str], Tensor]:
    """:meth:`modalities_parallel.checkpoint.sharded.Sharded.model_reader`."""
    content = metadata.read(folder)
    saved = metadata.layout(content)

    def read(name: str) -> Tensor:
        if MODEL + name not in saved:
            raise CheckpointError(f"the checkpoint in {folder} has no tensor {name!r}")
        shape, dtype = saved[MODEL + name]
        value = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        reader = Reader(folder, content)
        with _quiet(), _one_failure():
            dcp.load({MODEL + name: value}, storage_reader=reader, planner=TensorPlanner(None), no_dist=True)
        return value

    return read


def _read_checked(
    folder: Path, content: Metadata, saved: Layout, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    wanted = {name: (tuple(value.shape), metadata.dtype_name(value.dtype)) for name, value in tensors.items()}
    wanted |= elsewhere(module, saved)
    refusal: CheckpointError | None = None
    try:
        refuse_differences(saved, wanted, folder)
    except CheckpointError as error:
        refusal = error
    _read(folder, content, tensors, refusal)


def _read(folder: Path, content: Metadata, tensors: dict[str, Tensor], refusal: CheckpointError | None) -> None:
    """Read into ``tensors`` in place; a rank that refuses makes all ranks refuse, so that none waits for it."""
    planner, reader = TensorPlanner(refusal), Reader(folder, content)
    with _quiet(), _one_failure():
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without the remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_GROUP)
        yield


@contextmanager
def _one_failure() -> Generator[None, None, None]:
    """From what torch gathered from all ranks to the one error that says most."""
    try:
        yield
    except dcp.CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in sorted(error.failures.items())}
        known = [failure for failure in failures.values() if isinstance(failure, ModalitiesError)]
        if known:
            raise known[0] from error
        rank, failure = next(iter(failures.items()))
        reason = first_line(failure)
        raise CheckpointError(f"rank {rank} failed: {type(failure).__name__}: {reason}") from failure
