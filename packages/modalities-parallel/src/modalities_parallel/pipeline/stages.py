"""The part of a model that a rank of a pipeline holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan, World
from modalities_core.training.plan import matching
from modalities_parallel.mesh import PIPELINE, Meshes, place_along
from modalities_parallel.pipeline.absent import Absent, AbsentEmbedding
from modalities_parallel.pipeline.division import divide, held_stages
from modalities_parallel.pipeline.staged import Stages


def keep_stages(
    model: nn.Module, plan: ParallelPlan, meshes: Meshes, stages_per_rank: int, *, component: object = None
) -> None:
    """Leave only this rank's stages in ``model``, in place; names do not change, and its own forward still runs.

    Blocks are shared out, in their order, to pp x ``stages_per_rank`` contiguous stages, and stage s goes to the rank
    at place s modulo pp. What a stage costs is the number of parameters that it multiplies with: those of its blocks,
    and for the last stage of the norm and the head as well. Embeddings count nothing, as looking up takes no time.

    Embeddings belong to the first stage, other modules outside of blocks that have parameters to the last, and modules
    without any to all. The model gets two attributes: ``pipeline_stages``, a ``Stages``, and ``whole_model``, a tuple
    with all of it on the meta device, for whoever needs names and shapes of everything. Its ``finish_step`` sums over
    the ranks that hold the same stages.

    Args:
        model: on the meta device.
        plan: its parallel plan, with blocks and embeddings.
        meshes: of the world.
        stages_per_rank: how often the pipeline goes round.
        component: that was given the model, for error positions.

    Raises:
        ConfigError: the plan leaves something out, there are fewer blocks than stages, stages would share a parameter,
            or a parameter belongs to none.
    """
    ranks = meshes.degrees.pp
    count = ranks * stages_per_rank
    blocks = _blocks(model, plan, count, component)
    embeddings = matching(model, plan.embeddings, component=component)
    parts = dict(_parts(model, set(blocks), set(embeddings), component))
    others = {name: module for name, module in parts.items() if name not in blocks and name not in embeddings}
    division = divide([_size(block) for block in blocks.values()], count, sum(map(_size, others.values())))
    names = list(blocks)
    stage_of = dict.fromkeys(parts, count - 1) | dict.fromkeys(embeddings, 0)
    stage_of |= {names[place]: stage for stage, places in enumerate(division) for place in places}
    _refuse_shared(model, stage_of, component)
    _refuse_tied(model, next(iter(embeddings.values())), stage_of, component)
    whole = _twin(model)
    held = held_stages(place_along(meshes.whole, PIPELINE), ranks, stages_per_rank)
    dtype = getattr(model, "computing_dtype", torch.get_default_dtype())
    absent: dict[int, Absent] = {}  # by what it stands for: a module may have two names
    for name, module in parts.items():
        if stage_of[name] not in held:
            kind = AbsentEmbedding(module, dtype) if name in embeddings else Absent(module)
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._modules[key] = absent.setdefault(id(module), kind)
    own = {stage: {names[place]: blocks[names[place]] for place in division[stage]} for stage in held}
    marked: Any = model
    marked.whole_model = (whole,)
    marked.pipeline_stages = Stages(model, own, others if count - 1 in held else {}, count, ranks)
    _sum_within_stages(marked, meshes)


def _blocks(model: nn.Module, plan: ParallelPlan, count: int, component: object) -> dict[str, nn.Module]:
    """The blocks by name, without those inside of others, or why there can be no pipeline."""
    kind = type(model).__name__
    for name, globs in (("blocks", plan.blocks), ("embeddings", plan.embeddings)):
        if not globs:
            raise ConfigError(
                f"{kind} names no {name} in its parallel plan, so it cannot be cut into stages",
                hint=f"set pp of world.auto to 1, or let the model's parallel_plan name its {name}",
                about=(component, "model"),
            )
    found = matching(model, plan.blocks, component=component)
    blocks = {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if len(blocks) < count:
        raise ConfigError(
            f"{kind} has {len(blocks)} blocks, but the pipeline has {count} stages, each with at least one",
            hint=f"set pp of world.auto times stages_per_rank to at most {len(blocks)}",
            about=(component, "stages_per_rank"),
        )
    return blocks


def _parts(
    model: nn.Module, blocks: set[str], embeddings: set[str], component: object, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters that lie whole in one stage, by name: blocks, embeddings, and the largest others."""
    direct = [name for name, _ in model.named_parameters(recurse=False)]
    if direct:
        raise ConfigError(
            f"the parameter {prefix + direct[0]} is neither inside of a block nor of a module beside them, so no stage "
            "of a pipeline can hold it",
            hint="put it into a module of its own, or set pp of world.auto to 1",
            about=(component, "model"),
        )
    for key, child in model._modules.items():
        name = prefix + key
        if child is None:
            continue
        if name in blocks or name in embeddings:
            yield name, child
        elif any(other.startswith(f"{name}.") for other in blocks | embeddings):
            yield from _parts(child, blocks, embeddings, component, f"{name}.")
        elif next(child.parameters(), None) is not None:
            yield name, child


