"""What cannot be split, said when the model is built."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import Shard

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_parallel.mesh import Degrees
from modalities_parallel.tensor.layers import Layers, owned


def refuse(model: nn.Module, plan: ParallelPlan, layers: Layers, degrees: Degrees, component: object) -> None:
    """Raise ConfigError if ``model`` cannot be split over ``degrees.tp`` and ``degrees.cp`` ranks.

    Args:
        model: with whole parameters.
        plan: its own.
        layers: what the plan names.
        degrees: of the mesh.
        component: whose argument ``world`` errors are about.
    """
    for message, hint in _obstacles(model, plan, layers, degrees):
        raise ConfigError(message, hint=hint, about=(component, "world"))


def _obstacles(model: nn.Module, plan: ParallelPlan, layers: Layers, degrees: Degrees) -> Iterator[tuple[str, str]]:
    kind, axis = type(model).__name__, "tp" if degrees.tp > 1 else "cp"
    needed = {
        "tp": ("blocks", "column", "row", "embeddings"),
        "cp": ("blocks", "column", "row", "attention", "head_size"),
    }
    for field in dict.fromkeys((*(needed["tp"] if degrees.tp > 1 else ()), *(needed["cp"] if degrees.cp > 1 else ()))):
        if not getattr(plan, field):
            asked = "cp" if field in ("attention", "head_size") else axis
            yield (
                f"{asked} is {getattr(degrees, asked)}, but the parallel plan of {kind} has no {field}",
                f"set {asked} to 1 in world.auto, or let the model's parallel_plan say what can be split",
            )
    if degrees.tp > 1 and degrees.ep > 1:
        yield f"experts cannot be shared out (ep {degrees.ep}) and split (tp {degrees.tp})", "set tp or ep to 1"
    yield from _uneven_heads(plan, layers, degrees)
    if degrees.tp > 1:
        yield from _uneven_parameters(model, layers, degrees.tp)
        yield from _foreign_head(layers)


def _uneven_heads(plan: ParallelPlan, layers: Layers, degrees: Degrees) -> Iterator[tuple[str, str]]:
    for name, region in layers.regions.items():
        # Attention that the plan does not name as such, as it cannot exchange heads, but says how wide they are.
        if isinstance(size := getattr(region, "head_dim", None), int):
            for child, layer in region.named_children():
                if f"{name}.{child}" in layers.columns and (heads := _weight(layer).shape[-2] // size) % degrees.tp:
                    yield _few_heads(f"{name}.{child}", heads, degrees.tp)
    size = plan.head_size
    if not size:
        return
    ways = degrees.tp * degrees.cp
    for name, layer in layers.outputs.items():
        features = _weight(layer).shape[-1]
        if features % (size * ways):
            product = " x ".join(f"{axis} {n}" for axis, n in (("tp", degrees.tp), ("cp", degrees.cp)) if n > 1)
            yield (
                f"the {features // size} heads that {name} takes cannot be shared out among {product} ranks",
                f"{'tp x cp' if degrees.cp > 1 and degrees.tp > 1 else product.split()[0]} must divide "
                f"{features // size}: {_divisors(features // size)}",
            )
    for name, layer in layers.projections.items():
        heads = _weight(layer).shape[-2] // size
        if heads % degrees.tp:
            yield _few_heads(name, heads, degrees.tp)


def _few_heads(name: str, heads: int, tp: int) -> tuple[str, str]:
    return (
        f"the {heads} heads that {name} gives cannot be shared out among tp {tp} ranks",
        f"tp must divide {heads}: {_divisors(heads)}",
    )


def _uneven_parameters(model: nn.Module, layers: Layers, tp: int) -> Iterator[tuple[str, str]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tables = {own for name in layers.embeddings for own in owned(name, parameters)}
    for name, reading in layers.readings.items():
        if not isinstance(reading.placement, Shard):
            continue
        size = parameters[name].shape[reading.placement.dim]
        if size % tp:
            by_id = name in tables or name.startswith("head.")
            hint = f"tp must divide {size}: {_divisors(size)}"
            if by_id:
                hint = f"model.decoder rounds a vocabulary up with vocab_multiple: {tp}; or {hint}"
            yield f"the {size} {'rows' if by_id else 'features'} of {name} cannot be split over tp {tp} ranks", hint


def _foreign_head(layers: Layers) -> Iterator[tuple[str, str]]:
    if layers.head is None or layers.splits_head:
        return
    own = dict(layers.head.named_parameters())
    split = {name for name, reading in layers.readings.items() if isinstance(reading.placement, Shard)}
    if not own or any(name.startswith("head.") for name in split):
        yield (
            f"the head, a {type(layers.head).__name__}, reads weights that tp splits, and is not known to work with a "
            f"part of them",
            "give its class an attribute vocabulary_shard = None, see modalities_core.interfaces.VocabularyShard",
        )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor), "a layer of a plan has a weight"
    return weight


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
