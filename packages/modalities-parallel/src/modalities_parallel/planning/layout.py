"""How a planned run's tensors lie on the ranks, and what of the model a rank of each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model, ParallelPlan
from modalities_core.training.parameters import as_module
from modalities_core.training.plan import matching
from modalities_parallel.mesh import Degrees
from modalities_parallel.pipeline.division import divide, held_stages
from modalities_parallel.sharding import units_of
from modalities_parallel.tensor.layers import Layers, find_layers

_known_layers: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()


class Layout(NamedTuple):
    """How a model's tensors lie on the ranks.

    degrees: ranks along each axis of the mesh.
    wrapped: whether FSDP2 gathers weights and reduces gradients.
    param_dtype: of the weights that forward and backward compute with.
    reduce_dtype: of gradients on their way.
    reshard: whether blocks free their gathered weights after the forward.
    blocks_per_unit: neighbouring blocks that are gathered at once.
    prefetch: units gathered ahead.
    offload: whether weights, gradients and the optimizer's states are in the host's memory.
    stages_per_rank: of a pipeline.
    schedule: of a pipeline, as executor.pipeline has it.
    """

    degrees: Degrees
    wrapped: bool
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard: bool
    blocks_per_unit: int = 1
    prefetch: int = 0
    offload: bool = False
    stages_per_rank: int = 1
    schedule: str = "1f1b"

    @property
    def shards(self) -> int:
        """Ranks that each weight, or its tensor-parallel part, is sharded over."""
        return self.degrees.shards

    @property
    def replicas(self) -> int:
        """Groups that each hold the whole model."""
        return self.degrees.dp_replicate


class Held(NamedTuple):
    """A parameter as ranks of its stage have it.

    parameter: whole.
    gathered: elements of this rank's tensor-parallel part, or of its experts.
    sharded: elements of that on the rank that has the most.
    """

    parameter: Tensor
    gathered: int
    sharded: int


class RankPart(NamedTuple):
    """What the ranks at one place of the pipeline hold; all of the model without a pipeline.

    place: along the pipeline.
    units: parameters of each unit of FSDP2, in the order of the forward.
    root: those of the unit that is left.
    blocks: how many it has.
    costs: of each of its stages, the share of the whole model's computation.
    last: whether it has the head.
    """

    place: int
    units: tuple[tuple[Held, ...], ...]
    root: tuple[Held, ...]
    blocks: int
    costs: tuple[float, ...]
    last: bool

    @property
    def held(self) -> tuple[Held, ...]:
        """All parameters."""
        return tuple(one for unit in (self.root, *self.units) for one in unit)


def rank_parts(model: Model, layout: Layout) -> list[RankPart]:
    """What ranks hold, one entry per place of the pipeline.

    Args:
        model: whole, on the meta device.
        layout: of its tensors.

    Raises:
        ConfigError: there are fewer blocks than stages.
    """
    module, plan, d = as_module(model), model.parallel_plan(), layout.degrees
    blocks = matching(module, plan.blocks)
    how = _holdings(module, plan, layout)
    inside = {id(value) for block in blocks.values() for value in block.parameters()}
    first = {id(value) for table in matching(module, plan.embeddings).values() for value in table.parameters()}
    outside = [value for value in module.parameters() if id(value) not in inside]
    tables, others = _parted(outside, first)
    count = d.pp * layout.stages_per_rank
    if len(blocks) < count:
        raise ConfigError(
            f"{type(model).__name__} has {len(blocks)} blocks, but the pipeline has {count} stages",
            hint=f"set pp of world.auto times stages_per_rank to at most {len(blocks)}",
            about=model,
        )
    sizes, extra = [_size(block.parameters()) for block in blocks.values()], _size(others)
    # As the pipeline divides them; embeddings count nothing.
    division = divide(sizes, count, extra) if count > 1 else [range(len(blocks))]
    total = max(1, sum(sizes) + extra)
    names, parts = list(blocks), []
    for place in range(d.pp):
        stages = held_stages(place, d.pp, layout.stages_per_rank) if count > 1 else [0]
        units = [
            tuple(how[id(value)] for block in unit for value in block.parameters() if id(value) in how)
            for stage in stages
            for unit in units_of({names[n]: blocks[names[n]] for n in division[stage]}, layout.blocks_per_unit)
        ]
        root = [*(tables if 0 in stages else []), *(others if count - 1 in stages else [])]
        costs = [
            (sum(sizes[n] for n in division[stage]) + (extra if stage == count - 1 else 0)) / total for stage in stages
        ]
        held = sum(len(division[stage]) for stage in stages)
        own = tuple(how[id(value)] for value in root)
        parts.append(RankPart(place, tuple(units), own, held, tuple(costs), count - 1 in stages))
    return parts


def split_layers(module: nn.Module, plan: ParallelPlan) -> Layers:
    """What ``plan`` names in a whole model; looked up once, as one model is planned in many ways."""
    if module not in _known_layers:
        _known_layers[module] = find_layers(module, plan)
    return _known_layers[module]


def _holdings(module: nn.Module, plan: ParallelPlan, layout: Layout) -> dict[int, Held]:
    """Each parameter as ranks have it, by its identity."""
    d = layout.degrees
    named = dict(module.named_parameters())
    readings = split_layers(module, plan).readings if d.tp > 1 else {}
    spread = set()
    if d.ep > 1:
        mixtures: dict[str, Any] = dict(matching(module, plan.experts))
        spread = {id(getattr(one, name)) for one in mixtures.values() for name in one.expert_parameters}
    found = {}
    for name, value in named.items():
        shape = list(value.shape)
        placement = readings[name].placement if readings else None
        if isinstance(placement, Shard):
            shape[placement.dim] = -(-shape[placement.dim] // d.tp)
        shards = layout.shards
        if id(value) in spread:
            shape[0], shards = -(-shape[0] // d.ep), shards // d.ep
        rows = -(-shape[0] // shards) if shape else 1
        each = _product(shape[1:])
        found[id(value)] = Held(value, _product(shape), rows * each)
    return found


def _parted(values: Iterable[Tensor], first: set[int]) -> tuple[list[Tensor], list[Tensor]]:
    inside: list[Tensor] = []
    others: list[Tensor] = []
    for value in values:
        (inside if id(value) in first else others).append(value)
    return inside, others


def _size(values: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in values)


def _product(shape: list[int]) -> int:
    return torch.Size(shape).numel()