def _refuse_shared(model: nn.Module, stage_of: Mapping[str, int], component: object) -> None:
    """Refuse one parameter under two names in different stages, such as tied embeddings."""
    first: dict[int, tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = _stage(name, stage_of)
        other, at = first.setdefault(id(parameter), (name, stage))
        if at != stage:
            raise ConfigError(
                f"{other} and {name} are one parameter (tied), but lie in different stages of the pipeline",
                hint="untie them (tied_embeddings: false for model.decoder), or set pp of world.auto to 1",
                about=(component, "model"),
            )


def _refuse_tied(model: nn.Module, embedding: nn.Module, stage_of: Mapping[str, int], component: object) -> None:
    """Refuse a head that reads a parameter of another stage, such as the embedding's."""
    head: nn.Module = cast(Any, model).head
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        with torch.enable_grad():
            logits = head(torch.empty(1, 1, cast(Tensor, embedding.weight).shape[-1], device="meta"))
        read = [names[id(leaf)] for leaf in _leaves(logits.grad_fn) if id(leaf) in names]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        # A head that cannot be tried without values is taken to read what it holds.
        read = [name for name, parameter in model.named_parameters() if parameter in set(head.parameters())]
    last = max(stage_of.values())
    elsewhere = [name for name in read if _stage(name, stage_of) != last]
    if elsewhere or not read:
        raise ConfigError(
            f"the output head of {type(model).__name__} reads {elsewhere[0] if elsewhere else 'no weight of its own'} "
            "(tied), which is not on the last rank of the pipeline, where the head is",
            hint="untie them (tied_embeddings: false for model.decoder), or set pp of world.auto to 1",
            about=(component, "model"),
        )


def _leaves(function: Any) -> Iterator[Tensor]:
    """The parameters that autograd would reach from ``function``."""
    seen, waiting = set(), [function]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            yield function.variable
        waiting.extend(before for before, _ in function.next_functions)


def _stage(parameter: str, stage_of: Mapping[str, int]) -> int:
    return next(stage for part, stage in stage_of.items() if parameter.startswith(f"{part}."))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _twin(module: nn.Module) -> nn.Module:
    """A second tree of modules with the same meta tensors, which stays as it is while the first is cut."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()
    }
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    return twin


def _sum_within_stages(model: Any, meshes: Meshes) -> None:
    """Let the model's ``finish_step`` see only the ranks that hold the same blocks."""
    finish_step = getattr(model, "finish_step", None)
    if finish_step is None:
        return
    grid = meshes.whole.mesh
    own = place_along(meshes.whole, PIPELINE)
    # Every rank makes all groups, in the same order, as torch wants it.
    groups = [dist.new_group(ranks.flatten().tolist()) for ranks in grid]

    def finish_stage(world: World) -> None:
        finish_step(_StageWorld(world, groups[own]))

    model.finish_step = finish_stage


class _StageWorld:
    """A world whose sums are over the ranks that hold the same stages."""

    def __init__(self, world: World, group: Any) -> None:
        self._world = world
        self._group = group

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over these ranks, in place."""
        dist.all_reduce(values, group=self._group)
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)
