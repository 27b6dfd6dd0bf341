"""Building a module without memory, and giving its tensors later exactly what its constructor would have.

Every operation on a tensor during construction is written down instead of done. What it would have computed follows
for one group of connected tensors at a time: in order, on the CPU, with a random stream of the group's own. So no
process holds more than one group, mostly one parameter, and the values are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from modalities_models.initialization import generator_for

META = torch.device("meta")
Built = TypeVar("Built", bound=nn.Module)


class _Operation(NamedTuple):
    """One operation, and what it was called with and gave; tensors without memory stand for those to come."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any

    @property
    def storages(self) -> set[int]:
        """Of all tensors without memory that it reads, writes or makes."""
        return {_storage(value) for value in tree_leaves((self.arguments, self.keywords, self.result)) if _empty(value)}


class _Recorder(TorchDispatchMode):
    """Writes operations down; those that only change a tensor in place are not done at all."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        in_place = func._schema.name.endswith("_") and args and _empty(args[0])
        result = args[0] if in_place else func(*args, **keywords)
        if any(map(_empty, tree_leaves((args, keywords, result)))):
            self.operations.append(_Operation(func, args, keywords, result))
        return result


class _Literals(TorchFunctionMode):
    """Makes tensors of numbers on the CPU first: made without memory, the numbers would be lost."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor):
            return func(*args, **keywords)
        value = func(*args, **{**keywords, "device": "cpu"})
        return value.to(META) if torch.device(keywords.get("device") or META) == META else value


class _Place(NamedTuple):
    """Where a named tensor lies."""

    storage: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, memory: dict[int, Tensor]) -> Tensor:
        """The tensor, in what has been computed."""
        return memory[self.storage].as_strided(self.size, self.stride, self.offset)


class Construction(Generic[Built]):
    """A module on the meta device, and the values that its constructor gives.

    Args:
        build: the constructor; it may do anything to tensors that does not depend on their values.
    """

    def __init__(self, build: Callable[[], Built]) -> None:
        with _Recorder() as recorder, META, _Literals():
            self.module: Built = build()
            _register_loose_tensors(self.module)
        # Noted now, because whoever shards the module puts other tensors into it.
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._places = {name: _place(value) for name, value in named.items()}
        self._groups = _groups(recorder.operations)

    def values(self, seed: int, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of each parameter and buffer, floating ones in float32, on the CPU.

        Args:
            seed: of the random streams.
            without: names that are not needed.
        """
        wanted = {name: place for name, place in self._places.items() if name not in without}
        together: dict[int, list[str]] = {}
        for name, place in wanted.items():
            together.setdefault(id(self._groups[place.storage]), []).append(name)
        for names in together.values():
            memory = _computed(self._groups[wanted[names[0]].storage], generator_for(seed, names[0]).initial_seed())
            for name in names:
                value = wanted[name].of(memory)
                yield name, value.float() if value.is_floating_point() else value


@torch.no_grad()
def _computed(operations: list[_Operation], seed: int) -> dict[int, Tensor]:
    """All memory that a group of operations fills, by storage."""
    memory: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if _empty(value):
            return _place(value).of(memory)
        return torch.device("cpu") if value == META else value

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for function, arguments, keywords, result in operations:
            results = [value for value in tree_leaves(result) if _empty(value)]
            if results and not function._schema.is_mutable and all(_storage(value) in memory for value in results):
                continue  # another view of what is there
            made = function(*tree_map(real, arguments), **tree_map(real, keywords))
            for value, here in zip(tree_leaves(result), tree_leaves(made), strict=True):
                if _empty(value) and _storage(value) not in memory:
                    laid = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
                    memory[_storage(value)] = laid.copy_(here)
    return memory


def _groups(operations: list[_Operation]) -> dict[int, list[_Operation]]:
    """For each storage all operations that it, or one it is connected with, takes part in; in their order."""
    leader: dict[int, int] = {}

    def find(storage: int) -> int:
        while leader.setdefault(storage, storage) != storage:
            leader[storage] = storage = leader[leader[storage]]
        return storage

    parts = [operation.storages for operation in operations]
    for storages in parts:
        first, *others = storages
        for other in others:
            leader[find(other)] = find(first)
    groups: dict[int, list[_Operation]] = {}
    for operation, storages in zip(operations, parts, strict=True):
        groups.setdefault(find(next(iter(storages))), []).append(operation)
    return {storage: groups[find(storage)] for storage in leader}


def _register_loose_tensors(module: nn.Module) -> None:
    """Make buffers of tensors that modules keep as plain attributes, so that they get memory and values too."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                delattr(part, name)
                part.register_buffer(name, value.clone(), persistent=False)


def _empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _place(value: Tensor) -> _Place:
    return _Place(_storage(value), value.size(), value.stride(), int(value.storage_offset()))
