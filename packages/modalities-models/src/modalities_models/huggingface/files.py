"""Safetensors files, read and written one tensor at a time; pickles are neither."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ResourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """On disk and in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of a folder, each read when it is asked for.

    Args:
        folder: with ``model.safetensors``, or with shards and their index.

    Raises:
        CheckpointError: there are none, they are pickles, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        self.files = _files(folder)
        """Name of every tensor, and the file it lies in."""

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.files)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: it is not there, or its file is damaged.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        with _damage(self.folder / self.files[name]):
            return self._handle(self.files[name]).get_tensor(name)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor, without reading it."""
        with _damage(self.folder / self.files[name]):
            part = self._handle(self.files[name]).get_slice(name)
            shape, code = tuple(part.get_shape()), part.get_dtype()
        dtypes = {code: dtype for dtype, code in _CODES.items()}
        if code not in dtypes:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: {name!r} is of type {code}; weights have to be {', '.join(dtypes)}",
                hint="import the weights before quantization",
            )
        return TensorInfo(name, shape, dtypes[code])

    def _handle(self, file: str) -> Any:
        """The file, mapped; one at a time, in whose order tensors are mostly asked for."""
        if self._open is None or self._open[0] != file:
            self._open = (file, open_file(self.folder / file))
        return self._open[1]


def open_file(path: Path) -> Any:
    """A safetensors file, mapped: its tensors are read when they are asked for.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import safe_open

    with _damage(path):
        return safe_open(path, framework="pt", device="cpu")


def write(folder: Path, plan: Sequence[TensorInfo], tensors: Iterable[Tensor], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors one by one into one file, or into shards with an index.

    Args:
        folder: where to; exists.
        plan: what will come.
        tensors: in the order of the plan; shapes and dtypes have to be as planned.
        shard_bytes: the most in one file, unless one tensor alone is larger.

    Returns:
        Bytes of all tensors.

    Raises:
        ResourceError: the disk is full.
    """
    shards = _shards(plan, shard_bytes)
    single = len(shards) == 1
    names = [
        SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in _from_one(shards)
    ]
    source = iter(tensors)
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name, shard, source)
        total = sum(info.bytes for info in plan)
        if not single:
            where = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror or error}") from error
    return total


def _write_file(path: Path, shard: Sequence[TensorInfo], tensors: Iterator[Tensor]) -> None:
    """The format of safetensors: eight bytes of length, a JSON header, then the tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in shard:
        ends = [position, position + info.bytes]
        header[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for info in shard:
            tensor = next(tensors)
            assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, info
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def _shards(plan: Sequence[TensorInfo], most: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in plan:
        if shards[-1] and size + info.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.bytes
    return shards


def _from_one(items: Sequence[object]) -> range:
    return range(1, len(items) + 1)


def _files(folder: Path) -> dict[str, str]:
    """Name of every tensor, and the file it lies in."""
    if (folder / SINGLE).is_file():
        return dict.fromkeys(open_file(folder / SINGLE).keys(), SINGLE)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        return {name: file for file in found for name in open_file(folder / file).keys()}  # noqa: SIM118
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which run code when they are read; "
            "only safetensors are read",
            hint='convert them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}).save_pretrained('converted')\"",
        )
    raise CheckpointError(f"{folder} holds no weights: there is no {SINGLE} and no {INDEX}")


def _indexed(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        places: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        places = dict(places)
        files = sorted(set(places.values()))
        plain = all(file == os.path.basename(file) and file.endswith(".safetensors") for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not plain:
        raise CheckpointError(f"{path} points to files that are no safetensors beside it")
    for file in files:
        inside = set(open_file(folder / file).keys())
        if lost := sorted(name for name, place in places.items() if place == file and name not in inside):
            raise CheckpointError(f"{folder / file} lacks {lost[0]!r}, which {INDEX} says it holds")
    return dict(places)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="download it again") from error
