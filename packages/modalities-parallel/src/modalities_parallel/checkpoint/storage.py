"""Files of a checkpoint: written durably, read without executing anything, failures said in words."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from modalities_core.errors import CheckpointError, ModalitiesError, ResourceError, first_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Writer(FileSystemWriter):
    """Writes one file per rank, each synced to disk before ``write_data`` returns.

    Args:
        folder: an existing folder without a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True, overwrite=False)
        self._watched = _WatchedFiles()
        self.fs = self._watched

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; ResourceError where the system refuses."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise self._watched.explain(error) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, on rank 0 after all ranks have written."""
        try:
            super().finish(metadata, results)
        except Exception as error:
            raise self._watched.explain(error) from error

    def storage_meta(self) -> StorageMeta:
        """Nothing: the path of this machine's folder does not belong into a file that moves."""
        return StorageMeta()


class _WatchedFiles(FileSystem):
    """Remembers the first error of the operating system.

    torch's archive writer swallows it and reports an unexpected position instead.
    """

    def __init__(self) -> None:
        self.failure: tuple[Path, OSError] | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open ``path``, remembering what goes wrong with it."""
        path = Path(path)
        try:
            if mode != "wb":
                with path.open(mode) as stream:
                    yield cast(io.IOBase, stream)
                return
            with io.BufferedWriter(_WatchedFile(path, self)) as stream:
                yield stream
        except OSError as error:
            self.remember(path, error)
            raise

    def remember(self, path: Path, error: OSError) -> None:
        """Keep the first failure: later ones follow from it."""
        self.failure = self.failure or (path, error)

    def explain(self, error: Exception) -> Exception:
        """A ResourceError where the system refused to write, else ``error`` itself."""
        if self.failure is None or isinstance(error, ModalitiesError):
            return error
        path, cause = self.failure
        if cause.errno not in DISK_FULL:
            return ResourceError(f"the checkpoint cannot be written: {path}: {cause.strerror or cause}")
        free = shutil.disk_usage(path.parent).free
        return ResourceError(
            f"disk full while writing the checkpoint: {path}: {cause.strerror} ({free / 2**20:,.0f} MiB free)",
            hint="free space, or keep fewer checkpoints; what was written of this one is not valid",
        )


class _WatchedFile(io.FileIO):
    """A file that tells of failed writes before anybody can swallow them."""

    def __init__(self, path: Path, files: _WatchedFiles) -> None:
        self._path, self._files = path, files
        super().__init__(path, "wb")

    def write(self, data: Any, /) -> int:
        """As ``io.FileIO``."""
        try:
            return super().write(data)
        except OSError as error:
            self._files.remember(self._path, error)
            raise


class Reader(FileSystemReader):
    """Reads tensors under metadata that was read and checked before.

    Args:
        folder: the checkpoint.
        content: its metadata.
    """

    def __init__(self, folder: Path, content: Metadata) -> None:
        super().__init__(folder)
        self._content = content

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The metadata given at construction: the file is not unpickled again."""
        return self._content

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's parts; CheckpointError where a file is missing or damaged."""
        try:
            return super().read_data(plan, planner)
        except FileNotFoundError as error:
            raise CheckpointError(f"a file of the checkpoint is missing: {error.filename}") from error
        except OSError as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
        except ModalitiesError:
            raise
        except Exception as error:  # a damaged archive can raise nearly anything
            reason = first_line(error)
            raise CheckpointError(
                f"the checkpoint in {self.path} is damaged: {reason}", hint="load an earlier one"
            ) from error


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors and refuses pickled objects, or refuses to load at all, on all ranks alike.

    Args:
        refusal: why this rank cannot load; raised where torch makes the failure of one rank one of all.
    """

    def __init__(self, refusal: ModalitiesError | None) -> None:
        super().__init__()
        self._refusal = refusal

    def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
        """Raise the refusal, if there is one."""
        if self._refusal is not None:
            raise self._refusal
        super().set_up_planner(*arguments, **keywords)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never: torch would unpickle it."""
        raise CheckpointError(f"the checkpoint holds {read_item.dest_index.fqn!r}, which is not a tensor")
