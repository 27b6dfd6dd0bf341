"""Reading the metadata of torch.distributed.checkpoint without running what a pickle may carry.

The file is a pickle, and unpickling it as torch does runs any code that it names. Here only the classes that a real
one needs can be named at all.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from modalities_core.errors import CheckpointError
from modalities_parallel.checkpoint.layout import Layout

FILE_NAME = ".metadata"


def _member(kind: object, name: object) -> object:
    """``getattr`` as early Python 3.11 pickles enumerations with it, and for nothing else."""
    if kind is not metadata._MEM_FORMAT_ENCODING or not isinstance(name, str):
        raise pickle.UnpicklingError(f"getattr of {name!r} is not allowed")
    return metadata._MEM_FORMAT_ENCODING[name]


def _allowed() -> dict[tuple[str, str], Any]:
    """What a metadata file may name, and what it gets."""
    names: dict[tuple[str, str], Any] = {
        (metadata.__name__, kind.__name__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
        )
    }
    names[filesystem.__name__, "_StorageInfo"] = filesystem._StorageInfo
    names["torch", "Size"] = torch.Size
    names["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    names["collections", "OrderedDict"] = OrderedDict
    names["builtins", "getattr"] = _member
    # torch's own writer records its folder; pure paths touch no disk, and those of another system can be built.
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PosixPath", "PurePosixPath"):
            names[module, kind] = PurePosixPath
        for kind in ("WindowsPath", "PureWindowsPath"):
            names[module, kind] = PureWindowsPath
    names |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return names


class _AllowListUnpickler(pickle.Unpickler):
    """Builds the classes of the allow-list and nothing else."""

    allowed = _allowed()

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs") from None


def read(folder: Path) -> Metadata:
    """The metadata of the checkpoint in ``folder``; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, holds anything but metadata, or points outside ``folder``.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as stream:
            content = _load(stream)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {FILE_NAME}, so it is not a whole checkpoint",
            hint="a save that was interrupted leaves such a folder; load an earlier one",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, Metadata):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of checkpoint metadata")
    try:
        _check_files(path, content)
        layout(content)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not checkpoint metadata: {error}") from error
    return content


def layout(content: Metadata) -> Layout:
    """Name, global shape and dtype of every tensor.

    Raises:
        CheckpointError: an entry is not a tensor.
    """
    tensors: Layout = {}
    for name, entry in content.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"the checkpoint holds {name!r}, which is a pickled object and not a tensor",
                hint="loading pickled objects can run code, so only tensors are read",
            )
        tensors[name] = (tuple(entry.size), dtype_name(entry.properties.dtype))
    return tensors


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and the like."""
    return str(dtype).removeprefix("torch.")


def _load(stream: BinaryIO) -> Any:
    unpickle: Callable[[], Any] = _AllowListUnpickler(stream).load
    try:
        return unpickle()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{stream.name} is damaged or not checkpoint metadata: {error}",
            hint="nothing of it was executed; load an earlier checkpoint",
        ) from error


def _check_files(path: Path, content: Metadata) -> None:
    """Refuse names that would read files elsewhere."""
    for entry in content.storage_data.values():
        name = entry.relative_path
        plain = isinstance(name, str) and name and PurePosixPath(name).name == PureWindowsPath(name).name == name
        if not plain:
            raise CheckpointError(f"{path} points to {name!r}, which is not a plain file name")
