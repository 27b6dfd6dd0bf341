"""What a micro batch would send along the axes within a model, seen while it goes through on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from modalities_core.interfaces import Model
from modalities_core.training.parameters import as_module
from modalities_core.training.plan import matching
from modalities_parallel.tensor.layers import find_layers


class Traffic(NamedTuple):
    """Bytes of one micro batch in one process, by module: what is passed on, before anything is split.

    block: of hidden states that the first block is given, what a pipeline sends.
    regions: of what each module with split layers is given, which tensor parallelism gathers and sums up.
    exchanged: of queries, keys, values and what comes of them in each attention, which context parallelism exchanges.
    attended: the last of these, as the layer after it is given it.
    rows: of what the experts of each mixture are given, which expert parallelism sends to them and back.
    """

    block: int = 0
    regions: tuple[int, ...] = ()
    exchanged: tuple[int, ...] = ()
    attended: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


class Watch:
    """Collects what modules are given and give, each the first time; blocks that run again say it twice."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, int]] = {
            kind: {} for kind in ("block", "regions", "projected", "attended", "rows")
        }

    def note(self, kind: str, name: str, tensor: object) -> None:
        """Take the bytes of ``tensor``, if it is one."""
        if isinstance(tensor, Tensor):
            self.seen[kind].setdefault(name, tensor.numel() * tensor.element_size())

    def traffic(self) -> Traffic:
        """What was seen."""
        attended = self.seen["attended"]
        exchanged = dict.fromkeys({_holder(name) for name in attended}, 0)
        for kind in ("projected", "attended"):
            for name, size in self.seen[kind].items():
                if _holder(name) in exchanged:
                    exchanged[_holder(name)] += size
        first = next(iter(self.seen["block"].values()), 0)
        others = (self.seen["regions"], exchanged, attended, self.seen["rows"])
        return Traffic(first, *(tuple(values.values()) for values in others))


@contextmanager
def watched(model: Model) -> Iterator[Watch]:
    """Inside, a forward of ``model`` tells what its modules pass on, as far as its parallel plan names them."""
    module, plan, watch = as_module(model), model.parallel_plan(), Watch()
    layers = find_layers(module, plan)
    blocks, mixtures = matching(module, plan.blocks), matching(module, plan.experts)
    hooks = []
    for kind, modules in (("block", blocks), ("regions", layers.regions), ("attended", layers.outputs)):
        hooks += [
            one.register_forward_pre_hook(_given(watch, kind, name), with_kwargs=True) for name, one in modules.items()
        ]
    hooks += [one.register_forward_hook(_gives(watch, name)) for name, one in layers.projections.items()]
    own: list[Any] = list(mixtures.values())
    for name, one in mixtures.items():
        _watch_experts(watch, name, one)
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        for one in own:
            del one.apply_experts


def _given(watch: Watch, kind: str, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        watch.note(kind, name, next(iter((*arguments, *keywords.values())), None))

    return hook


def _gives(watch: Watch, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        watch.note("projected", name, output)

    return hook


def _watch_experts(watch: Watch, name: str, module: Any) -> None:
    apply = module.apply_experts

    def apply_experts(rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        watch.note("rows", name, rows_RD)
        return apply(rows_RD, ends_E)

    module.apply_experts = apply_experts


def _holder(name: str) -> str:
    return name.rpartition(".")[0]
