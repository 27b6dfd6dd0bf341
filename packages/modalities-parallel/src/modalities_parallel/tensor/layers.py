"""From a model's parallel plan to the layers, tables and parameters that are split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from modalities_core.interfaces import ParallelPlan
from modalities_core.training.plan import fits, unmatched
from modalities_parallel.pipeline.absent import Absent
from modalities_parallel.tensor.head import can_split
from modalities_parallel.tensor.parameters import COPIES, ONCE, SUMMANDS, Reading, along


@dataclass(slots=True)
class Layers:
    """What of a model is split, by name.

    readings: of every parameter.
    regions: modules that directly hold a split layer and are in no other such module.
    first_block: entered with the hidden states of all tokens; None on the ranks of a pipeline that do not have it.
    embeddings: tables.
    columns: layers and parameters split by output features.
    projections: layers split by output features, in attention.
    outputs: layers split by input features, in attention.
    norms: over all features of a projection.
    head: the output head; None on the ranks of a pipeline that do not have it.
    splits_head: whether its rows are split.
    """

    readings: dict[str, Reading] = field(default_factory=dict)
    regions: dict[str, nn.Module] = field(default_factory=dict)
    first_block: nn.Module | None = None
    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    projections: dict[str, nn.Module] = field(default_factory=dict)
    outputs: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    head: nn.Module | None = None
    splits_head: bool = False


def find_layers(model: nn.Module, plan: ParallelPlan, *, absent: bool = False, component: object = None) -> Layers:
    """What ``plan`` names in ``model``.

    Args:
        model: with whole parameters.
        plan: its own.
        absent: globs may match nothing.
        component: that was given the model, for error positions.

    Raises:
        ConfigError: a glob matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def found(globs: Iterable[str]) -> Iterator[str]:
        for glob in globs:
            names = [name for name in (*modules, *parameters) if fits(name, glob)]
            if not names and not absent:
                raise unmatched(model, glob, modules, component)
            yield from names

    layers = Layers()
    here = {name: module for name, module in modules.items() if not isinstance(module, Absent)}
    layers.embeddings = {name: here[name] for name in found(plan.embeddings) if name in here}
    blocks = set(found(plan.blocks))
    layers.first_block = here.get(next((name for name in modules if name in blocks), ""))
    layers.norms = {name: modules[name] for name in found(plan.column_norms) if name in modules}
    attention = tuple(f"{name}." for name in found(plan.attention))
    columns, rows = list(found(plan.column)), list(found(plan.row))
    layers.columns = tuple(columns)
    layers.projections = {name: modules[name] for name in columns if name.startswith(attention) and name in modules}
    layers.outputs = {name: modules[name] for name in rows if name.startswith(attention) and name in modules}
    holders = sorted({name.rpartition(".")[0] for name in (*columns, *rows)})
    layers.regions = {
        name: modules.get(name, model)
        for name in holders
        if not any(name.startswith(f"{other}.") for other in holders if other != name)
    }
    head = getattr(model, "head", None)
    layers.head = head if isinstance(head, nn.Module) and not isinstance(head, Absent) else None
    layers.splits_head = layers.head is not None and can_split(layers.head)
    head_parameters = set() if layers.head is None else {id(value) for value in layers.head.parameters()}
    if layers.splits_head:
        head_parameters.add(id(getattr(layers.head, "weight", None)))  # tied, it is another module's
    for name, parameter in parameters.items():
        layers.readings[name] = COPIES if id(parameter) in head_parameters else SUMMANDS
    for name in columns:
        layers.readings |= {own: _column(value) for own, value in owned(name, parameters).items()}
    for name in rows:
        layers.readings |= {own: _row(value) for own, value in owned(name, parameters).items()}
    by_rows = {id(value) for name in layers.embeddings for value in owned(name, parameters).values()}
    by_rows |= head_parameters if layers.splits_head else set()
    layers.readings |= {name: along(0) for name, value in parameters.items() if id(value) in by_rows}
    return layers


def owned(name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the layer ``name``, or the one of that name."""
    names = (name, f"{name}.weight", f"{name}.bias")
    return {own: parameters[own] for own in names if own in parameters}


def _column(parameter: Tensor) -> Reading:
    return along(max(parameter.dim() - 2, 0))


def _row(parameter: Tensor) -> Reading:
    return along(parameter.dim() - 1) if parameter.dim() > 1 else ONCE
