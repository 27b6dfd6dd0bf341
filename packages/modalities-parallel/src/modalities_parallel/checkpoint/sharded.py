"""A checkpoint in which every rank writes its own part and any number of ranks can read.

Light to import: torch.distributed.checkpoint and DTensor are loaded with the first checkpoint, so that checking a
configuration does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modalities_core.interfaces import Model, World
from modalities_parallel.checkpoint.layout import Layout

if TYPE_CHECKING:
    from modalities_parallel.checkpoint.host_memory import HostMemory


class Sharded:
    """Checkpoints over ``torch.distributed.checkpoint``, one file per rank, readable under any number of ranks.

    Only tensors are written, so nothing has to be unpickled: parameters, persistent buffers, and what the optimizer
    remembers of each parameter. Learning rate, betas and other settings of the optimizer's groups are the
    configuration's, not the checkpoint's.
    """

    def __init__(self) -> None:
        self._memory: HostMemory | None = None

    def save(self, folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Write every rank's part into the existing ``folder``, synced to disk; collective.

        Raises:
            ResourceError: the disk is full, or the system refuses to write; on all ranks.
            CheckpointError: ``folder`` holds a checkpoint already, or the state is not made of tensors.
        """
        from modalities_parallel.checkpoint import transfer

        transfer.save(folder, model, optimizer)

    def stage(self, model: Model, optimizer: torch.optim.Optimizer) -> Callable[[Path, World], None]:
        """Copy what :meth:`save` would write into the memory of the host, pinned where it comes from a GPU.

        The memory is kept from one call to the next.

        Returns:
            A function that writes the copy into an existing folder, in another thread; collective among the ranks that
            it is given. It has to end before the next call.

        Raises:
            MemoryError: the host has no room for the copy.
            CheckpointError: the state is not made of tensors.
        """
        from modalities_parallel.checkpoint import transfer

        return transfer.stage(self._host_memory(), model, optimizer)

    def reserve(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Begin to make room for what :meth:`stage` will copy, without waiting for it."""
        from modalities_parallel.checkpoint import transfer

        self._host_memory().reserve(transfer.plan_of(model, optimizer).parts)

    def load(self, folder: Path, model: Model, optimizer: torch.optim.Optimizer | None) -> None:
        """Read into ``model`` and, unless None, ``optimizer``, fresh or not, under any number of ranks; collective.

        Every name, shape and dtype is compared before anything is changed.

        Raises:
            CheckpointError: tensors are missing, extra, of another shape or dtype, or files are damaged.
        """
        from modalities_parallel.checkpoint import transfer

        transfer.load(folder, model, optimizer)

    def model_reader(self, folder: Path) -> Callable[[str], torch.Tensor]:
        """A function from a parameter's or buffer's name to its whole value on the CPU, read when it is asked for.

        For exports: one process reads a checkpoint of any number of ranks with one tensor in memory at a time.

        Raises:
            CheckpointError: the metadata is missing or damaged; the function raises it for a name that is not there.
        """
        from modalities_parallel.checkpoint import transfer

        return transfer.model_reader(folder)

    def tensors(self, folder: Path) -> Layout:
        """Name, global shape and dtype of every tensor in the checkpoint, from its metadata alone.

        Raises:
            CheckpointError: the metadata is missing or damaged.
        """
        from modalities_parallel.checkpoint import metadata

        return metadata.layout(metadata.read(folder))

    def _host_memory(self) -> HostMemory:
        from modalities_parallel.checkpoint.host_memory import HostMemory

        self._memory = self._memory or HostMemory()
        return self._memory
